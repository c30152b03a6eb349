"""Perfect generators reach the upper mark, unconditional ones chance, and every number has an oracle."""
import math

import numpy as np
import pytest
import torch
from oracle import LookupJudge, find, rand
from scipy.ndimage import distance_transform_cdt
from torchmetrics.functional.classification import (
    multiclass_jaccard_index, multilabel_average_precision, multilabel_recall, multilabel_specificity)

from facegen.core import load_result, save_result
from facegen.data.faces import ATTRIBUTES, PARTS
from facegen.evaluation import controllability
from facegen.synthetic.toyfaces import render_faces

N, KEEP = 96, [i for i, a in enumerate(ATTRIBUTES) if a != 'Attractive']
HIDDEN = [ATTRIBUTES.index(a) for a in controllability.NOT_IN_MASK]


@pytest.fixture(scope='module')
def want(): return render_faces(n=N, size=32, seed=5)


@pytest.fixture(scope='module')
def uncond(): return render_faces(n=N, size=32, seed=6)


@pytest.fixture(scope='module')
def judges(want, uncond):
    "A classifier that errs in a tenth of its answers, a parser that is off by a pixel"
    image, attrs, mask = (torch.cat(x) for x in zip(want, uncond))
    answers = torch.where(rand(2*N, 40) < .1, 1 - attrs, attrs)*2 - 1
    logits = answers*(.5 + rand(2*N, 40, seed=1))
    return LookupJudge(image, logits), LookupJudge(image, mask.roll(1, -1))


@pytest.fixture(scope='module')
def reports(want, uncond, judges):
    "Both reports of a perfect and of an unconditional generator"
    def both(x):
        return (controllability.attribute_report(judges[0], x, want.attrs, want.image, want.image)
                + controllability.mask_report(judges[1], x, want.mask, want.image, want.image))
    return {'perfect': both(want.image), 'unconditional': both(uncond.image)}


def test_a_perfect_generator_reaches_its_upper_mark_exactly(reports):
    for m in reports['perfect']:
        assert m['value'] == m['upper'] == m['recon']
    assert find(reports['perfect'], 'balanced_accuracy')['upper'] < .95
    assert find(reports['perfect'], 'miou')['upper'] < .8


def test_an_unconditional_generator_stays_at_chance(reports):
    for m in reports['unconditional']:
        if m['metric'].endswith('_one'): continue
        assert abs(m['value'] - m['chance']) < .06 and m['value'] < m['upper'] - .1, m
    assert abs(find(reports['unconditional'], 'balanced_accuracy')['chance'] - .5) < .05


def test_permuted_conditions_reach_chance(want, judges, reports):
    r = controllability.attribute_report(judges[0], want.image, controllability.permute(want.attrs), want.image)
    value = find(r, 'balanced_accuracy')['value']
    assert abs(value - .5) < .05
    assert value == find(reports['perfect'], 'balanced_accuracy')['chance']


def test_following_the_mask_alone_shows_in_the_hidden_attributes(want):
    attrs = want.attrs.clone()
    attrs[:, HIDDEN] = controllability.permute(attrs)[:, HIDDEN]
    r = controllability.attribute_report(LookupJudge(want.image, attrs*2 - 1), want.image, want.attrs)
    assert find(r, 'balanced_accuracy')['value'] > .75
    assert abs(find(r, 'balanced_accuracy_hidden')['value'] - .5) < .06
    assert find(r, 'balanced_accuracy')['upper'] is None


def test_records_have_an_interval_and_survive_json(reports, tmp_path):
    every = reports['perfect'] + reports['unconditional']
    for m in every:
        assert m['n'] == N and m['low'] <= m['value'] <= m['high'] and {'chance', 'upper'} <= m.keys()
    path = save_result(str(tmp_path/'control.json'), {}, every)
    assert [m['metric'] for m in load_result(path)['metrics']] == [m['metric'] for m in every]
    assert {m['attribute'] for m in every if 'attribute' in m} <= set(ATTRIBUTES)
    assert {m['part'] for m in every if 'part' in m} <= set(PARTS)


def test_the_means_are_those_of_torchmetrics(want, uncond, judges, reports):
    def value(metric): return find(reports['unconditional'], metric)['value']
    logits, target = controllability.run_judge(judges[0], uncond.image), want.attrs
    both = [i for i in KEEP if 0 < target[:, i].sum() < N]
    some = [i for i in KEEP if target[:, i].any()]
    rates = [f((logits > 0).int(), target.int(), 40, average=None) for f in (multilabel_recall, multilabel_specificity)]
    assert math.isclose(value('balanced_accuracy'), float((sum(rates)/2)[both].mean()), abs_tol=1e-5)
    ap = multilabel_average_precision(logits[:, some], target[:, some].long(), len(some))
    assert math.isclose(value('average_precision'), float(ap), abs_tol=1e-5)
    pred = controllability.run_judge(judges[1].predict, uncond.image)
    lib = multiclass_jaccard_index(pred, want.mask, 19, average=None)
    there = torch.cat([pred, want.mask]).flatten().bincount(minlength=19) > 0
    assert math.isclose(value('miou'), float(lib[there].mean()), abs_tol=1e-5)
    assert math.isclose(value('pixel_accuracy'), float((pred == want.mask).double().mean()), abs_tol=1e-5)


def outline(mask, part):
    "The definition of an outline, pixel by pixel"
    h, w = mask.shape
    def near(y, x):
        steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
        return [(y + j, x + i) for j, i in steps if 0 <= y + j < h and 0 <= x + i < w]
    def is_edge(y, x): return mask[y, x] == part and any(mask[q] not in (part, -1) for q in near(y, x))
    return np.array([[is_edge(y, x) for x in range(w)] for y in range(h)])


def slow_boundary_f1(pred, target, tolerance):
    "The definition of boundary F1, for one face"
    pred, scores = np.where(target < 0, -1, pred), []
    def share(x, y): return (distance_transform_cdt(~y, 'chessboard')[x] <= tolerance).mean()
    for part in set(target[target >= 0].tolist()):
        a, b = outline(pred, part), outline(target, part)
        if not a.any() and not b.any(): continue
        precision, recall = (share(a, b), share(b, a)) if a.any() and b.any() else (0., 0.)
        scores.append(2*precision*recall/(precision + recall) if precision + recall else 0.)
    return np.mean(scores) if scores else np.nan


@pytest.mark.parametrize('tolerance', [0, 1, 2])
def test_boundary_f1_is_its_definition(tolerance):
    def blocks(seed): return (rand(6, 4, 4, seed=seed)*4).long().repeat_interleave(4, 1).repeat_interleave(4, 2)
    target, pred = blocks(1), blocks(2)
    pred[:3] = target[:3].roll(1, 2)
    target[1::2, :5, 3:9] = -1
    target[5] = -1
    slow = [slow_boundary_f1(p.numpy(), t.numpy(), tolerance) for p, t in zip(pred, target)]
    ours = controllability.boundary_f1(pred, target, tolerance)
    assert np.allclose(ours, slow, atol=1e-6, equal_nan=True) and np.isnan(slow[5])


def test_boundary_f1_is_one_for_equal_masks_and_falls_with_a_shift(want):
    f1 = [controllability.boundary_f1(want.mask.roll(k, -1), want.mask).mean() for k in (0, 2, 3, 4, 5)]
    assert f1[0] == 1 and all(a > b for a, b in zip(f1, f1[1:]))
    holes = want.mask.clone()
    holes[:, 8:20, 8:20] = -1
    assert controllability.boundary_f1(want.mask, holes).eq(1).all()  # the rim of what is unknown is no outline


def test_what_was_not_requested_is_not_judged(want, judges):
    attrs, mask = want.attrs.clone(), want.mask.clone()
    attrs[:, 5:] = torch.nan
    mask[:, 16:] = -1
    report = controllability.attribute_report(judges[0], want.image, attrs)
    names = {m['attribute'] for m in report if 'attribute' in m}
    assert names <= set(ATTRIBUTES[:5]) and len(names) >= 3
    wrong_below = want.mask.clone()
    wrong_below[:, 16:] = 0
    parser = LookupJudge(want.image, wrong_below)
    assert find(controllability.mask_report(parser, want.image, mask), 'miou')['value'] == 1


@pytest.mark.parametrize('call, words', [
    (lambda f, j: controllability.attribute_report(j[0], f.image, f.attrs[:9]), 'one for each sample'),
    (lambda f, j: controllability.mask_report(j[1], f.image, f.mask[:, ::2, ::2]), 'one for each sample'),
    (lambda f, j: controllability.mask_report(j[1], f.image, f.mask, real=f.image[:9]), 'real must be'),
    (lambda f, j: controllability.permute(f.attrs[:1]), '2 faces or more'),
])
def test_a_wrong_call_says_what_to_do(want, judges, call, words):
    with pytest.raises(ValueError, match=words):
        call(want, judges)


def test_hidden_attributes_leave_the_mask_alone_and_a_probe_finds_nothing_in_strangers(want):
    attrs = want.attrs.clone()
    attrs[:, HIDDEN] = 1 - attrs[:, HIDDEN]
    again = render_faces(attrs, size=32, seed=5)
    assert torch.equal(again.mask, want.mask) and not torch.equal(again.image, want.image)
    faces = render_faces(n=600, size=32, seed=1)
    leakage = controllability.mask_leakage(faces.mask, faces.attrs)
    none = controllability.mask_leakage(faces.mask, faces.attrs.roll(300, 0))
    assert leakage[ATTRIBUTES.index('Eyeglasses')] > .95 and leakage.nanmean() > .68
    assert abs(none.nanmean() - .5) < .05
