"""Networks kept in git: the same faces after keeping, nothing left when refused, cards that say what results say."""
import json

import pytest
import torch

from facegen.conditioning.conditional_unet import load_denoiser, make_denoiser, saved_autoencoder, saved_pipeline
from facegen.conditioning.pipeline import FacePipeline, load_pipeline
from facegen.core import root, save_result, seed_all
from facegen.diffusion.samplers import make_sampler, sample
from facegen.diffusion.schedules import make_scheduler
from facegen.models.latents import make_autoencoder
from facegen.study import weights

torch.set_num_threads(1)
RUN, PIXELS, VAE, JUDGE = 'longer-laptop-s0', 'pixels-laptop-s0', 'autoencoder-laptop-s0', 'parser32-laptop-s0'
PARAMS = dict(faces='toy', n_faces=2000, trained_on=1200, size=32, steps=70, batch=9, seed=0, optimizer='muon')
GUIDED = PARAMS | dict(sampler='dpm++', sampling_steps=10, attrs_scale=2., mask_scale=3., guidance_interval='0.2 0.8')
RECORD = dict(metric='kid', value=.1234, low=.1111, high=.2222, n=77, chance=None, reference=.0321, upper=.0456,
              recon=None, headline=True, network='classifier')


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_OUT', raising=False)
    return tmp_path.resolve()


def make_pipeline(latent=True):
    seed_all(0)
    vae = make_autoencoder((8, 16), codes=64).eval() if latent else None
    sampler = make_sampler('dpm++', make_scheduler(prediction='flow'))
    denoiser = make_denoiser('smoke_latent' if latent else 'smoke', 'spatial', 32)
    return FacePipeline(denoiser, sampler, vae, latent_scale=.7, attrs_scale=2., guidance_interval=(.2, .8))


def finished(home, run=RUN, latent=True, **result):
    "A run with its pipeline and result, and a kept autoencoder where it works in latents"
    pipe = make_pipeline(latent)
    pipe.save_pretrained(home/'data/runs'/run/'pipeline')
    if latent:
        pipe.autoencoder.save_pretrained(home/'data/weights'/VAE/'autoencoder')
    save_result(run, GUIDED, [RECORD | result])
    return pipe


def generate(pipe, **keys):
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe({'Smiling': 1}, n=2, steps=4, generator=seeds, **keys)


@pytest.mark.parametrize('run,latent', [(RUN, True), (PIXELS, False)])
def test_a_kept_pipeline_draws_the_same_faces_up_to_half_precision(run, latent, home):
    pipe = finished(home, run, latent)
    was = generate(pipe)
    kept = weights.keep_weights(run)
    assert kept == home/'data/weights'/run and (kept/'pipeline/autoencoder.txt').exists() == latent
    assert not (kept/'pipeline/autoencoder').exists(), 'named, not copied'
    size = lambda folder: (folder/'pipeline/denoiser/diffusion_pytorch_model.safetensors').stat().st_size
    assert size(kept) < .55*size(home/'data/runs'/run)
    again = load_pipeline(run)
    assert again.denoiser.dtype == torch.float32 and tuple(again.config.guidance_interval) == (.2, .8)
    assert again.config.latent_scale == pipe.config.latent_scale and again.config.attrs_scale == 2.
    assert 0 < (generate(again) - was).abs().max() < .03
    for a, b in zip(pipe.denoiser.parameters(), again.denoiser.parameters()):
        assert torch.equal(a.half().float(), b)
    if latent:
        for a, b in zip(pipe.autoencoder.parameters(), again.autoencoder.parameters()):
            assert torch.equal(a, b), 'an autoencoder is not rounded'


def test_kept_weights_come_before_those_of_a_run_and_a_folder_before_both(home, tmp_path):
    finished(home)
    assert saved_pipeline(RUN) == home/'data/runs'/RUN/'pipeline'
    assert saved_autoencoder(saved_pipeline(RUN)) is not None, 'a run holds its autoencoder'
    weights.keep_weights(RUN)
    assert saved_pipeline(RUN) == home/'data/weights'/RUN/'pipeline'
    elsewhere = tmp_path/'elsewhere'
    make_pipeline().save_pretrained(elsewhere)
    assert saved_pipeline(elsewhere) == elsewhere
    assert torch.equal(generate(load_pipeline(elsewhere)), generate(make_pipeline()))
    with pytest.raises(FileNotFoundError, match='no pipeline at attrs-laptop-s0 or .*facegen launch attrs-laptop-s0'):
        load_pipeline('attrs-laptop-s0')


@pytest.mark.parametrize('latent', [True, False])
def test_sampling_by_hand_is_what_the_pipeline_does(latent, home, monkeypatch):
    "The parts that a chapter takes one by one, and the pipeline that holds them"
    finished(home, RUN if latent else PIXELS, latent)
    run, side, channels = (RUN, 8, 3) if latent else (PIXELS, 32, 3)
    denoiser, to_faces = load_denoiser(run)
    pipe = load_pipeline(run)
    noise = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr('facegen.conditioning.pipeline.randn_tensor', lambda *a, **k: noise)
    monkeypatch.setattr('facegen.diffusion.samplers.torch.randn', lambda *a, **k: noise[next(rows)])
    rows = iter(range(2))
    by_hand = to_faces(sample(denoiser, make_sampler('dpm++', make_scheduler(prediction='flow')), 2, side, 4))
    assert torch.allclose(by_hand, pipe(n=2, steps=4, attrs_scale=1., mask_scale=1.), atol=1e-5)


def test_a_network_that_is_too_large_is_refused_and_leaves_nothing(home, monkeypatch):
    finished(home)
    monkeypatch.setattr(weights, 'MOST', (3e6, 1e5))
    with pytest.raises(ValueError, match=r'longer-laptop-s0/pipeline has [\d.]+ MB in half precision: '
                                         r'a denoiser in git may have 0.1'):
        weights.keep_weights(RUN)
    assert not (home/'data/weights'/RUN).exists()
    judge = home/'data/runs'/JUDGE/'judge'
    judge.mkdir(parents=True)
    (judge/'config.json').write_bytes(b'x'*3_100_000)
    save_result(JUDGE, PARAMS, [RECORD])
    with pytest.raises(ValueError, match=r'parser32-laptop-s0/judge has 3.1 MB: weights in git may have 3'):
        weights.keep_weights(JUDGE)
    assert not (home/'data/weights'/JUDGE).exists()


def test_without_a_network_or_a_result_nothing_is_kept(home):
    with pytest.raises(FileNotFoundError, match='holds no saved network: run `facegen launch longer-laptop-s0` first'):
        weights.keep_weights(RUN)
    finished(home)
    (home/'data/results'/f'{RUN}.json').unlink()
    with pytest.raises(FileNotFoundError, match='no result at'):
        weights.keep_weights(RUN)
    assert not (home/'data/weights'/RUN).exists()


def test_a_card_says_the_numbers_of_the_result(home):
    finished(home, recon=.0789)
    card = (weights.keep_weights(RUN)/'README.md').read_text()
    assert card == weights.model_card(RUN) and card.startswith(f'# {RUN}\n\nA conditional denoiser, trained by')
    assert '| kid | 0.123 | 0.111 to 0.222 | 0.032 | 0.079 | 77 |' in card, 'the mark after the autoencoder'
    assert '1,200 rendered faces, 32 px' in card and '70 steps of 9 faces, muon, seed 0' in card
    assert '10 steps of dpm++; guidance 2 (attributes) and 3 (mask) at t/T from 0.2 to 0.8' in card
    save_result(JUDGE, PARAMS, [RECORD, RECORD | dict(metric='hidden', headline=False), RECORD | dict(recon=0.)])
    card = weights.model_card(JUDGE)
    assert '| 0.032 | 0.046 | 77 |' in card and '| 0.032 | 0.000 | 77 |' in card
    assert 'hidden' not in card and 'sampling' not in card
    assert max(map(len, card.splitlines())) <= 120


def kept(): return sorted(p for p in (root()/'data'/'weights').iterdir() if p.is_dir())


def test_the_cards_in_git_are_those_of_the_results():
    assert len(kept()) >= 6
    for folder in kept():
        assert (folder/'README.md').read_text() == weights.model_card(folder.name), folder.name


def test_kept_pipelines_name_a_kept_autoencoder_and_open():
    names = [p.name for p in kept() if (p/'pipeline').is_dir()]
    assert RUN in names
    for name in names:
        pipe = load_pipeline(name)
        assert pipe.denoiser.dtype == torch.float32
        index = json.loads((root()/'data/weights'/name/'pipeline/model_index.json').read_text())
        assert index['latent_scale'] == pipe.config.latent_scale > 0
