"""Flips are planned in balance, perfect ones succeed, and the mirror test knows its sides."""
import pytest
import torch
from oracle import LookupJudge, find

from facegen.conditioning.pipeline import load_pipeline
from facegen.core import generator, root, save_result
from facegen.data.faces import ATTRIBUTES, flip_faces, mirror_mask
from facegen.evaluation import counterfactuals
from facegen.evaluation.controllability import NOT_IN_MASK
from facegen.evaluation.judges import load_classifier, load_parser
from facegen.synthetic.toyfaces import render_faces

N, HIDDEN = 96, [ATTRIBUTES.index(a) for a in NOT_IN_MASK]


@pytest.fixture(scope='module')
def want(): return render_faces(n=N, size=32, seed=5)


def test_a_plan_flips_one_known_attribute_of_each_face_in_balance(want):
    attrs = want.attrs.repeat(3, 1)
    attrs[::3, HIDDEN[:4]] = torch.nan
    requested, column = counterfactuals.flip_plan(attrs, seed=1)
    changed = (requested != attrs) & ~(requested.isnan() & attrs.isnan())
    rows = torch.arange(len(attrs))
    assert (changed.sum(1) == 1).all() and changed[rows, column].all()
    assert (requested + attrs)[rows, column].eq(1).all()
    counts = column.bincount(minlength=40)[HIDDEN]
    assert counts.sum() == len(attrs) and counts.max() - counts.min() <= 1
    assert torch.equal(column, counterfactuals.flip_plan(attrs, seed=1)[1])
    assert not torch.equal(column, counterfactuals.flip_plan(attrs, seed=2)[1])


def test_perfect_flips_succeed_and_do_not_leak(want, tmp_path):
    requested, column = counterfactuals.flip_plan(want.attrs)
    after = render_faces(requested, size=32, seed=5).image
    judge = LookupJudge(torch.cat([want.image, after]), torch.cat([want.attrs, requested])*2 - 1)
    r = counterfactuals.flip_report(judge, want.image, after, requested, column, real=(want.image, after))
    for m in r:
        assert m['value'] == m['upper'] == (1 if 'success' in m['metric'] else 0)
    assert find(r, 'flip_success')['chance'] == 0 and .1 < find(r, 'flip_leakage')['chance'] < .5
    assert sum(m['n'] for m in r if m['metric'] == 'flip_success_one') == N
    still = counterfactuals.flip_report(judge, want.image, want.image, requested, column)
    assert find(still, 'flip_success')['value'] == 0 == find(still, 'flip_leakage')['value']
    assert still[0]['upper'] is None
    save_result(str(tmp_path/'flips.json'), {}, r + still)


def test_mirror_images_differ_and_symmetric_masks_do_not(want):
    twin, uncond = flip_faces(want), render_faces(n=N, size=32, seed=6)
    judge = LookupJudge(*(torch.cat([getattr(f, k) for f in (want, twin, uncond)]) for k in ('image', 'mask')))
    def value(x, mask): return counterfactuals.mirror_report(judge, x, mask, want.image)[0]['value']
    assert value(want.image, want.mask) == 1 and value(twin.image, want.mask) == 0
    assert .3 < value(uncond.image, want.mask) < .7
    symmetric = want.mask.where(torch.arange(32) < 16, twin.mask)
    assert value(want.image, symmetric) == .5
    m, = counterfactuals.mirror_report(LookupJudge(want.image, symmetric), want.image, want.mask)
    assert m['value'] == .5 == m['chance'] and m['low'] <= .5 <= m['high']


def test_the_kept_network_passes_both_tests_by_the_kept_judges():
    weights, pipe, unseen = root()/'data'/'weights', load_pipeline(), render_faces(n=24, size=64, seed=7)
    classifier, parser = (load(weights/f'{name}-laptop-s0'/'judge')[0]
                          for load, name in ((load_classifier, 'classifier'), (load_parser, 'parser')))
    requested, column = counterfactuals.flip_plan(unseen.attrs, ['Black_Hair', 'Blond_Hair', 'Gray_Hair', 'Pale_Skin'])
    def generate(attrs, mask):
        noise = [generator('test', i) for i in range(24)]
        return pipe(attrs, mask, n=24, steps=8, attrs_scale=2, mask_scale=2, generator=noise)
    before, after = (generate(a, unseen.mask) for a in (unseen.attrs, requested))
    r = counterfactuals.flip_report(classifier, before, after, requested, column)
    success, leakage = (find(r, name) for name in ('flip_success', 'flip_leakage'))
    assert success['value'] > .6 > .3 > success['chance'] and leakage['value'] < .5*leakage['chance']
    mirrored = generate(unseen.attrs, mirror_mask(unseen.mask))
    follows, mirrors = (counterfactuals.mirror_report(parser, x, unseen.mask)[0]['value'] for x in (before, mirrored))
    assert follows > .9 and mirrors < .1


def test_a_wrong_plan_says_what_to_do(want):
    with pytest.raises(ValueError, match='Smilling'):
        counterfactuals.flip_plan(want.attrs, ['Smilling'])


def test_faces_that_know_no_attribute_are_left_out_of_the_flips(want):
    "And the records of the others do not change"
    unknown = want.attrs.clone()
    unknown[::3] = torch.nan
    requested, column = counterfactuals.flip_plan(unknown)
    assert (column[::3] == -1).all() and requested[::3].isnan().all()
    rest = column >= 0
    assert ((requested != unknown)[rest].sum(1) == 1).all() and rest.sum() == len(want.attrs) - len(column[::3])
    images, judge = want.image.roll(1, 0), LookupJudge(want.image, want.attrs*2 - 1)
    found = counterfactuals.flip_report(judge, want.image, images, requested, column)
    alone = counterfactuals.flip_report(judge, want.image[rest], images[rest], requested[rest], column[rest])
    assert found == alone and found[0]['n'] == int(rest.sum())
    nobody = torch.full((8, 40), torch.nan)
    assert counterfactuals.flip_report(judge, want.image[:8], images[:8], *counterfactuals.flip_plan(nobody)) == []
