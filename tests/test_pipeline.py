"""The pipeline: whole after saving, names before positions, one denoise loop for four ways of use, clear refusals."""
import json, os, subprocess, sys

import pytest
import torch
from diffusers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from facegen.conditioning import pipeline
from facegen.conditioning.conditional_unet import make_denoiser
from facegen.core import seed_all
from facegen.data.faces import ATTRIBUTES
from facegen.models.latents import make_autoencoder
from facegen.diffusion.schedules import make_scheduler
from facegen.conditioning.pipeline import FacePipeline, as_cond, load_pipeline
from facegen.diffusion.samplers import PROCESS_SAMPLERS, SAMPLERS, make_sampler
from facegen.conditioning.condition_encoders import CONDITIONINGS
from facegen.synthetic.toyfaces import render_faces

torch.set_num_threads(1)
disable_progress_bar()
NOISE = make_scheduler(prediction='sample')
INPAINT = torch.zeros(32, 32, dtype=torch.bool)
INPAINT[9:22, 5:18] = True


@pytest.fixture(scope='module')
def face(): return render_faces(n=8, size=32, seed=5)


def fresh(conditioning='spatial', sampler='dpm++', **changes):
    seed_all(0)
    return FacePipeline(make_denoiser('smoke', conditioning, 32, **changes), make_sampler(sampler, NOISE))


def latent(sampler='dpm++'):
    seed_all(0)
    vae = make_autoencoder((8, 16), codes=64).eval()
    denoiser, sampler = make_denoiser('smoke_latent', 'spatial', 32), make_sampler(sampler, NOISE)
    return FacePipeline(denoiser, sampler, vae, latent_scale=.7)


@pytest.fixture(scope='module')
def pixels(): return fresh()


@pytest.fixture(scope='module')
def latents(): return latent()


def generate(pipe, n=2, steps=5, seed=0, **keys):
    seeds = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    return pipe(n=n, steps=steps, **{'generator': seeds, **keys})
def both(test): return pytest.mark.parametrize('kind', ['pixels', 'latents'])(test)


# Saved and loaded

@pytest.mark.parametrize('conditioning', [*CONDITIONINGS, 'latent'])
def test_saved_and_loaded_it_generates_the_same_bits(conditioning, tmp_path, face):
    pipe = latent() if conditioning == 'latent' else fresh(conditioning)
    keys = dict(attrs=face.attrs[:2], mask=face.mask[:2], attrs_scale=2., mask_scale=1.5)
    was = generate(pipe, **keys)
    pipe.save_pretrained(tmp_path)
    again = FacePipeline.from_pretrained(tmp_path)
    assert torch.equal(generate(again, **keys), was) and again.config.latent_scale == pipe.config.latent_scale
    assert (again.autoencoder is None) == (conditioning != 'latent')
    assert {p.suffix for p in tmp_path.rglob('*') if p.is_file()} == {'.json', '.safetensors'}, 'no pickles'


SCRIPT = """
import sys, torch
from facegen.conditioning.pipeline import FacePipeline
torch.set_num_threads(1)
pipe = FacePipeline.from_pretrained(sys.argv[1])
seeds = [torch.Generator().manual_seed(i) for i in range(2)]
torch.save(pipe(n=2, steps=5, attrs={'Smiling': 1, 'Eyeglasses': 0}, generator=seeds), sys.argv[2])
"""


def test_in_a_fresh_process_too(tmp_path, latents):
    latents.save_pretrained(tmp_path/'pipe')
    (tmp_path/'sample.py').write_text(SCRIPT)
    path = os.pathsep.join(p for p in sys.path if p)
    here = os.environ | {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': path}
    subprocess.run([sys.executable, tmp_path/'sample.py', tmp_path/'pipe', tmp_path/'x.pt'],
                   check=True, cwd=tmp_path, env=here, timeout=120, capture_output=True)
    assert torch.equal(torch.load(tmp_path/'x.pt'), generate(latents, attrs={'Smiling': 1, 'Eyeglasses': 0}))


def test_every_trained_parameter_is_in_what_is_saved(tmp_path):
    for name, pipe in (('pixels', fresh('described')), ('latents', latent())):
        pipe.save_pretrained(tmp_path/name)
        again = FacePipeline.from_pretrained(tmp_path/name)
        for part in ('denoiser', *(['autoencoder'] if name == 'latents' else [])):
            a, b = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_autoencoder_must_be_the_denoisers():
    seed_all(0)
    vae = make_autoencoder((8, 16), codes=64)
    small, large = make_denoiser('smoke_latent', 'attrs', 32), make_denoiser('smoke', 'attrs', 32)
    for parts, words in (((small, None), 'downsampled by 4, the autoencoder downsamples by 1'),
                         ((large, vae), 'downsampled by 1, the autoencoder downsamples by 4')):
        with pytest.raises(ValueError, match=words):
            FacePipeline(parts[0], make_sampler('dpm++', NOISE), parts[1])


def test_loading_is_quiet_and_leaves_progress_bars_as_they_were(tmp_path, pixels, capfd):
    pixels.save_pretrained(tmp_path)
    for switch in (enable_progress_bar, disable_progress_bar):
        switch()
        on = is_progress_bar_enabled()
        again = load_pipeline(tmp_path)
        assert is_progress_bar_enabled() == on == (switch is enable_progress_bar)
        generate(again)
        assert capfd.readouterr() == ('', '')
    assert torch.equal(generate(again), generate(pixels))


# What people write

def test_names_reach_their_columns_in_the_order_of_the_file():
    for i, name in enumerate(ATTRIBUTES):
        for value in (0, 1):
            c = as_cond({name: value}, None, 3, 8)
            known = ~c.attrs.isnan()
            assert known.sum(1).tolist() == [1, 1, 1] and known[:, i].all() and (c.attrs[:, i] == value).all()
    assert as_cond(None, None, 2, 8).attrs.isnan().all() and as_cond({}, None, 2, 8).attrs.isnan().all()
    assert (as_cond({}, None, 2, 8).mask == -1).all()


def test_many_ways_to_say_the_same(face, pixels):
    names = [{'Male': 1, 'Bald': 0}, {'Smiling': 1}]
    rows = torch.full((2, 40), torch.nan)
    rows[0, ATTRIBUTES.index('Male')] = 1
    rows[0, ATTRIBUTES.index('Bald')] = 0
    rows[1, ATTRIBUTES.index('Smiling')] = 1
    assert torch.equal(generate(pixels, attrs=names), generate(pixels, attrs=rows))
    assert torch.equal(generate(pixels, attrs=names[0]), generate(pixels, attrs=[names[0]]*2))
    one = face.mask[0]
    assert torch.equal(generate(pixels, mask=one), generate(pixels, mask=one.numpy()))
    assert torch.equal(generate(pixels, mask=one), generate(pixels, mask=one.expand(2, -1, -1)))
    assert torch.equal(generate(pixels, mask=torch.full((32, 32), -1)), generate(pixels))
    assert not torch.equal(generate(pixels, mask=one), generate(pixels))
    assert not torch.equal(generate(pixels, attrs=names), generate(pixels))
    x = generate(pixels)
    assert x.shape == (2, 3, 32, 32) and x.dtype == torch.float32 and x.abs().max() <= 1
    y = generate(pixels, output_type='np')
    assert y.shape == (2, 32, 32, 3) and str(y.dtype).endswith('uint8')


BLANK = torch.zeros(3, 32, 32)
REFUSED = [
    (dict(attrs={'Smilling': 1}), "no attribute is called 'Smilling'.*did you mean 'Smiling'"),
    (dict(attrs={'Male': -1}), 'Male is -1: write 1 for present'),
    (dict(negative_cond={'Beard': 1}), "did you mean 'No_Beard'"),
    (dict(attrs='Smiling'), "attributes must be a dict like.*got 'Smiling'"),
    (dict(attrs=torch.zeros(39)), r'got shape \(39,\)'),
    (dict(attrs=torch.full((40,), -1.)), 'CelebA writes -1 for absent'),
    (dict(attrs=[]), r'got \[\]'),
    (dict(attrs=[{}, {}, {}]), '3 attributes for 2 faces: give one for all, or one each'),
    (dict(n=0, generator=None), 'n=0: ask for one face or more'),
    (dict(mask=torch.full((32, 32), 19)), 'the mask holds class 19'),
    (dict(mask=torch.full((32, 32), -2)), 'the mask holds class -2'),
    (dict(mask=torch.zeros(64, 64)), 'the mask has 64x64 px, the faces have 32'),
    (dict(mask=torch.full((32, 32), .5)), 'whole class numbers'),
    (dict(mask=torch.zeros(1, 2, 32, 32)), r'whole class numbers, \(H,W\) or \(B,H,W\)'),
    (dict(mask=torch.zeros(3, 32, 32)), '3 masks for 2 faces'),
    (dict(inpaint_mask=INPAINT), 'an inpainting mask needs the image'),
    (dict(image=torch.zeros(3, 64, 64)), 'the image has 64x64 px, the pipeline generates 32'),
    (dict(image=torch.zeros(3, 3, 32, 32)), 'give one .3,H,W. for all, or one each'),
    (dict(image=BLANK + 255), 'holds 255 to 255'),
    (dict(image=BLANK.to(torch.uint8)), r'float, in \[-1,1\]'),
    (dict(image=torch.full((3, 32, 32), torch.nan)), 'the image holds nan'),
    (dict(image=BLANK, inpaint_mask=INPAINT[:8]), r'the inpainting mask has shape \(8, 32\)'),
    (dict(strength=1.4), 'strength 1.4 must lie between 0'),
    (dict(steps=1001), 'steps=1001: take a whole number from 1 to 1000'),
    (dict(interval=(.8, .1)), 'low first'),
    (dict(output_type='pil'), "unknown output_type 'pil'"),
    (dict(n=3, generator=[torch.Generator()]*2), '2 generators for 3 faces'),
    (dict(interpolate_to=({'Male': 1}, None)), r'interpolate_to needs \(attrs, mask, share')]


@pytest.mark.parametrize('keys,words', REFUSED, ids=lambda x: ' '.join(x) if isinstance(x, dict) else '')
def test_what_does_not_fit_gets_a_sentence(pixels, keys, words):
    with pytest.raises(ValueError, match=words):
        generate(pixels, **keys)


def test_an_unknown_word_is_an_error(pixels):
    with pytest.raises(TypeError, match='smiling'):
        generate(pixels, smiling=1)


# Other processes: a flow and EDM

PROCESSES = [(kind, name) for kind, names in PROCESS_SAMPLERS.items() for name in names]


def process(kind, name='dpm++', **keys):
    seed_all(0)
    noise = make_scheduler(prediction=kind)
    return FacePipeline(make_denoiser('smoke', 'spatial', 32), make_sampler(name, noise), **keys)


def exact(kind, image):
    "A denoiser that knows the face: the answer that leads from any x to it"
    noise = make_scheduler(prediction=kind)
    def model(x, t, cond=None):
        x0 = image.repeat(len(x)//len(image), 1, 1, 1)
        x = x/noise.scale_model_input(torch.ones_like(x), t)
        alpha, sigma = noise.signal_and_noise(t, x)
        return noise.get_velocity(x0, (x - alpha*x0)/sigma, t)
    return model


@pytest.mark.parametrize('kind,name', PROCESSES)
def test_other_processes_are_whole_after_saving(kind, name, tmp_path, face):
    pipe = process(kind, name)
    keys = dict(attrs=face.attrs[:2], mask=face.mask[:2], attrs_scale=2., mask_scale=1.5, steps=7)
    was = generate(pipe, **keys)
    pipe.save_pretrained(tmp_path)
    again = FacePipeline.from_pretrained(tmp_path)
    assert torch.equal(generate(again, **keys), was) and type(again.scheduler) is type(pipe.scheduler)
    assert was.isfinite().all() and torch.equal(generate(pipe, **keys), was), 'a second call starts anew'


@pytest.mark.parametrize('kind,name', PROCESSES)
def test_image_to_image_and_inpainting_in_other_processes(kind, name, face):
    pipe, image = process(kind, name), face.image[2:4]
    assert torch.equal(generate(pipe, image=image, strength=0.), image)
    assert torch.equal(generate(pipe, image=image, strength=1.), generate(pipe)), 'the image is forgotten'
    out = generate(pipe, image=image, inpaint_mask=INPAINT)
    assert torch.equal(out[..., ~INPAINT], image[..., ~INPAINT])
    assert not torch.equal(out[..., INPAINT], image[..., INPAINT])
    assert torch.equal(generate(pipe, image=image, inpaint_mask=torch.ones_like(INPAINT)), generate(pipe))
    pipe.denoiser.forward = exact(kind, image)
    for strength in (.2, .6, 1.):
        assert (generate(pipe, steps=10, image=image, strength=strength) - image).abs().max() < .02
    inpainted = generate(pipe, steps=10, image=image, inpaint_mask=INPAINT)
    assert (inpainted - image).abs().max() < .02, 'what is put back has the noise of its step'


@pytest.mark.parametrize('kind', PROCESS_SAMPLERS)
def test_image_to_image_starts_at_the_noise_of_the_process(kind, face):
    pipe, image, seen, noise = process(kind), face.image[2:4], [], make_scheduler(prediction=kind)
    def spy(x, t, cond=None):
        seen.append((x, t))
        return exact(kind, image)(x, t)
    pipe.denoiser.forward = spy
    generate(pipe, steps=10, image=image, strength=.6)
    x, t = seen[0]
    eps = torch.cat([torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.allclose(x, noise.scale_model_input(noise.add_noise(image, eps, t), t), atol=1e-4)
    if kind == 'flow':
        assert t.tolist() == [600, 600]
        assert torch.allclose(x, .4*image + .6*eps, atol=1e-4), 'the straight line between face and noise'


@pytest.mark.parametrize('kind', PROCESS_SAMPLERS)
def test_interpolation_in_other_processes(kind, face):
    pipe = process(kind)
    a, b = (dict(attrs=face.attrs[i:i + 2], mask=face.mask[i:i + 2]) for i in (0, 4))
    towards = lambda w: generate(pipe, **a, interpolate_to=(*b.values(), w))
    assert torch.allclose(towards(0.), generate(pipe, **a), atol=1e-5)
    assert torch.allclose(towards(1.), generate(pipe, **b), atol=1e-5)


# Random numbers

@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_face_depends_on_its_own_generator_and_not_on_its_batch(sampler, face):
    pipe = fresh(sampler=sampler)
    keys = lambda i: dict(attrs=face.attrs[i], mask=face.mask[i])
    whole = generate(pipe, 3, **keys(slice(3)))
    for i in range(3):
        assert torch.allclose(generate(pipe, 1, seed=i, **keys(slice(i, i + 1))), whole[i:i + 1], atol=1e-4)
    assert torch.equal(generate(pipe, 3, **keys(slice(3))), whole), 'a second call starts anew'
    noise = lambda g: generate(pipe, 2, generator=g)
    a = noise(torch.Generator().manual_seed(1))
    assert torch.equal(a, noise(torch.Generator().manual_seed(1)))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a, noise(torch.Generator().manual_seed(2)))


def test_without_generators_no_two_calls_and_no_two_faces_share_their_noise(monkeypatch, pixels):
    seen = []
    def loop(model, scheduler, x0, noise, *rest):
        seen.append(noise)
        return noise
    monkeypatch.setattr(pipeline, 'denoise_loop', loop)
    for n in (4, 4, 2):
        pixels(n=n, steps=2)
    assert len({x.numpy().tobytes() for x in torch.cat(seen)}) == 10


def test_a_network_left_in_training_mode_generates_without_dropout():
    pipe = fresh('described')
    pipe.denoiser.train()
    faces = generate(pipe)
    assert torch.equal(faces, generate(pipe)) and pipe.denoiser.training
    pipe.denoiser.eval()
    assert torch.equal(faces, generate(pipe))


# Image-to-image, inpainting, interpolation

@both
def test_strength_has_its_limits(kind, request, face):
    pipe, image = request.getfixturevalue(kind), face.image[2:4]
    assert torch.equal(generate(pipe, image=image, strength=0.), image)
    assert torch.equal(generate(pipe, image=image, strength=1.), generate(pipe)), 'the image is forgotten'
    calls = []
    for strength, want in ((0., 0), (.2, 2), (.5, 5), (1., 10)):
        calls.clear()
        log = lambda p, i, t, k: calls.append(i)
        generate(pipe, steps=10, image=image, strength=strength, callback_on_step_end=log)
        assert calls == list(range(10 - want, 10))
    one_for_all = generate(pipe, image=image[0], strength=.4)
    assert torch.equal(generate(pipe, image=image[:1], strength=.4), one_for_all)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_image_to_image_starts_with_the_noise_that_belongs_there(sampler, face):
    "A denoiser that knows the answer brings the image back from any strength"
    pipe, image = fresh(sampler=sampler), face.image[2:4]
    pipe.denoiser.forward = lambda x, t, cond=None: image.repeat(len(x)//2, 1, 1, 1)
    for strength in (.2, .6, 1.):
        assert (generate(pipe, steps=10, image=image, strength=strength) - image).abs().max() < .02
    seen = []
    def spy(x, t, cond=None):
        seen.append((x[:2], int(t[0])))
        return image.repeat(len(x)//2, 1, 1, 1)
    pipe.denoiser.forward = spy
    generate(pipe, steps=10, image=image, strength=.6)
    x, t = seen[0]
    a = NOISE.alphas_cumprod[t]
    noise = torch.cat([torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.allclose(x, a.sqrt()*image + (1 - a).sqrt()*noise, atol=1e-4)


@both
@pytest.mark.parametrize('sampler', SAMPLERS)
def test_outside_an_inpainting_mask_nothing_changes(kind, sampler, face):
    pipe, image = (fresh if kind == 'pixels' else latent)(sampler=sampler), face.image[2:4]
    out = generate(pipe, image=image, inpaint_mask=INPAINT)
    assert torch.equal(out[..., ~INPAINT], image[..., ~INPAINT])
    assert not torch.equal(out[..., INPAINT], image[..., INPAINT])
    assert torch.equal(generate(pipe, image=image, inpaint_mask=torch.zeros_like(INPAINT)), image)
    assert torch.equal(generate(pipe, image=image, inpaint_mask=torch.ones_like(INPAINT)), generate(pipe))
    weak = generate(pipe, image=image, inpaint_mask=INPAINT.float(), strength=.1)
    assert torch.equal(weak, out), 'generated anew whatever the strength'


@both
def test_interpolation_between_two_conditions(kind, request, face):
    pipe = request.getfixturevalue(kind)
    a, b = (dict(attrs=face.attrs[i:i + 2], mask=face.mask[i:i + 2]) for i in (0, 4))
    towards = lambda w: generate(pipe, **a, interpolate_to=(*b.values(), w))
    assert torch.allclose(towards(0.), generate(pipe, **a), atol=1e-5)
    assert torch.allclose(towards(1.), generate(pipe, **b), atol=1e-5)
    if kind == 'pixels':
        d = lambda w, x: (towards(w) - generate(pipe, **x)).norm()
        assert 0 < d(.25, a) < d(.5, a) < d(.75, a) and 0 < d(.75, b) < d(.5, b) < d(.25, b)
        named = generate(pipe, attrs={'Male': 1}, interpolate_to=({'Male': 0}, None, 1.))
        assert torch.allclose(named, generate(pipe, attrs={'Male': 0}), atol=1e-5)


# Guidance and callbacks

def test_a_negative_condition_changes_faces_where_guidance_is_on(pixels):
    away = dict(negative_cond={'Male': 1})
    def plain(scale, **keys): return generate(pixels, attrs={'Smiling': 1}, attrs_scale=scale, mask_scale=1., **keys)
    assert not torch.equal(plain(3.), plain(3., **away)) and torch.equal(plain(1.), plain(1., **away))
    cancelled = plain(4., negative_cond={'Smiling': 1})
    assert torch.allclose(cancelled, plain(1.), atol=1e-4), 'leading away from what is asked for cancels'
    assert torch.equal(plain(3., negative_cond={}), plain(3.)) and torch.equal(plain(3., interval=(0., 0.)), plain(1.))


def test_two_scales_cost_one_call_a_step(pixels, monkeypatch):
    sizes, forward = [], type(pixels.denoiser).forward
    def counted(self, x, t, cond=None):
        sizes.append(len(x))
        return forward(self, x, t, cond)
    monkeypatch.setattr(type(pixels.denoiser), 'forward', counted)
    for scales, want in (((1., 1.), 2), ((3., 3.), 4), ((3., 2.), 6)):
        sizes.clear()
        generate(pixels, attrs={'Male': 1}, attrs_scale=scales[0], mask_scale=scales[1])
        assert sizes == [want]*5


def passes_by_timestep(pipe, **keys):
    "Timestep -> faces that went through the network in that step"
    counts, forward = {}, pipe.denoiser.forward
    def counted(x, t, cond=None):
        assert int(t[0]) not in counts, 'one call a step'
        counts[int(t[0])] = len(x)
        return forward(x, t, cond)
    pipe.denoiser.forward = counted
    generate(pipe, steps=10, attrs={'Male': 1}, attrs_scale=3., mask_scale=2., **keys)
    del pipe.denoiser.forward
    return counts


@pytest.mark.parametrize('kind', ['sample', 'flow', 'edm'])
def test_a_guidance_interval_is_a_share_of_the_timesteps_and_saves_passes(kind):
    "Two faces: 6 rows where guidance is on, 2 where it is off; in a flow t/T is its time"
    seed_all(0)
    sampler = make_sampler('dpm++', make_scheduler(prediction=kind), 'trailing')
    pipe = FacePipeline(make_denoiser('smoke', 'spatial', 32), sampler, guidance_interval=(.2, .8))
    counts = passes_by_timestep(pipe)
    assert len(counts) == 10 and all(n == (6 if 200 <= t <= 800 else 2) for t, n in counts.items())
    assert set(counts.values()) == {2, 6}
    assert set(passes_by_timestep(pipe, interval=(0., 1.)).values()) == {6}, 'a call may override it'
    assert set(passes_by_timestep(pipe, interval=(0., 0.)).values()) == {2}


def test_the_guidance_interval_is_saved(tmp_path, pixels):
    pipe = process('flow', guidance_interval=(.2, .8), attrs_scale=3., mask_scale=2.)
    pipe.save_pretrained(tmp_path)
    again = FacePipeline.from_pretrained(tmp_path)
    named = dict(attrs={'Male': 1})
    assert tuple(again.config.guidance_interval) == (.2, .8)
    assert torch.equal(generate(again, **named), generate(pipe, **named))
    assert not torch.equal(generate(again, **named), generate(again, **named, interval=(0., 1.)))
    assert tuple(pixels.config.guidance_interval) == (0., 1.)
    with pytest.raises(ValueError, match=r'interval \(0.8, 0.2\) must be two shares between 0 and 1, low first'):
        process('flow', guidance_interval=(.8, .2))


def test_pipelines_saved_before_there_was_an_interval_are_guided_always(tmp_path, pixels):
    pixels.save_pretrained(tmp_path)
    index = json.loads((tmp_path/'model_index.json').read_text())
    del index['guidance_interval']
    (tmp_path/'model_index.json').write_text(json.dumps(index))
    again = FacePipeline.from_pretrained(tmp_path)
    keys = dict(attrs={'Male': 1}, attrs_scale=3.)
    assert tuple(again.config.guidance_interval) == (0., 1.)
    assert torch.equal(generate(again, **keys), generate(pixels, **keys))


def test_in_half_precision_it_draws_nearly_the_same(monkeypatch, pixels):
    from facegen.diffusion import samplers
    monkeypatch.setattr(samplers, 'precision_on', lambda where, precision: precision)
    full, half = generate(pixels), generate(pixels, precision='bf16')
    assert half.dtype == torch.float32 and not torch.equal(full, half) and (full - half).abs().mean() < .02
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        generate(pixels, precision='half')


def test_a_callback_is_called_once_a_step_and_may_change_latents(pixels, latents):
    for pipe in (pixels, latents):
        log = []
        def look(p, i, t, kwargs):
            log.append((p is pipe, i, int(t), kwargs['latents'].shape))
            return kwargs
        same = generate(pipe, callback_on_step_end=look)
        assert torch.equal(same, generate(pipe)), 'who changes nothing changes nothing'
        side = 32//pipe.denoiser.config.downsampling
        assert log == [(True, i, int(t), (2, 3, side, side)) for i, t in enumerate(pipe.scheduler.timesteps)]
        for returns_nothing in (lambda *a: None, lambda *a: {}):
            assert torch.equal(generate(pipe, callback_on_step_end=returns_nothing), generate(pipe))
    def blank_last(pipe, i, t, kwargs): return {'latents': torch.zeros_like(kwargs['latents'])} if i == 4 else {}
    grey = generate(pixels, callback_on_step_end=blank_last)
    assert (grey == 0).all()
