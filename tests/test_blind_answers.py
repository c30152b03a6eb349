"""Blind answers: tables find what a search by hand finds, forget nothing they know, and score what others measured."""
import time

import numpy as np
import pytest
import torch
from conftest import run_cells
from oracle import LookupJudge, find, rand

from facegen.conditioning.condition_encoders import CONDITIONINGS
from facegen.core import load_result, record_problems
from facegen.data.faces import Face, load_faces, prepare, split
from facegen.data.parsed_masks import fix_left_right
from facegen.evaluation import blind_answers as ba
from facegen.evaluation.controllability import image_miou
from facegen.evaluation.metrics import confusion, iou
from facegen.synthetic.toyfaces import pack_toyfaces, render_faces
from facegen.training.config import InMemoryFaces

MASKS = ['miou', 'miou_per_image', 'pixel_accuracy', 'boundary_f1']


pytestmark = pytest.mark.usefixtures('few_resamples')


@pytest.fixture(scope='module')
def train(): return InMemoryFaces(render_faces(n=400, size=32, seed=1))


@pytest.fixture(scope='module')
def requested(): return render_faces(n=48, size=32, seed=5)


@pytest.fixture(scope='module')
def judges(train, requested):
    "A parser that is off by a pixel, a classifier that errs in a tenth of its answers"
    image, attrs, mask = (torch.cat([a, b]) for a, b in zip(train.face, requested))
    answers = torch.where(rand(*attrs.shape) < .1, 1 - attrs, attrs)*2 - 1
    return LookupJudge(image, mask.roll(1, -1)), LookupJudge(image, answers)


@pytest.fixture(scope='module')
def marks(requested, train, judges): return ba.blind_marks(requested, train, *judges)


def mark(marks, answer, metric, reading='exact'):
    return find([r for r in marks if (r['answer'], r['reading']) == (answer, reading)], metric)


def classes(*shape, seed=0, low=0):
    return torch.randint(low, 19, shape, generator=torch.Generator().manual_seed(seed))


# The commonest mask

def test_the_commonest_mask_has_the_most_pixels_of_any_mask(train):
    m, c = train.face.mask, ba.commonest_mask(train.face.mask)
    agree = (m == c).sum()
    for other in (*m[:20], c.roll(1, 0), *(torch.where(rand(*c.shape, seed=i) < .1, i, c) for i in range(19))):
        assert (m == other).sum() <= agree


def test_unknown_pixels_do_not_vote_and_equal_votes_go_to_the_first_class():
    masks = torch.tensor([[[3, -1, 2]], [[-1, 7, 1]], [[-1, -1, 2]], [[-1, 7, 1]]])
    assert ba.commonest_mask(masks).tolist() == [[3, 7, 1]]
    with pytest.raises(ValueError, match='1 pixels are unknown in all 4 training masks: pack the faces with'):
        ba.commonest_mask(masks.masked_fill(masks == 3, -1))
    with pytest.raises(ValueError, match='in all 0 training masks'):
        ba.commonest_mask(masks[:0])


# Lookups

@pytest.mark.parametrize('k', [1, 7, 64, 65, 1000])
def test_packed_bits_count_as_single_comparisons_do(k):
    q, keys = classes(9, k, low=-1), classes(30, k, seed=1, low=-1)
    assert np.allclose(ba.share_differing(q, keys), (q[:, None] != keys).double().mean(-1))


@pytest.mark.parametrize('block', [1, 13, 1000])
@pytest.mark.parametrize('name', ba.LOOKUPS)
def test_a_lookup_finds_what_a_search_by_hand_finds(requested, train, name, block):
    key = ba.LOOKUPS[name]
    q, keys = key(requested.attrs, requested.mask), key(train.face.attrs, train.face.mask)
    apart = (q[:, None] != keys).float() if name == 'pixels' else (q[:, None].double() - keys.double()).square()
    apart, rows = apart.mean(-1), ba.lookup(q, keys, block=block)
    assert torch.allclose(apart.gather(1, rows[:, None])[:, 0], apart.min(1).values, atol=1e-6)


@pytest.mark.parametrize('name', ba.LOOKUPS)
def test_of_equally_near_faces_the_first_is_taken_whatever_the_block(train, name):
    key = ba.LOOKUPS[name](train.face.attrs, train.face.mask)[:90]
    same = (key[:, None] == key).all(-1)
    first = same.int().argmax(1)
    for block in (1, 17, 90, 512):
        assert torch.equal(ba.lookup(key, key.repeat(3, 1), block=block), first)
    assert torch.equal(ba.lookup(key.flip(0), key, block=17), first.flip(0))


def test_attributes_are_compared_by_hamming_distance_over_those_that_both_know():
    nan = float('nan')
    keys = torch.tensor([[1., 0, 0, 0], [1, 1, nan, nan], [0, 1, 1, nan]])
    assert ba.mean_square(torch.tensor([[1., 1, 1, nan]]), keys)[0] == pytest.approx([2/3, 0, 1/3])
    assert ba.lookup(torch.tensor([[nan, nan, 0, 0]]), keys).tolist() == [0]
    with pytest.raises(ValueError, match='request 1 has nothing in common with any training face'):
        ba.lookup(torch.tensor([[1., 1, 1, nan], [nan]*4]), keys)


def test_unknown_pixels_of_a_request_count_for_nobody():
    keys = classes(40, 256)
    for hidden in (0, 100, 250):
        q = keys.clone()
        q[:, :hidden] = -1
        assert torch.equal(ba.lookup(q, keys), torch.arange(40))


@pytest.mark.parametrize('block', [1, 16, 512])
def test_no_face_answers_itself_when_it_is_left_out(block):
    keys = torch.cat([classes(30, 64), classes(30, 64, seed=1)])
    keys[30:33] = keys[:3]  # twins
    rows = ba.lookup(keys, keys, leave_out=True, block=block)
    assert (rows != torch.arange(60)).all()
    assert rows[:3].tolist() == [30, 31, 32] and rows[30:33].tolist() == [0, 1, 2]


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r'got \(2, 16\) and \(3, 64\): make both in the same way'):
        ba.lookup(classes(2, 16), classes(3, 64))
    with pytest.raises(ValueError, match='no training face to look anything up in'):
        ba.lookup(classes(2, 16), classes(0, 16))


def test_a_full_table_takes_seconds():
    "12,000 masks of 64 px; 32 requests here, 256 in the study"
    q, keys = classes(32, 4096), classes(12000, 4096, seed=1).to(torch.int8)
    keys[7777] = q[5]
    started = time.process_time()
    assert ba.lookup(q, keys)[5] == 7777
    assert time.process_time() - started < 5


# What is known

def test_areas_and_presence_forget_where_things_are_and_nothing_else(requested):
    m = requested.mask
    moved = m.flatten(1)[:, torch.randperm(m[0].numel())].view_as(m)
    counts = torch.stack([x.flatten().bincount(minlength=19) for x in m])
    assert torch.allclose(ba.class_areas(m), counts/m[0].numel()) and torch.equal(ba.class_areas(moved),
                                                                                 ba.class_areas(m))
    assert torch.equal(ba.class_presence(moved), (counts > 0).float())
    assert torch.equal(ba.class_areas(torch.full((2, 8, 8), -1)), torch.zeros(2, 19))


def test_what_is_known_of_the_mask_comes_before_attributes(train):
    "With attributes, presence finds no worse presence than alone; attributes decide among the equals"
    a, m = train.face.attrs, train.face.mask
    other = render_faces(n=60, size=32, seed=8)
    def bits(rows): return (ba.class_presence(other.mask) != ba.class_presence(m[rows])).sum(1)
    def wrong(rows): return (other.attrs != a[rows]).sum(1)
    alone, both = (ba.lookup(k(other.attrs, other.mask), k(a, m)) for k in (ba.LOOKUPS['presence'],
                                                                           ba.LOOKUPS['attributes+presence']))
    assert torch.equal(bits(alone), bits(both))
    assert (wrong(both) <= wrong(alone)).all() and wrong(both).sum() < .7*wrong(alone).sum()


def test_every_way_of_conditioning_has_a_blind_answer_that_knows_what_it_is_given():
    assert ba.BLIND_ANSWERS.keys() == CONDITIONINGS.keys()
    whole = {'tokens', 'grid'}
    for name, given in CONDITIONINGS.items():
        answer = ba.BLIND_ANSWERS[name]
        assert answer in ('commonest', *ba.LOOKUPS)
        assert (answer == 'pixels') == (given['mask'] in whole)
        assert (answer == 'commonest') == (not given['attrs'] and not given['mask'])
        if given['mask'] in ('presence', 'areas'):
            assert answer == f"attributes+{given['mask']}"


# Marks

def test_all_answers_have_all_marks(marks, requested):
    assert [p for i, r in enumerate(marks) for p in record_problems(r, str(i))] == []
    assert {r['n'] for r in marks} == {len(requested.mask)}
    for reading in ('exact', 'judge'):
        for answer in ('commonest', *ba.LOOKUPS):
            for metric in (*MASKS, 'balanced_accuracy', 'balanced_accuracy_hidden'):
                r = mark(marks, answer, metric, reading)
                assert r['low'] <= r['value'] <= r['high'] and (r['upper'] is None) == (reading == 'exact')
    assert len(marks) == 2*7*6


def test_exact_marks_are_those_of_the_mask_that_was_looked_up(marks, requested, train):
    areas = [ba.class_areas(m).sqrt() for m in (requested.mask, train.face.mask)]
    counts = confusion(train.face.mask[ba.lookup(*areas)], requested.mask)
    assert mark(marks, 'areas', 'miou')['value'] == pytest.approx(float(iou(counts).nanmean()))
    assert mark(marks, 'areas', 'miou_per_image')['value'] == pytest.approx(float(image_miou(counts).nanmean()))
    right = (ba.commonest_mask(train.face.mask) == requested.mask).float().mean()
    assert mark(marks, 'commonest', 'pixel_accuracy')['value'] == pytest.approx(float(right))


def test_who_knows_more_answers_better(marks):
    for metric in ('miou', 'miou_per_image', 'boundary_f1'):
        order = [mark(marks, a, metric)['value'] for a in ('commonest', 'attributes', 'areas', 'pixels')]
        assert order == sorted(order), metric
    most = [mark(marks, a, 'balanced_accuracy')['value'] for a in ('commonest', 'presence', 'attributes')]
    assert most[0] == .5 < most[1] < most[2]
    pixels = mark(marks, 'pixels', 'miou')
    assert pixels['value'] > pixels['chance'] + .1


def test_the_commonest_answer_is_half_right_on_attributes_and_shuffling_changes_nothing_in_it(marks):
    for metric in ('balanced_accuracy', 'balanced_accuracy_hidden'):
        r = mark(marks, 'commonest', metric)
        assert r['value'] == r['low'] == r['high'] == r['chance'] == .5
    for metric in ('miou', 'pixel_accuracy'):
        assert mark(marks, 'commonest', metric)['value'] == pytest.approx(mark(marks, 'commonest', metric)['chance'])


def test_a_table_that_has_the_test_faces_is_perfect_and_at_the_upper_mark_when_judged(requested, train, judges):
    "So the two readings differ in the judge alone; an outline may be off by a pixel"
    both = InMemoryFaces(Face(*(torch.cat([a, b]) for a, b in zip(train.face, requested))))
    marks = ba.blind_marks(requested, both, *judges)
    for metric in MASKS:
        assert mark(marks, 'pixels', metric)['value'] == pytest.approx(1)
        r = mark(marks, 'pixels', metric, 'judge')
        assert r['value'] == pytest.approx(r['upper']) and (r['upper'] < .95 or metric == 'boundary_f1')
    r = mark(marks, 'pixels', 'balanced_accuracy', 'judge')
    assert r['value'] == r['upper'] < 1


def test_a_judge_that_never_errs_reads_what_stands_in_the_table(requested, train):
    image, attrs, mask = (torch.cat([a, b]) for a, b in zip(train.face, requested))
    marks = ba.blind_marks(requested, train, LookupJudge(image, mask), LookupJudge(image, 2*attrs - 1))
    for name in ba.LOOKUPS:  # the commonest mask belongs to nobody: there the nearest face to it is read
        for metric in (*MASKS, 'balanced_accuracy'):
            assert mark(marks, name, metric)['value'] == mark(marks, name, metric, 'judge')['value']


def test_without_judges_only_exact_marks_are_made(requested, train, judges):
    assert {r['reading'] for r in ba.blind_marks(requested, train)} == {'exact'}
    judged = [r for r in ba.blind_marks(requested, train, judges[0]) if r['reading'] == 'judge']
    assert {r['metric'] for r in judged} == set(MASKS)


def test_masks_that_do_not_fit_or_are_unknown_are_refused(requested, train):
    small = render_faces(n=4, size=16, seed=5)
    with pytest.raises(ValueError, match=r'requested masks are \(16, 16\) and training masks \(32, 32\): pack both'):
        ba.blind_marks(small, train)
    unknown = train.face.mask[:6].clone()
    unknown[2:4, 0, 0] = -1
    holes = InMemoryFaces(Face(train.face.image[:6], train.face.attrs[:6], unknown))
    with pytest.raises(ValueError, match='2 of 6 training masks have unknown pixels'):
        ba.blind_marks(requested, holes)


def test_what_must_be_beaten_is_the_better_of_two_answers(marks):
    assert ba.blind_mark(marks, 'spatial', 'miou')['answer'] == 'pixels'
    assert ba.blind_mark(marks, 'uncond', 'balanced_accuracy', 'exact')['value'] == .5
    own = mark(marks, 'attributes', 'pixel_accuracy')['value']
    better = ba.blind_mark(marks, 'attrs', 'pixel_accuracy', 'exact')
    assert better['value'] >= own and better['answer'] == 'commonest'
    with pytest.raises(ValueError, match="no blind answer is known for 'clip': choose one of uncond, attrs"):
        ba.blind_mark(marks, 'clip', 'miou')
    with pytest.raises(ValueError, match="no blind answer has 'kid' by 'judge'"):
        ba.blind_mark(marks, 'attrs', 'kid')


# The study's marks

def test_the_study_asks_its_first_test_faces_and_looks_in_its_train_split(tmp_path):
    faces = load_faces(pack_toyfaces(tmp_path/'toy', 80, 32, workers=1))
    parts = split(faces)
    marks = ba.study_marks(faces, samples=8)
    want = ba.blind_marks(faces[parts['test'][:8]], InMemoryFaces(faces[parts['train']]))
    assert marks == want
    with pytest.raises(ValueError, match='samples=256 asks for 256 faces, but the test split has 12'):
        ba.study_marks(faces)


def test_the_run_keeps_the_marks_and_no_mark_depends_on_its_seed(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    tiny = dict(n_faces=40, samples=4, n_bootstrap=5)
    said, _ = run_cells('39_blind_answers', **tiny)
    kept = load_result('_smoke-blind')
    assert kept['params']['samples'] == 4 and kept['params']['n_train'] == 24
    assert any('pixels' in line and 'miou' in line for line in said.splitlines())
    for conditioning in CONDITIONINGS:
        for reading in ('exact', 'judge'):
            assert 0 < ba.blind_mark(kept['metrics'], conditioning, 'miou', reading)['value'] < 1
    run_cells('39_blind_answers', **tiny, seed=3)
    assert load_result('_smoke-blind')['metrics'] == kept['metrics']


def test_hand_drawn_masks_score_what_others_measured(real_faces, tmp_path):
    "800 masks of CelebAMask-HQ, each answered by the others; per image over the classes of the requested mask alone"
    faces = fix_left_right(load_faces(prepare(real_faces/'pairs128', tmp_path/'pairs', 64, workers=1)))[0][:]
    areas = ba.class_areas(faces.mask)
    answers = dict(commonest=ba.commonest_mask(faces.mask).expand_as(faces.mask))
    for name, key in dict(areas=areas, pixels=faces.mask.flatten(1)).items():
        answers[name] = faces.mask[ba.lookup(key, key, leave_out=True)]
    want = dict(commonest=(.27, .41), areas=(.32, .37), pixels=(.41, .48))
    for name, answer in answers.items():
        counts = confusion(answer, faces.mask)
        requested_only = torch.where(counts.sum(2) > 0, 1., torch.nan)
        both, either = counts.diagonal(dim1=1, dim2=2), counts.sum(1) + counts.sum(2) - counts.diagonal(dim1=1, dim2=2)
        per_image = (both/either*requested_only).nanmean(1).mean()
        assert (float(iou(counts).nanmean()), float(per_image)) == pytest.approx(want[name], abs=.02), name
    right = (answers['commonest'] == faces.mask).float().mean()
    assert float(right) == pytest.approx(.67, abs=.02)
