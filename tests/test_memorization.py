"""Diversity knows its ends, copies are noticed, and neighbours are those of brute force."""
import numpy as np
import pytest
import torch

from facegen.core import save_result
from facegen.diffusion.losses import diffusion_loss
from facegen.diffusion.schedules import make_scheduler
from facegen.evaluation import memorization
from facegen.evaluation.distances import RandomNetwork, features
from facegen.models.unet import make_unet
from facegen.synthetic.toyfaces import render_faces
from facegen.training.config import InMemoryFaces

N = 96


@pytest.fixture(scope='module')
def faces(): return render_faces(n=N, size=32, seed=5)


def test_diversity_is_nothing_for_equal_and_one_for_unconditional_samples(faces):
    attrs = faces.attrs[:16].repeat_interleave(8, 0)
    same = faces.image[:16, None].expand(-1, 8, -1, -1, -1)
    some = render_faces(attrs, size=32, seed=9).image.unflatten(0, (16, 8))
    uncond = render_faces(n=128, size=32, seed=8).image.unflatten(0, (16, 8))
    same, some, uncond = (memorization.diversity_report(RandomNetwork(), x)[0] for x in (same, some, uncond))
    assert same['value'] == 0 and abs(uncond['value'] - 1) < .05
    assert .05 < some['value'] < uncond['value'] - .05
    assert uncond['n'] == 128 and uncond['low'] <= uncond['value'] <= uncond['high']
    assert (uncond['chance'], uncond['upper']) == (0, 1)


def test_the_reference_leaves_a_face_out_of_both_sets(faces):
    "Where both sets are the same faces nobody is nearer to one of them"
    a, b = (features(render_faces(n=N, size=32, seed=s).image, RandomNetwork()) for s in (6, 7))
    r = {m['metric']: m['reference'] for m in memorization.copy_report(b, a, a)}
    assert r == dict(copy_ratio=1., copy_ratio_low=1., copy_share=.5)


def test_copies_are_noticed_and_new_faces_are_not(faces, tmp_path):
    images = faces.image, *(render_faces(n=N, size=32, seed=s).image for s in (6, 7))
    train, heldout, new = (features(x, RandomNetwork()) for x in images)
    sets = dict(copier=train, new=new, few=torch.cat([train[:N//8], new[N//8:]]))
    r = {name: {m['metric']: m for m in memorization.copy_report(x, train, heldout)} for name, x in sets.items()}
    assert r['copier']['copy_ratio']['value'] < 1e-6 and r['copier']['copy_share']['value'] == 1
    for m in r['new'].values():
        assert abs(m['value'] - m['reference']) < .15
    assert r['few']['copy_ratio']['value'] > .8
    assert r['few']['copy_ratio_low']['value'] < 1e-6 < r['new']['copy_ratio_low']['low']
    save_result(str(tmp_path/'copies.json'), {}, [m for x in r.values() for m in x.values()])


def test_nearest_neighbours_are_those_of_brute_force(faces):
    f = features(faces.image, RandomNetwork())
    d, row = memorization.nearest_neighbours(f, f)
    assert d.max() == 0 and torch.equal(row, torch.arange(N))
    d, row = memorization.nearest_neighbours(f, f, exclude_self=True)
    slow = np.linalg.norm(f.double().numpy()[:, None] - f.double().numpy()[None], axis=2)
    np.fill_diagonal(slow, np.inf)
    assert np.allclose(d, slow.min(1)) and (row.numpy() == slow.argmin(1)).all()


@pytest.mark.parametrize('call, words', [
    (lambda: memorization.diversity_report(RandomNetwork(), torch.zeros(4, 3, 32, 32)), '2 conditions'),
    (lambda: memorization.copy_report(torch.ones(4, 2), torch.ones(5, 2), torch.ones(6, 2)), 'as many'),
    (lambda: memorization.pairwise_distances(torch.ones(4, 2), torch.ones(5, 3)), r'features\('),
])
def test_a_wrong_call_says_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_equal_sets_have_no_gap_and_batches_do_not_matter():
    rendered = InMemoryFaces(render_faces(n=12, size=16, seed=5))
    loss, model = diffusion_loss(make_scheduler(prediction='sample')), make_unet('smoke', 16)
    errors = memorization.denoising_errors(model, loss, rendered, repeats=2)
    assert torch.allclose(errors, memorization.denoising_errors(model, loss, rendered, repeats=2, batch=5), atol=1e-6)
    *_, gap = memorization.gap_report(errors, errors)
    assert gap['metric'] == 'generalization_gap' and gap['value'] == 0
    with pytest.raises(ValueError, match='as many of both'):
        memorization.gap_report(errors, errors[:5])
