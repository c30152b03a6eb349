"""rectified flow: against diffusers, against closed forms of its own, and as a noise schedule in disguise"""
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from facegen.conditioning.pipeline import denoise_loop
from facegen.core import generator
from facegen.diffusion.losses import StepRandom, diffusion_loss
from facegen.diffusion.rectified_flow import FlowAsDenoiser, as_noise_schedule
from facegen.diffusion.samplers import (
    PROCESS_SAMPLERS, SAMPLERS, denoise, ideal_denoiser, make_sampler, sample, set_steps)
from facegen.diffusion.schedules import RectifiedFlow, make_scheduler, snr, training_target
from facegen.models.dit import make_dit
from facegen.models.unet import make_unet
from facegen.synthetic.toyfaces import render_faces

def make_flow(T=1000, clip=True): return make_scheduler(T, prediction='flow', clip=clip)
def euler(flow): return make_sampler('euler', flow)


FREE, CLIPPED = make_flow(clip=False), make_flow()
EULER = euler(FREE)
NAMES = list(PROCESS_SAMPLERS['flow'])


def some(*shape, key=0): return torch.randn(shape, generator=generator('test_flow', key))


def gaussian(mean=.4, std=.3, T=1000):
    "The best velocity for one Gaussian: E[eps - x0 | xt], a straight line in xt (both are jointly normal)"
    def model(x, t, cond=None):
        s = (t/T).to(x).view(-1, 1, 1, 1)
        slope = (s - (1 - s)*std**2)/((1 - s)**2*std**2 + s**2)  # covariance with xt over variance of xt
        return slope*(x - (1 - s)*mean) - mean
    return model


def std_of(model, scheduler, steps):
    return float(sample(model, scheduler, 16, 64, steps, channels=1).std())


# mixing

def test_mixing_equals_diffusers():
    x0, eps = some(2, 1000, 1, 2, 2)
    theirs = FlowMatchEulerDiscreteScheduler()
    t = theirs.timesteps.round().long()  # theirs are not all whole, and are found by equality
    assert t.tolist() == list(range(1000, 0, -1))
    want = theirs.scale_noise(x0, theirs.timesteps, eps)
    torch.testing.assert_close(FREE.add_noise(x0, eps, t), want, rtol=0, atol=2e-6)


def test_mixing_does_not_depend_on_what_was_sampled_before():
    "A sampler, which looks the time up among those that it visits, mixes the same there"
    x0, eps, t = *some(2, 3, 3, 4, 4), torch.tensor([1, 250, 1000])
    before = FREE.add_noise(x0, eps, t)
    for name in NAMES:
        sampler = make_sampler(name, FREE)
        sampler.set_timesteps(4)
        torch.testing.assert_close(sampler.add_noise(x0, eps, t)[1:], before[1:])
    assert torch.equal(FREE.add_noise(x0, eps, t), before)


def test_ends_and_middle():
    x0, eps = some(2, 2, 3, 4, 4)
    want = torch.stack([eps[0], (x0[1] + eps[1])/2])
    assert torch.allclose(FREE.add_noise(x0, eps, torch.tensor([1000, 500])), want, atol=1e-6)


def test_the_velocity_is_the_slope_of_the_path():
    x0, eps, t = *some(2, 4, 3, 4, 4).double(), torch.tensor([1, 100, 500, 999])
    slope = (FREE.add_noise(x0, eps, t + 1) - FREE.add_noise(x0, eps, t))*1000
    torch.testing.assert_close(slope, training_target(x0, eps, t, FREE))
    torch.testing.assert_close(FREE.predict_x0(slope, FREE.add_noise(x0, eps, t), t), x0)


# stepping

@pytest.mark.parametrize('T, steps', [
    (1000, 1), (1000, 8), (1000, 40), (1000, 125), (1000, 1000), (2000, 16), (60, 12), (7, 7), (1, 1)])
def test_whole_timesteps_are_visited(T, steps):
    flow = euler(make_flow(T))
    set_steps(flow, steps)
    want = [T - i*(T//steps) for i in range(steps)]
    assert flow.timesteps.tolist() == want and [int(t) for t in flow.timesteps] == want
    torch.testing.assert_close(flow.sigmas, torch.tensor(want + [0])/T)


def test_timesteps_and_sigmas_agree_for_every_divisor():
    "The timestep that the network gets and where the process stands are the same; int() must not round 299.9999 down"
    x = torch.zeros(2, 1, 4, 4)
    for steps in (d for d in range(1, 1001) if 1000 % d == 0):
        timesteps = []
        def model(x, t, cond=None):
            timesteps.append(int(t[0]))
            return torch.full_like(x, 1.)
        *_, (t, _, _, end) = denoise(model, EULER, x, steps)
        assert timesteps == list(range(1000, 0, -1000//steps)) and t == 1000//steps
        assert torch.allclose(end, x - 1, atol=1e-5), 'a velocity of 1 for a time of 1'


def test_steps_equal_diffusers():
    ours, theirs = EULER, FlowMatchEulerDiscreteScheduler()
    ours.set_timesteps(20)
    theirs.set_timesteps(sigmas=[1 - i/20 for i in range(20)])
    x = y = some(2, 3, 4, 4)
    for i, (t, u) in enumerate(zip(ours.timesteps, theirs.timesteps)):
        out = some(2, 3, 4, 4, key=i)
        x, y = ours.step(out, t, x).prev_sample, theirs.step(out, u, y).prev_sample
    torch.testing.assert_close(x, y)


def dpm_2m(velocity, x, times):
    "DPM-Solver++ 2M (Lu et al. 2022, Algorithm 2) in the flow's time, in its fewest lines"
    log_snr, last = lambda s: math.log((1 - s)/s) if 0 < s < 1 else math.inf*(1 - 2*s), None
    for s, to in zip(times, times[1:]):
        x0 = x - s*velocity(x, s)
        h, before = log_snr(to) - log_snr(s), 0. if last is None else log_snr(s) - log_snr(last[0])
        more = 0. if last is None or to == 0 else h/(2*before)*(x0 - last[1])
        x, last = to/s*x + (1 - to/s)*(x0 + more), (s, x0)
    return x


@pytest.mark.parametrize('steps', [1, 2, 3, 7, 10, 20, 61])
def test_dpm_is_its_algorithm(steps):
    "Nothing is divided by zero or infinity: the first step starts at s = 1, the last ends at s = 0"
    sampler, data = make_sampler('dpm++', FREE), some(6, 3, 8, 8).tanh()
    net, x = ideal_denoiser(data, FREE, .2), some(4, 3, 8, 8, key=1)
    *_, (_, _, _, got) = denoise(net, sampler, x, steps)
    assert got.isfinite().all() and sampler.sigmas[-1] == 0 and sampler.sigmas[0] == 1
    velocity = lambda x, s: net(x, torch.full((len(x),), round(1000*s)))
    torch.testing.assert_close(got, dpm_2m(velocity, x, sampler.sigmas.double().tolist()), rtol=1e-3, atol=1e-4)


def test_dpm_agrees_with_diffusers_own_flow_times():
    "diffusers starts at s = 1 - 1/T: with its times, its noise to start from is a thousandth off"
    theirs = DPMSolverMultistepScheduler(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=1.)
    net, x = ideal_denoiser(some(6, 3, 8, 8).tanh(), FREE, .2), some(4, 3, 8, 8, key=1)
    *_, (_, _, _, ours) = denoise(net, make_sampler('dpm++', FREE), x, 40)
    theirs.set_timesteps(40)
    y = x
    for t in theirs.timesteps:
        y = theirs.step(net(y, t.expand(4)), t, y).prev_sample
    assert (ours - y).abs().mean() < .03 < x.abs().mean()/10


@pytest.mark.parametrize('name', NAMES)
def test_clipping_changes_nothing_inside(name):
    "Where the prediction stays in [-1,1], pixels and latents are sampled alike"
    net = ideal_denoiser(render_faces(n=4, size=16, seed=3).image, FREE)
    free, clipped = (sample(net, make_sampler(name, flow), 4, 16, 12) for flow in (FREE, CLIPPED))
    assert torch.allclose(free, clipped, atol=1e-5)


def test_dpm_needs_far_fewer_steps_than_euler():
    "On one Gaussian: second order, so that 20 steps are closer than Euler's 200"
    error = {k: [abs(1 - std_of(gaussian(), make_sampler(k, FREE), c)/.3) for c in (20, 200)] for k in NAMES}
    assert error['dpm++'][0] < error['euler'][1] and error['dpm++'][1] < .005


@pytest.mark.parametrize('steps', [1, 2, 5, 50])
@pytest.mark.parametrize('name', NAMES)
def test_one_face_is_reached_in_any_number_of_steps(name, steps):
    "With a single face all paths are straight lines to it"
    face = render_faces(n=1, size=16, seed=3).image
    exact = lambda x, t, cond=None: (x - face)/(t/1000).view(-1, 1, 1, 1)
    x = sample(exact, make_sampler(name, FREE), 3, 16, steps)
    assert torch.allclose(x, face.expand(3, -1, -1, -1), atol=1e-5)


@pytest.mark.parametrize('steps', [1, 5, 50])
def test_each_noise_lands_on_its_own_face(steps):
    faces = render_faces(n=4, size=16, seed=3).image
    noise = torch.stack([torch.randn(3, 16, 16, generator=generator('sample', 0, i)) for i in range(4)])
    x = sample(lambda x, t, cond=None: noise - faces, euler(CLIPPED), 4, 16, steps)
    assert torch.allclose(x, faces, atol=1e-4), 'clipping to [-1,1] must not touch what is inside'


def test_a_gaussian_is_reproduced_at_first_order():
    error = [1 - std_of(gaussian(), EULER, c)/.3 for c in (10, 20, 40)]
    assert all(1.6 < a/b < 2.2 for a, b in zip(error, error[1:]))
    x = sample(gaussian(), EULER, 16, 64, 500, channels=1)
    assert abs(x.mean() - .4) < .005 and abs(x.std()/.3 - 1) < .01


def test_half_the_steps_of_the_linear_schedule():
    "The chapter's first plot: at equal steps Euler errs less than half as much as DDIM on the linear schedule"
    linear = make_scheduler(clip=False)
    def eps_of(x, t, cond=None, mean=.4, std=.3):
        a = linear.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt()*(x - a.sqrt()*mean)/(a*std**2 + 1 - a)
    for c in (10, 20, 50):
        assert 1 - std_of(gaussian(), EULER, c)/.3 < (1 - std_of(eps_of, make_sampler('ddim', linear), c)/.3)/2


def test_clipping_keeps_pixels_in_range():
    wild = lambda x, t, cond=None: 5*x.roll(1, -1)
    for name in NAMES:
        assert sample(wild, make_sampler(name, CLIPPED), 2, 8, 10).abs().max() <= 1 + 1e-5
        assert sample(wild, make_sampler(name, FREE), 2, 8, 10).abs().max() > 2


# a noise schedule in disguise

@pytest.mark.parametrize('T', [10, 1000])
def test_ratios_agree(T):
    r, s = snr(as_noise_schedule(make_flow(T)).alphas_cumprod.double()), torch.arange(1, T)/T
    torch.testing.assert_close(r[:-1].sqrt(), ((1 - s)/s).double(), rtol=2e-2, atol=0)  # float32 next to abar = 1
    assert 0 < r[-1] < 1e-7


def test_same_picture_but_for_scale():
    x0, eps, t = *some(2, 5, 3, 4, 4), torch.tensor([1, 10, 500, 900, 1000])
    s = (t/1000).view(-1, 1, 1, 1)
    scaled = as_noise_schedule(FREE).add_noise(x0, eps, t - 1)*((1 - s)**2 + s**2).sqrt()
    torch.testing.assert_close(scaled, FREE.add_noise(x0, eps, t), rtol=0, atol=1e-3)


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('steps', [1, 5, 50])
def test_euler_is_ddim(steps, clip):
    "Where the prediction is clipped, the noise must follow from it; diffusers' DDIM does so if asked"
    net = lambda x, t, cond=None: torch.tanh(3*x.roll(1, -1)) + x*(t/1000).view(-1, 1, 1, 1)
    flow = make_flow(clip=clip)
    ddim, model = make_sampler('ddim', as_noise_schedule(flow)), FlowAsDenoiser(net, flow)
    x = some(3, 3, 8, 8)
    *_, (_, _, _, got) = denoise(net, euler(flow), x, steps)
    set_steps(ddim, steps)
    for t in ddim.timesteps:
        x = ddim.step(model(x, t.expand(3)), t, x, use_clipped_model_output=clip).prev_sample
    torch.testing.assert_close(got, x, rtol=0, atol=2e-3)


@pytest.mark.parametrize('name', SAMPLERS)
def test_every_sampler_runs_on_a_flow(name):
    model, sampler = FlowAsDenoiser(gaussian(), FREE), make_sampler(name, as_noise_schedule(FREE))
    error = [abs(std_of(model, sampler, c)/.3 - 1) for c in (20, 100)]
    assert error[1] < error[0] < .25 and error[1] < .1
    if name in ('dpm++', 'unipc'):
        assert error[0] < (1 - std_of(gaussian(), EULER, 20)/.3)/4


def test_a_flow_as_denoiser_passes_on_condition_and_mode():
    class Net(torch.nn.Module):
        def forward(self, x, t, cond=None):
            modes.append(self.training)
            return cond.view(-1, 1, 1, 1) + 0*x
    modes, net = [], Net()
    cond, sampler = torch.tensor([1., 2.]), make_sampler('ddim', as_noise_schedule(FREE))
    x = sample(FlowAsDenoiser(net, FREE), sampler, 2, 4, 2, cond=cond)
    start = torch.stack([torch.randn(3, 4, 4, generator=generator('sample', 0, i)) for i in range(2)])
    assert torch.allclose(x, start - cond.view(-1, 1, 1, 1), atol=2e-3)
    assert modes == [False, False] and net.training


# the loss

def test_the_loss_is_the_squared_error_of_the_velocity():
    face, n = render_faces(n=64, size=16, seed=1), 64
    rng = StepRandom(0, 0, n)
    t, eps = rng.randint(1, 1001, n), rng.randn(face.image.shape)
    loss = lambda net, **k: diffusion_loss(FREE, **k)(net, face, StepRandom(0, 0, n))
    assert loss(lambda x, t: eps - face.image).max() < 1e-10
    torch.testing.assert_close(loss(lambda x, t: eps - face.image + .5), torch.full((n,), .25))
    zero = loss(lambda x, t: 0*x)
    torch.testing.assert_close(zero, (eps - face.image).square().mean((1, 2, 3)))
    torch.testing.assert_close(loss(lambda x, t: 0*x, weight=lambda t: t.float()), zero*t)
    def knows(x, s):  # from what it is given, and x0, the velocity follows: so xt and t must fit
        assert torch.equal(s, t)
        return (x - face.image)/(s/1000).view(-1, 1, 1, 1)
    assert loss(knows).max() < 1e-3


def test_only_the_rng_is_random():
    face, loss, net = render_faces(n=4, size=16), diffusion_loss(FREE), lambda x, t: x
    a = loss(net, face, StepRandom(0, 0, 4))
    torch.manual_seed(1)
    assert torch.equal(a, loss(net, face, StepRandom(0, 0, 4)))
    assert not torch.equal(a, loss(net, face, StepRandom(0, 1, 4)))


def test_a_velocity_error_is_a_noise_error_at_another_price():
    "eps = xt + (1 - s) v, so the squared error of the velocity is that of the noise over (1 - s)^2"
    x0, eps, t = *some(2, 3, 3, 4, 4), torch.tensor([10, 500, 990])
    s = (t/1000).view(-1, 1, 1, 1)
    xt = FREE.add_noise(x0, eps, t)
    as_eps = lambda v: xt + (1 - s)*v
    v = some(3, 3, 4, 4, key=1)
    of_velocity, of_noise = (v - (eps - x0)).square(), (as_eps(v) - eps).square()
    torch.testing.assert_close(of_velocity*(1 - s)**2, of_noise, rtol=1e-2, atol=1e-4)


# in use

@pytest.mark.parametrize('make', [lambda: make_unet('smoke', 32), lambda: make_dit('smoke', 32)], ids=['unet', 'dit'])
def test_networks_train_and_sample(make):
    torch.manual_seed(0)
    net, face, timesteps = make(), render_faces(n=4, size=32), []
    net.register_forward_hook(lambda m, args, out: timesteps.extend(args[1].tolist()))
    loss, opt = diffusion_loss(CLIPPED, timestep_sampling='logit-normal'), torch.optim.AdamW(net.parameters(), lr=2e-3)
    curve = []
    for _ in range(8):
        opt.zero_grad()
        each = loss(net, face, StepRandom(0, 0, 4))
        each.mean().backward()
        opt.step()
        curve.append(each.mean().item())
    assert curve[-1] < .95*curve[0]
    timesteps.clear()
    net.train()
    sampler = make_sampler('dpm++', CLIPPED)
    x = sample(net, sampler, 3, 32, 4)
    assert x.shape == (3, 3, 32, 32) and x.isfinite().all() and x.abs().max() <= 1 + 1e-5 and net.training
    assert sorted(set(timesteps)) == [250, 500, 750, 1000]
    assert torch.allclose(x, sample(net, sampler, 3, 32, 4, batch=2), atol=1e-4)
    t = torch.tensor([1, 999, 1000])
    out = net(face.image[:1].expand(3, -1, -1, -1), t)
    assert out.isfinite().all() and not torch.allclose(out[1], out[2], atol=1e-7)


@pytest.mark.parametrize('name', NAMES)
def test_the_pipeline_can_sample_it(name):
    "From nothing, from the middle, and around a part that is kept"
    face, noise = render_faces(n=2, size=16, seed=3).image, some(2, 3, 16, 16)
    exact = lambda x, t, cond=None: (x - face)/(t/1000).view(-1, 1, 1, 1)
    flow = make_sampler(name, CLIPPED)
    for start in (0, 3, 5):
        flow.set_timesteps(5)
        assert torch.allclose(denoise_loop(exact, flow, face, noise, None, start), face, atol=1e-4)
    flow.set_timesteps(5)
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[:8] = True
    half = denoise_loop(lambda x, t, cond=None: noise, flow, face, noise, None, inpaint_mask=region)
    assert torch.equal(half[..., 8:, :], face[..., 8:, :]) and half[..., :8, :].abs().max() < 1e-5


@pytest.mark.parametrize('name', NAMES)
def test_saved_and_loaded(name, tmp_path):
    make_flow(60, clip=False).save_pretrained(tmp_path/'flow')
    flow = RectifiedFlow.from_pretrained(tmp_path/'flow')
    assert (flow.config.num_train_timesteps, flow.config.clip_sample) == (60, False)
    sampler = make_sampler(name, flow)
    sampler.save_pretrained(tmp_path/'sampler')
    again = type(sampler).from_pretrained(tmp_path/'sampler')
    again.set_timesteps(3)
    assert again.timesteps.tolist() == [60, 40, 20]
    assert torch.equal(sample(gaussian(T=60), again, 2, 8, 7), sample(gaussian(T=60), sampler, 2, 8, 7))


# wrong use

@pytest.mark.parametrize('steps', [0, 1001, -5, 2.5, True])
@pytest.mark.parametrize('name', NAMES)
def test_steps_that_cannot_be(name, steps):
    with pytest.raises(ValueError, match='take a whole number from 1 to 1000'):
        sample(lambda x, t, cond=None: x, make_sampler(name, CLIPPED), 1, 8, steps)


@pytest.mark.parametrize('T', [0, -1, 10.5, True, '1000'])
def test_no_number_of_timesteps(T):
    with pytest.raises(ValueError, match='is no number of timesteps: take a whole number from 1'):
        make_flow(T)


def test_what_does_not_fit_is_said():
    for wrong in (dict(beta='cosine'), dict(zero_snr=True)):
        with pytest.raises(ValueError, match="prediction='flow' has no betas: leave beta and zero_snr"):
            make_scheduler(prediction='flow', **wrong)
    with pytest.raises(ValueError, match="sigma_data=1.0 belongs to prediction='edm', not to 'flow'"):
        make_scheduler(prediction='flow', sigma_data=1.)
    for name in ('ddim', 'unipc'):
        with pytest.raises(ValueError, match=f"unknown sampler '{name}' for .* 'flow': it must be one of euler, dpm"):
            make_sampler(name, FREE)
    with pytest.raises(ValueError, match="must be 'flow', not 'epsilon'"):
        RectifiedFlow(prediction_type='epsilon')
    with pytest.raises(ValueError, match="must be 'flow', not 'epsilon'"):
        RectifiedFlow.from_config(make_scheduler().config)
