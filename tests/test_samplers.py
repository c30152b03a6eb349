"""samplers: single steps against diffusers, whole paths against data whose best denoiser is known in closed form"""
import time

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import nn

from facegen.core import generator
from facegen.diffusion import samplers
from facegen.diffusion.schedules import PREDICTIONS, make_scheduler, noise_levels, predict_eps, predict_x0
from facegen.diffusion.samplers import (
    PROCESS_SAMPLERS, SAMPLERS, denoise, ideal_denoiser, make_sampler, precision_on, sample, samplers_of, set_steps,
    visited)

EVERY = [(kind, name) for kind in ('epsilon', *PROCESS_SAMPLERS) for name in PROCESS_SAMPLERS.get(kind, SAMPLERS)]
CENTRES = torch.rand(5, 3, 8, 8, generator=generator('centres'))*2 - 1


def gaussian(scheduler, mean=.4, std=.3):
    return ideal_denoiser(torch.full((1, 1, 1, 1), mean), scheduler, std)


def std_of(name, steps, scheduler=None, n=16):
    s = scheduler or make_scheduler(clip=False)
    return float(sample(gaussian(s), make_sampler(name, s), n, 64, steps, channels=1).std())


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_steps_equal_diffusers(prediction):
    "Eq. 12 of DDIM and Eq. 7 of DDPM, written out, along a path of 20 steps"
    noise = make_scheduler(prediction=prediction, clip=False)
    abar = torch.cat([noise.alphas_cumprod, torch.ones(1)])  # abar[-1] = 1 is the clean end
    ddim, ddpm = make_sampler('ddim', noise), make_sampler('ddpm', noise)
    for s in (ddim, ddpm):
        set_steps(s, 20)
    ts = ddim.timesteps.tolist()
    assert ts == ddpm.timesteps.tolist()
    for t, s in zip(ts, ts[1:] + [-1]):
        xt, out, fresh = torch.randn(3, 1, 3, 8, 8, generator=generator('step', t)).double()
        tb, a, b = torch.tensor([t]), abar[t].double(), abar[s].double()
        x0, eps = predict_x0(out, xt, tb, noise), predict_eps(out, xt, tb, noise)
        want = b.sqrt()*x0 + (1 - b).sqrt()*eps
        torch.testing.assert_close(ddim.step(out, t, xt).prev_sample, want, rtol=1e-3, atol=1e-4)
        g = generator('fresh', t)
        fresh = torch.randn(xt.shape, generator=g, dtype=xt.dtype) if t > 0 else 0
        beta = 1 - a/b
        mean = (b.sqrt()*beta*x0 + (1 - beta).sqrt()*(1 - b)*xt)/(1 - a)
        want = mean + ((1 - b)/(1 - a)*beta).sqrt()*fresh
        theirs = ddpm.step(out, t, xt, generator=generator('fresh', t)).prev_sample
        torch.testing.assert_close(theirs, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', SAMPLERS)
def test_first_order_limit(name):
    "All deterministic samplers take the same single step from T-1 to the end: the prediction of x0"
    noise = make_scheduler(clip=False)
    x = sample(gaussian(noise), make_sampler(name, noise), 2, 8, steps=1, channels=1)
    start = torch.stack([torch.randn(1, 8, 8, generator=generator('sample', 0, i)) for i in range(2)])
    t = torch.full((2,), 999)
    torch.testing.assert_close(x, predict_x0(gaussian(noise)(start, t), start, t, noise), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('prediction', PREDICTIONS)
@pytest.mark.parametrize('name', SAMPLERS)
def test_gaussian_is_reproduced(name, prediction):
    s = make_scheduler(prediction=prediction, clip=False)
    x = sample(gaussian(s), make_sampler(name, s), 16, 64, 250, channels=1)
    assert abs(x.mean() - .4) < .005 and abs(x.std()/.3 - 1) < (.05 if name in ('ddpm', 'ddim') else .01)
    kurtosis = ((x - x.mean())/x.std()).pow(4).mean()
    assert abs(kurtosis - 3) < .1


@pytest.mark.parametrize('name', SAMPLERS)
def test_more_steps_come_nearer(name):
    error = [abs(std_of(name, c)/.3 - 1) for c in (2, 5, 20, 100)]
    assert error == sorted(error, reverse=True) and error[-1] < .1


def test_order_of_the_samplers():
    e = {k: [abs(std_of(k, c)/.3 - 1) for c in (20, 40)] for k in SAMPLERS}
    assert 1.6 < e['ddim'][0]/e['ddim'][1] < 2.4                                       # first order
    assert e['dpm++'][0]/e['dpm++'][1] > 3 and e['unipc'][0]/e['unipc'][1] > 3        # second order
    assert max(e['dpm++'][1], e['unipc'][1]) < e['ddim'][1] < e['ddpm'][1]


@pytest.mark.parametrize('name', SAMPLERS)
def test_zero_snr(name):
    s = make_scheduler(prediction='v_prediction', zero_snr=True, clip=False)
    x = sample(gaussian(s), make_sampler(name, s), 16, 64, 100, channels=1)
    assert abs(x.mean() - .4) < .01 and abs(x.std()/.3 - 1) < .1


@pytest.mark.parametrize('name', SAMPLERS)
def test_perfect_denoiser_returns_its_data(name):
    s = make_scheduler()
    x = sample(ideal_denoiser(CENTRES, s), make_sampler(name, s), 40, 8, 20)
    distance = (x[:, None] - CENTRES).abs().amax((2, 3, 4))
    assert distance.min(1).values.max() < .02
    assert len(distance.argmin(1).unique()) == len(CENTRES)  # and all of them occur


def test_proportions_are_kept():
    s = make_scheduler()
    data = torch.cat([CENTRES[:1].expand(3, -1, -1, -1), CENTRES[1:2]])  # one face three times, another once
    x = sample(ideal_denoiser(data, s), make_sampler('dpm++', s), 400, 8, 25, batch=400)
    share = ((x - CENTRES[0]).abs().amax((1, 2, 3)) < .05).float().mean()
    assert abs(share - .75) < .07  # three standard errors


@pytest.mark.parametrize('name', SAMPLERS)
def test_batch_size_changes_nothing(name):
    s = make_scheduler()
    model, sampler = ideal_denoiser(CENTRES, s, std=.2), make_sampler(name, s)
    x = sample(model, sampler, 7, 8, 10, batch=7)
    for batch in (1, 3, 64):
        torch.testing.assert_close(sample(model, sampler, 7, 8, 10, batch=batch), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample(model, sampler, 2, 8, 10), x[:2], rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(model, sampler, 7, 8, 10, batch=7), x)  # nothing is left over in the sampler
    assert not torch.allclose(sample(model, sampler, 7, 8, 10, seed=1), x, atol=.1)
    assert len({tuple(v.flatten().tolist()) for v in x}) == 7
    assert x.dtype == torch.float32 and x.device.type == 'cpu' and x.abs().max() <= 1 + 1e-5


def test_global_seed_is_neither_used_nor_moved():
    s = make_scheduler()
    state = torch.random.get_rng_state()
    for name in SAMPLERS:
        sample(ideal_denoiser(CENTRES, s), make_sampler(name, s), 2, 8, 4)
    assert torch.equal(torch.random.get_rng_state(), state)


class Recorder(nn.Module):
    "Says which rows of the condition reached it"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.drop = nn.Dropout(.5)
        self.frozen = nn.Dropout(.5).eval()
        self.conds = []
    def forward(self, x, t, cond=None):
        assert not self.training and not self.drop.training and not torch.is_grad_enabled()
        assert t.dtype == torch.int64 and t.shape == (len(x),)
        self.conds.append(cond)
        return self.drop(x)*0 + self.w


def test_modes_and_gradients_come_back():
    model, s = Recorder(), make_sampler('ddim', make_scheduler())
    sample(model, s, 3, 8, 2)
    assert model.training and model.drop.training and not model.frozen.training and torch.is_grad_enabled()
    steps = denoise(model, s, torch.randn(1, 3, 8, 8), 5)
    next(steps)
    steps.close()  # it is given up
    assert model.training and model.drop.training and not model.frozen.training
    class Broken(Recorder):
        def forward(self, x, t, cond=None): raise RuntimeError('broken')
    with pytest.raises(RuntimeError):
        sample(broken := Broken(), s, 1, 8, 2)
    assert broken.training and not broken.frozen.training


def test_conditions_are_cut_to_the_batch():
    model, s = Recorder(), make_sampler('ddim', make_scheduler())
    cond = dict(a=torch.arange(5), b=None, c=dict(d=torch.arange(5.)*2))
    sample(model, s, 5, 8, 1, cond=cond, batch=2)
    assert [c['a'].tolist() for c in model.conds] == [[0, 1], [2, 3], [4]]
    assert model.conds[1]['c']['d'].tolist() == [4., 6.] and model.conds[1]['b'] is None
    with pytest.raises(ValueError, match='give one row an image'):
        sample(model, s, 6, 8, 1, cond=cond)


@pytest.mark.parametrize('name', SAMPLERS)
def test_timesteps_that_are_visited(name):
    s = make_sampler(name, make_scheduler())
    for steps in (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000):
        set_steps(s, steps)
        gap = 1000//steps
        assert s.timesteps.tolist() == list(range(999, -1, -gap)), steps
    for steps in (0, 2000, -1, 2.5, True):
        with pytest.raises(ValueError, match='take a whole number from 1 to 1000'):
            set_steps(s, steps)


@pytest.mark.parametrize('spacing', ['trailing', 'leading', 'karras'])
@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'flow', 'edm'])
def test_any_number_of_timesteps_is_visited_once_each_from_noise_to_face(kind, spacing):
    for T, counts in ((60, range(1, 61)), (1000, (1, 2, 3, 7, 30, 61, 300, 501, 999, 1000))):
        beta, zero = ('cosine', False) if kind == 'epsilon' else ('linear', kind == 'v_prediction')
        levels = noise_levels(make_scheduler(T, beta, kind, zero))
        for n in counts:
            t = visited(levels, n, spacing)
            assert t.shape == (n,) and t.dtype == torch.int64 and (t.diff() < 0).all() and 0 <= t[-1] and t[0] < T
            assert t[0] == (T - 1 if spacing != 'leading' else (n - 1)*T//n), 'but for leading, it starts in pure noise'
            last = dict(leading=0, trailing=round(T/n + 1e-9) - 1)  # no step is longer than the others
            assert t[-1] == last[spacing] if spacing in last else n <= 10 or t[-1] < T/n, 'the last are smallest'


@pytest.mark.parametrize('name', ['ddpm', 'ddim'])
def test_leading_is_diffusers_own_for_divisors(name):
    for steps in (1, 5, 50, 250, 1000):
        cls = samplers.DDPMScheduler if name == 'ddpm' else DDIMScheduler
        ours, theirs = make_sampler(name, make_scheduler(), 'leading'), cls(timestep_spacing='leading')
        for s in (ours, theirs):
            s.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize('kind,name', EVERY)
def test_more_steps_are_not_worse_whatever_their_number(kind, name):
    "One Gaussian: how wrong is its standard deviation? .005 is the noise of 16 x 64 x 64 numbers"
    noise = make_scheduler(prediction=kind, clip=False, sigma_data=.5 if kind == 'edm' else None)
    model, sampler = gaussian(noise), make_sampler(name, noise, 'trailing')
    counts = (2, 3, 5, 7, 11, 20, 30, 61, 130, 300)
    error = [abs(float(sample(model, sampler, 16, 64, c, channels=1).std())/.3 - 1) for c in counts]
    best = [min(error[:i + 1]) for i in range(len(error))]
    assert all(e <= b + .04 for e, b in zip(error[3:], best[3:])), error  # second order may cross zero on its way
    assert error[-1] < .07 if name in ('ddpm', 'ddim', 'euler') else max(error[-3:]) < .012, error


@pytest.mark.parametrize('kind,name', [e for e in EVERY if e[1] != 'ddpm'])
def test_more_steps_come_nearer_to_where_a_thousand_lead(kind, name):
    noise = make_scheduler(prediction=kind, clip=False, sigma_data=.5 if kind == 'edm' else None)
    model, sampler = ideal_denoiser(CENTRES, noise, .2), make_sampler(name, noise)
    end = sample(model, sampler, 24, 8, 1000)
    counts = 3, 7, 17, 61, 130, 300
    distance = [float((sample(model, sampler, 24, 8, c) - end).square().mean().sqrt()) for c in counts]
    assert all(b <= a + .01 for a, b in zip(distance, distance[1:])) and distance[-1] < .01, distance


@pytest.mark.parametrize('name', ['dpm++', 'unipc'])
def test_karras_needs_fewer_steps_to_a_sharp_end(name):
    noise = make_scheduler(clip=False)
    model = ideal_denoiser(CENTRES, noise, .02)
    far = lambda spacing: abs(sample(model, make_sampler(name, noise, spacing), 40, 8, 20) - nearest).mean()
    end = sample(model, make_sampler(name, noise), 40, 8, 500)
    nearest = CENTRES[(end[:, None] - CENTRES).abs().mean((2, 3, 4)).argmin(1)]
    assert abs(float((end - nearest).std()) - .02) < .005 and far('karras') < .1
    for refused in ('ddpm', 'ddim'):
        with pytest.raises(ValueError, match="spacing 'karras' is not for"):
            make_sampler(refused, noise, 'karras')


def test_a_sampler_of_diffusers_itself_is_used_where_it_is_right_only():
    plain = DDIMScheduler(timestep_spacing='trailing')
    set_steps(plain, 50)
    with pytest.raises(ValueError, match='steps=30 does not divide the 1000 .* make the sampler with make_sampler'):
        set_steps(plain, 30)


@pytest.mark.parametrize('name,cls', [('dpm++', DPMSolverMultistepScheduler), ('unipc', UniPCMultistepScheduler)])
def test_a_clamp_has_the_bits_of_a_sorted_quantile_and_is_not_slower(name, cls):
    noise = make_scheduler()
    ours = make_sampler(name, noise)
    theirs = cls.from_config({k: v for k, v in ours.config.items() if k != '_class_name'})
    wild = lambda x, t, cond=None: 3*torch.tanh(x.roll(1, -1)) + x
    start = torch.randn(4, 3, 16, 16, generator=generator('wild'))
    for s in (ours, theirs):
        s.set_timesteps(20)
    x = y = start
    for t, u in zip(ours.timesteps, theirs.timesteps):
        assert t == u
        x, y = ours.step(wild(x, t), t, x).prev_sample, theirs.step(wild(y, u), u, y).prev_sample
    assert torch.equal(x, y) and x.abs().max() <= 1
    big = torch.randn(16, 3, 64, 64, generator=generator('big'))*2
    seconds = {}
    for s in (ours, theirs):
        begin = time.process_time()
        for _ in range(5):
            out = s._threshold_sample(big)
        seconds[s is ours] = time.process_time() - begin
        assert out.abs().max() == 1
    assert seconds[True] < seconds[False]


def test_ddim_is_diffusers_where_that_is_right():
    for prediction in PREDICTIONS:
        for clip in (False, True):
            ours = make_sampler('ddim', make_scheduler(prediction=prediction, clip=clip))
            theirs = DDIMScheduler.from_config({k: v for k, v in ours.config.items() if k != '_class_name'})
            x = y = torch.randn(2, 3, 8, 8, generator=generator('ddim'))
            wild = lambda x: torch.tanh(2*x.roll(1, -1))
            for s in (ours, theirs):
                s.set_timesteps(25)
            for t in ours.timesteps:
                x, y = ours.step(wild(x), t, x).prev_sample, theirs.step(wild(y), t, y).prev_sample
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# memory and precision

def test_a_batch_that_does_not_fit_is_halved_and_changes_nothing():
    noise = make_scheduler()
    ideal, sampler, sizes = ideal_denoiser(CENTRES, noise), make_sampler('dpm++', noise), []
    def small(x, t, cond=None, limit=3):
        sizes.append(len(x))
        if len(x) > limit: raise torch.OutOfMemoryError('no room')
        return ideal(x, t)
    x = sample(small, sampler, 11, 8, 4)
    assert set(sizes) == {11, 6, 3, 2} and sizes.count(11) == 1, 'once too many, then never again'
    torch.testing.assert_close(x, sample(ideal, sampler, 11, 8, 4), rtol=1e-4, atol=1e-4)
    with pytest.raises(torch.OutOfMemoryError):
        sample(small, sampler, 11, 8, 4, batch=5)
    with pytest.raises(torch.OutOfMemoryError):
        sample(lambda x, t, cond: small(x, t, limit=0), sampler, 2, 8, 4)


def test_half_precision_is_the_networks_alone(monkeypatch):
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 3, padding=1)
    seen = []
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x, t, cond=None):
            assert x.dtype == torch.float32
            out = self.net(x)
            seen.append(out.dtype)
            return out
    sampler = make_sampler('dpm++', make_scheduler(prediction='sample'))
    draw = lambda precision: sample(Net(), sampler, 2, 8, 4, precision=precision)
    monkeypatch.setattr(samplers, 'precision_on', lambda where, precision: precision)
    full, half = draw('no'), draw('bf16')
    assert seen == [torch.float32]*4 + [torch.bfloat16]*4 and half.dtype == torch.float32
    assert not torch.equal(full, half) and (full - half).abs().max() < .05


def test_bf16_only_where_it_is_native(monkeypatch):
    cpu = torch.device('cpu')
    for native, want in ((True, 'bf16'), (False, 'no')):
        monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: native)
        monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: native)
        assert precision_on(cpu, 'bf16') == want and precision_on(cpu, 'no') == 'no'
    assert precision_on(torch.device('cuda'), 'fp16') == 'fp16'
    with pytest.raises(ValueError, match="precision='fp16' is for GPUs"):
        precision_on(cpu, 'fp16')
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        sample(lambda x, t, cond: x, make_sampler('ddim', make_scheduler()), 1, 8, 2, precision='half')


def test_what_is_carried_over():
    noise = make_scheduler(T=2000, beta='scaled_linear', prediction='v_prediction', zero_snr=True, clip=False)
    for name in SAMPLERS:
        s = make_sampler(name, noise)
        torch.testing.assert_close(s.betas, noise.betas)
        assert s.config.prediction_type == 'v_prediction' and s.config.timestep_spacing == 'trailing'
        assert s.config.rescale_betas_zero_snr and not s.config.get('clip_sample') and not s.config.get('thresholding')


@pytest.mark.parametrize('name', SAMPLERS)
def test_clipping(name):
    "A network that believes in a far too bright face: clipping keeps samples in range, and only clipping does"
    for clip in (True, False):
        noise = make_scheduler(prediction='sample', clip=clip)
        x = sample(lambda x, t, cond=None: torch.full_like(x, 3.), make_sampler(name, noise), 2, 8, 10)
        torch.testing.assert_close(x, torch.full_like(x, 1. if clip else 3.))


def test_every_step_is_yielded():
    s = make_scheduler()
    model = ideal_denoiser(CENTRES, s)
    start = torch.randn(2, 3, 8, 8, generator=generator('film'))
    path = list(denoise(model, make_sampler('ddim', s), start, 5))
    assert [step[0] for step in path] == [999, 799, 599, 399, 199] and torch.equal(path[0][1], start)
    assert all(torch.equal(a[3], b[1]) for a, b in zip(path, path[1:]))


def test_wrong_names():
    with pytest.raises(ValueError, match='ddpm, ddim, dpm\\+\\+, unipc'):
        make_sampler('euler', make_scheduler())
    assert list(samplers_of(make_scheduler(prediction='flow'))) == ['euler', 'dpm++']
    with pytest.raises(ValueError, match='trailing, leading or karras'):
        make_sampler('ddim', make_scheduler(), 'linspace')
