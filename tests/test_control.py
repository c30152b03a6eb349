"""Control: perfect generators reach the ceiling, deaf ones the floor, and every number has an oracle."""
import math
import numpy as np, pytest, torch
from scipy.ndimage import distance_transform_cdt
from torch import nn
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_recall, multilabel_specificity
from torchmetrics.functional.classification import multiclass_jaccard_index

from facegen import clues, control, copies, edits
from facegen.core import load_result, save_result
from facegen.crowds import Eye, features
from facegen.faces import ATTRIBUTES, PARTS, flip
from facegen.toyfaces import draw_faces

N, KEEP = 96, [i for i, a in enumerate(ATTRIBUTES) if a != 'Attractive']


class Oracle(nn.Module):
    "Looks up what is known of a picture"
    prevalence = torch.tensor(.5)
    def __init__(self, images, answers): super().__init__(); self.known = {x.numpy().tobytes(): a for x, a in zip(images, answers)}
    def forward(self, x): return torch.stack([self.known[p.numpy().tobytes()] for p in x])
    answers = forward


def rand(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
def get(report, name): return next(m for m in report if m['metric'] == name)


@pytest.fixture(scope='module')
def want(): return draw_faces(n=N, size=32, seed=5)


@pytest.fixture(scope='module')
def free(): return draw_faces(n=N, size=32, seed=6)


@pytest.fixture(scope='module')
def judges(want, free):
    "A classifier that errs in a tenth of its answers, a parser that is off by a pixel"
    image, attrs, mask = (torch.cat(x) for x in zip(want, free))
    truth = torch.where(rand(2*N, 40) < .1, 1 - attrs, attrs)*2 - 1
    return Oracle(image, truth*(.5 + rand(2*N, 40, seed=1))), Oracle(image, mask.roll(1, -1))


@pytest.fixture(scope='module')
def reports(want, free, judges):
    "Both reports of a perfect and of a deaf generator"
    def both(x): return (control.attribute_report(judges[0], x, want.attrs, want.image, want.image)
                         + control.mask_report(judges[1], x, want.mask, want.image, want.image))
    return {'perfect': both(want.image), 'deaf': both(free.image)}


def test_a_perfect_generator_reaches_its_ceiling_exactly(reports):
    for m in reports['perfect']: assert m['value'] == m['ceiling'] == m['ceiling_recon']
    assert get(reports['perfect'], 'balanced_accuracy')['ceiling'] < .95 and get(reports['perfect'], 'miou')['ceiling'] < .8


def test_a_deaf_generator_stays_at_the_floor(reports):
    for m in reports['deaf']:
        if m['metric'].endswith('_one'): continue
        assert abs(m['value'] - m['floor']) < .06 and m['value'] < m['ceiling'] - .1, m
    assert abs(get(reports['deaf'], 'balanced_accuracy')['floor'] - .5) < .05


def test_shuffled_conditions_reach_the_floor(want, judges, reports):
    r = control.attribute_report(judges[0], want.image, control.shuffled(want.attrs), want.image)
    assert abs(get(r, 'balanced_accuracy')['value'] - .5) < .05
    assert get(r, 'balanced_accuracy')['value'] == get(reports['perfect'], 'balanced_accuracy')['floor']


def test_following_the_mask_alone_shows_in_the_hidden_attributes(want, judges):
    attrs, hidden = want.attrs.clone(), [ATTRIBUTES.index(a) for a in clues.HIDDEN]
    attrs[:, hidden] = control.shuffled(attrs)[:, hidden]
    r = control.attribute_report(Oracle(want.image, attrs*2 - 1), want.image, want.attrs)
    assert get(r, 'balanced_accuracy')['value'] > .75 and abs(get(r, 'balanced_accuracy_hidden')['value'] - .5) < .06
    assert get(r, 'balanced_accuracy')['ceiling'] is None


def test_records_have_an_interval_and_survive_json(reports, tmp_path):
    every = reports['perfect'] + reports['deaf']
    for m in every: assert m['n'] == N and m['low'] <= m['value'] <= m['high'] and {'floor', 'ceiling'} <= m.keys()
    path = save_result(str(tmp_path/'control.json'), {}, every)
    assert [m['metric'] for m in load_result(path)['metrics']] == [m['metric'] for m in every]
    assert {m['attribute'] for m in every if 'attribute' in m} <= set(ATTRIBUTES)
    assert {m['part'] for m in every if 'part' in m} <= set(PARTS)


def test_the_macro_scores_are_those_of_torchmetrics(want, free, judges, reports):
    logits, true = control.look(judges[0], free.image), want.attrs
    both = [i for i in KEEP if 0 < true[:, i].sum() < N]; some = [i for i in KEEP if true[:, i].any()]
    rates = [f((logits > 0).int(), true.int(), 40, average=None) for f in (multilabel_recall, multilabel_specificity)]
    assert math.isclose(get(reports['deaf'], 'balanced_accuracy')['value'], float((sum(rates)/2)[both].mean()), abs_tol=1e-5)
    ap = multilabel_average_precision(logits[:, some], true[:, some].long(), len(some))
    assert math.isclose(get(reports['deaf'], 'average_precision')['value'], float(ap), abs_tol=1e-5)
    said = control.look(judges[1].answers, free.image)
    lib = multiclass_jaccard_index(said, want.mask, 19, average=None)
    there = (torch.cat([said, want.mask]).flatten().bincount(minlength=19) > 0)
    assert math.isclose(get(reports['deaf'], 'miou')['value'], float(lib[there].mean()), abs_tol=1e-5)
    assert math.isclose(get(reports['deaf'], 'pixel_accuracy')['value'], float((said == want.mask).double().mean()), abs_tol=1e-5)


@pytest.mark.parametrize('ties', [False, True])
def test_average_precision_is_that_of_torchmetrics_also_with_ties_and_unknowns(ties):
    s = rand(200, 12) if not ties else (rand(200, 12)*4).floor()/4
    t = (rand(200, 12, seed=1) < .3).float(); t[rand(200, 12, seed=2) < .2] = torch.nan
    lib = multilabel_average_precision(s, t.nan_to_num(-1).long(), 12, average=None, ignore_index=-1)
    assert torch.allclose(control.average_precision(s, t), lib, atol=1e-5)
    assert control.average_precision(s, torch.zeros(200, 12)).isnan().all()


def slow_boundary_f1(said, true, slack):
    "The definition, pixel by pixel, for one face"
    said, h, w, scores = np.where(true < 0, -1, said), *true.shape, []
    def outline(m, c):
        steps = (0, 1), (1, 0), (0, -1), (-1, 0)
        near = lambda y, x: [(y + j, x + i) for j, i in steps if 0 <= y + j < h and 0 <= x + i < w]
        return np.array([[m[y, x] == c and any(m[q] not in (c, -1) for q in near(y, x)) for x in range(w)] for y in range(h)])
    for c in set(true[true >= 0].tolist()):
        a, b = outline(said, c), outline(true, c)
        if not a.any() and not b.any(): continue
        if not a.any() or not b.any(): scores.append(0.); continue
        p, r = ((distance_transform_cdt(~y, 'chessboard')[x] <= slack).mean() for x, y in ((a, b), (b, a)))
        scores.append(2*p*r/(p + r) if p + r else 0.)
    return np.mean(scores) if scores else np.nan


@pytest.mark.parametrize('slack', [0, 1, 2])
def test_boundary_f1_is_its_definition(slack):
    true, said = ((rand(6, 4, 4, seed=s)*4).long().repeat_interleave(4, 1).repeat_interleave(4, 2) for s in (1, 2))
    said[:3] = true[:3].roll(1, 2); true[1::2, :5, 3:9] = -1; true[5] = -1
    slow = [slow_boundary_f1(s.numpy(), t.numpy(), slack) for s, t in zip(said, true)]
    assert np.allclose(control.boundary_f1(said, true, slack), slow, atol=1e-6, equal_nan=True) and np.isnan(slow[5])


def test_boundary_f1_is_one_for_equal_masks_and_falls_with_a_shift(want):
    f1 = [control.boundary_f1(want.mask.roll(k, -1), want.mask).mean() for k in (0, 2, 3, 4, 5)]
    assert f1[0] == 1 and all(a > b for a, b in zip(f1, f1[1:]))
    holes = want.mask.clone(); holes[:, 8:20, 8:20] = -1
    assert control.boundary_f1(want.mask, holes).eq(1).all()  # the rim of what is unknown is no outline


def test_what_was_not_asked_is_not_judged(want, judges):
    attrs, mask = want.attrs.clone(), want.mask.clone(); attrs[:, 5:] = torch.nan; mask[:, 16:] = -1
    names = {m['attribute'] for m in control.attribute_report(judges[0], want.image, attrs) if 'attribute' in m}
    assert names <= set(ATTRIBUTES[:5]) and len(names) >= 3
    below = want.mask.clone(); below[:, 16:] = 0
    par = Oracle(want.image, below); par.answers = par.forward
    assert get(control.mask_report(par, want.image, mask), 'miou')['value'] == 1


@pytest.mark.parametrize('call, words', [
    (lambda f, j: control.attribute_report(j[0], f.image, f.attrs[:9]), 'one for each sample'),
    (lambda f, j: control.mask_report(j[1], f.image, f.mask[:, ::2, ::2]), 'one for each sample'),
    (lambda f, j: control.mask_report(j[1], f.image, f.mask, real=f.image[:9]), 'real must be'),
    (lambda f, j: control.shuffled(f.attrs[:1]), '2 faces or more'),
    (lambda f, j: edits.flip_plan(torch.full((3, 40), torch.nan)), 'know none'),
    (lambda f, j: edits.flip_plan(f.attrs, ['Smilling']), 'Smilling'),
    (lambda f, j: copies.spread_report(Eye(), f.image), '2 conditions'),
    (lambda f, j: copies.copy_report(torch.ones(4, 2), torch.ones(5, 2), torch.ones(6, 2)), 'as many'),
    (lambda f, j: copies.apart(torch.ones(4, 2), torch.ones(5, 3)), r'features\('),
])
def test_a_wrong_call_is_told_what_to_do(want, judges, call, words):
    with pytest.raises(ValueError, match=words): call(want, judges)


def test_hidden_attributes_leave_the_mask_alone_and_a_probe_cannot_see_strangers(want):
    attrs = want.attrs.clone(); cols = [ATTRIBUTES.index(a) for a in clues.HIDDEN]; attrs[:, cols] = 1 - attrs[:, cols]
    again = draw_faces(attrs, size=32, seed=5)
    assert torch.equal(again.mask, want.mask) and not torch.equal(again.image, want.image)
    crowd = draw_faces(n=600, size=32, seed=1)
    told, none = clues.given_away(crowd.mask, crowd.attrs), clues.given_away(crowd.mask, crowd.attrs.roll(300, 0))
    assert told[ATTRIBUTES.index('Eyeglasses')] > .95 and told.nanmean() > .68 and abs(none.nanmean() - .5) < .05


def test_a_plan_flips_one_known_attribute_of_each_face_in_balance(want):
    attrs = want.attrs.repeat(3, 1); attrs[::3, [ATTRIBUTES.index(a) for a in clues.HIDDEN[:4]]] = torch.nan
    asked, column = edits.flip_plan(attrs, seed=1)
    changed = (asked != attrs) & ~(asked.isnan() & attrs.isnan()); rows = torch.arange(len(attrs))
    assert (changed.sum(1) == 1).all() and changed[rows, column].all() and (asked + attrs)[rows, column].eq(1).all()
    counts = column.bincount(minlength=40)[[ATTRIBUTES.index(a) for a in clues.HIDDEN]]
    assert counts.sum() == len(attrs) and counts.max() - counts.min() <= 1
    assert torch.equal(column, edits.flip_plan(attrs, seed=1)[1]) and not torch.equal(column, edits.flip_plan(attrs, seed=2)[1])


def test_perfect_flips_succeed_and_do_not_leak(want, tmp_path):
    asked, column = edits.flip_plan(want.attrs)
    after = draw_faces(asked, size=32, seed=5).image
    oracle = Oracle(torch.cat([want.image, after]), torch.cat([want.attrs, asked])*2 - 1)
    r = edits.flip_report(oracle, want.image, after, asked, column, real=(want.image, after))
    for m in r: assert m['value'] == m['ceiling'] == (1 if 'success' in m['metric'] else 0)
    assert get(r, 'flip_success')['floor'] == 0 and .1 < get(r, 'flip_leakage')['floor'] < .5
    assert sum(m['n'] for m in r if m['metric'] == 'flip_success_one') == N
    still = edits.flip_report(oracle, want.image, want.image, asked, column)
    assert get(still, 'flip_success')['value'] == 0 == get(still, 'flip_leakage')['value'] and still[0]['ceiling'] is None
    save_result(str(tmp_path/'flips.json'), {}, r + still)


def test_mirrors_are_told_apart_and_symmetry_is_not(want, free, judges):
    twin = flip(want); every = Oracle(torch.cat([want.image, twin.image, free.image]), torch.cat([want.mask, twin.mask, free.mask]))
    value = lambda x, asked: edits.mirror_report(every, x, asked, want.image)[0]['value']
    assert value(want.image, want.mask) == 1 and value(twin.image, want.mask) == 0 and .3 < value(free.image, want.mask) < .7
    even = want.mask.where(torch.arange(32) < 16, twin.mask)
    assert value(want.image, even) == .5
    flat = Oracle(want.image, even); m, = edits.mirror_report(flat, want.image, want.mask)
    assert m['value'] == .5 == m['floor'] and m['low'] <= .5 <= m['high']


def test_spread_is_nothing_for_equal_and_one_for_unconditional_samples(want):
    eye, free = Eye(), draw_faces(n=128, size=32, seed=8).image.unflatten(0, (16, 8))
    same, = copies.spread_report(eye, want.image[:16, None].expand(-1, 8, -1, -1, -1))
    some, = copies.spread_report(eye, draw_faces(want.attrs[:16].repeat_interleave(8, 0), size=32, seed=9).image.unflatten(0, (16, 8)))
    none, = copies.spread_report(eye, free)
    assert same['value'] == 0 and abs(none['value'] - 1) < .05 and .05 < some['value'] < none['value'] - .05
    assert none['n'] == 128 and none['low'] <= none['value'] <= none['high'] and (none['floor'], none['ceiling']) == (0, 1)


def test_copies_are_noticed_and_new_faces_are_not(want, free, tmp_path):
    eye = Eye(); train, held, new = (features(x, eye) for x in (want.image, free.image, draw_faces(n=N, size=32, seed=7).image))
    r = {name: {m['metric']: m for m in copies.copy_report(x, train, held)}
         for name, x in dict(copier=train, new=new, few=torch.cat([train[:N//8], new[N//8:]])).items()}
    assert r['copier']['copy_ratio']['value'] < 1e-6 and r['copier']['copy_share']['value'] == 1
    for m in r['new'].values(): assert abs(m['value'] - m['ceiling']) < .15
    assert r['few']['copy_ratio']['value'] > .8 and r['few']['copy_ratio_low']['value'] < 1e-6 < r['new']['copy_ratio_low']['low']
    save_result(str(tmp_path/'copies.json'), {}, [m for x in r.values() for m in x.values()])


def test_nearest_is_the_brute_force_neighbour(want):
    f = features(want.image, Eye()); d, row = copies.nearest(f, f)
    assert d.max() == 0 and torch.equal(row, torch.arange(N))
    d, row = copies.nearest(f, f, own=True); slow = np.linalg.norm(f.double().numpy()[:, None] - f.double().numpy()[None], axis=2)
    np.fill_diagonal(slow, np.inf); assert np.allclose(d, slow.min(1)) and (row.numpy() == slow.argmin(1)).all()
