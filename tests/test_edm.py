"""EDM: the formulas of its Table 1, diffusers' scheduler, and velocity prediction in disguise"""
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

from facegen.core import generator
from facegen.diffusion.edm import Preconditioned
from facegen.diffusion.losses import StepRandom, diffusion_loss
from facegen.diffusion.samplers import (
    PROCESS_SAMPLERS, EDMSolver, denoise, ideal_denoiser, make_sampler, sample, set_steps)
from facegen.diffusion.schedules import EDM, make_scheduler, noise_levels, predict_eps, predict_x0, training_target
from facegen.synthetic.toyfaces import render_faces

NAMES = list(PROCESS_SAMPLERS['edm'])
PIXELS, LATENTS = make_scheduler(prediction='edm'), make_scheduler(prediction='edm', clip=False)
T = torch.tensor([0, 123, 500, 800, 999])


def some(*shape, key=0): return torch.randn(shape, generator=generator('test_edm', key))


def table_1(sigma, d):
    "c_skip, c_out, c_in, c_noise and lambda, as they are printed"
    return (d**2/(sigma**2 + d**2), sigma*d/(d**2 + sigma**2)**.5, 1/(sigma**2 + d**2)**.5, sigma.log()/4,
            (sigma**2 + d**2)/(sigma*d)**2)


# formulas

@pytest.mark.parametrize('edm,d', [(PIXELS, .5), (LATENTS, 1.), (make_scheduler(prediction='edm', sigma_data=2.), 2.)])
def test_the_coefficients_are_those_of_table_1(edm, d):
    x0, eps, F = some(3, 5, 3, 4, 4).double()
    sigma = edm.signal_and_noise(T, x0)[1]
    c_skip, c_out, c_in, c_noise, lam = table_1(sigma, d)
    x = x0 + sigma*eps
    torch.testing.assert_close(edm.add_noise(x0, eps, T), x)
    torch.testing.assert_close(edm.scale_model_input(x, T), c_in*x)
    torch.testing.assert_close(predict_x0(F, x, T, edm), c_skip*x + c_out*F)
    target = training_target(x0, eps, T, edm)
    torch.testing.assert_close(target, (x0 - c_skip*x)/c_out)
    torch.testing.assert_close(lam*(c_skip*x + c_out*F - x0)**2, (F - target)**2, msg='Eq. 8: the weight of F is 1')
    torch.testing.assert_close(predict_x0(target, x, T, edm), x0)
    torch.testing.assert_close(predict_eps(target, x, T, edm), eps)
    steps = c_noise.flatten()[1:] - c_noise.flatten()[:-1]
    torch.testing.assert_close(steps/T.diff(), (steps/T.diff())[:1].expand(4), msg='timesteps are c_noise')


def test_the_levels_go_from_sigma_min_to_sigma_max():
    levels = noise_levels(PIXELS)
    assert abs(levels[0] - .002) < 1e-6 and abs(levels[-1] - 80) < 1e-3 and (levels.diff() > 0).all()
    assert noise_levels(make_scheduler(1, prediction='edm')).isfinite().all()


def test_input_and_target_have_unit_size():
    for edm, d in ((PIXELS, .5), (LATENTS, 1.)):
        x0, eps = some(2, 5, 3, 64, 64)
        seen = edm.scale_model_input(edm.add_noise(d*x0, eps, T), T)
        for v in (seen, training_target(d*x0, eps, T, edm)):
            assert (v.flatten(1).std(1) - 1).abs().max() < .03


def test_it_is_velocity_prediction_of_normalised_data():
    x0, eps = some(2, 5, 3, 8, 8).double()
    sigma = PIXELS.signal_and_noise(T, x0)[1]
    abar = .25/(.25 + sigma**2)
    torch.testing.assert_close(training_target(.5*x0, eps, T, PIXELS), (1 - abar).sqrt()*x0 - abar.sqrt()*eps)
    seen = PIXELS.scale_model_input(PIXELS.add_noise(.5*x0, eps, T), T)
    torch.testing.assert_close(seen, abar.sqrt()*x0 + (1 - abar).sqrt()*eps)


# against diffusers

def test_preconditioning_equals_diffusers():
    theirs, x, F = EDMDPMSolverMultistepScheduler(sigma_data=.5), *some(2, 5, 3, 4, 4)
    for i, sigma in enumerate(PIXELS.signal_and_noise(T, x)[1].flatten()):
        one = slice(i, i + 1)
        torch.testing.assert_close(PIXELS.scale_model_input(x, T)[one], theirs.precondition_inputs(x[one], sigma))
        torch.testing.assert_close(PIXELS.predict_x0(F, x, T)[one], theirs.precondition_outputs(x[one], F[one], sigma))


@pytest.mark.parametrize('steps', [2, 5, 18, 40])
def test_levels_that_are_visited_are_diffusers_but_for_rounding(steps):
    ours, theirs = make_sampler('dpm++', PIXELS), EDMDPMSolverMultistepScheduler()
    for s in (ours, theirs):
        s.set_timesteps(steps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=.006, atol=0)
    assert ours.sigmas[-1] == 0 and torch.equal(ours.sigmas[:-1], noise_levels(PIXELS)[ours.timesteps])


@pytest.mark.parametrize('order', [1, 2])
def test_sampling_equals_diffusers(order):
    "From the same start over the same levels"
    ours = make_sampler(NAMES[order - 1], LATENTS)
    theirs = EDMDPMSolverMultistepScheduler(sigma_data=1., solver_order=order)
    net, start = ideal_denoiser(some(5, 3, 8, 8).tanh(), LATENTS, .2), some(3, 3, 8, 8, key=1)
    *_, (_, _, _, got) = denoise(net, ours, start, 17)
    theirs.set_timesteps(17)
    theirs.sigmas, times, x = ours.sigmas, ours.timesteps, 80*start
    for i, t in enumerate(times):
        sigma = theirs.sigmas[i]
        out = net(theirs.precondition_inputs(x, sigma), t.expand(3))
        x = theirs.step(out, theirs.timesteps[i], x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)


# in use

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('steps', [1, 2, 7, 20])
def test_one_face_is_reached_in_any_number_of_steps(name, steps):
    face = render_faces(n=1, size=16, seed=3).image
    x = sample(ideal_denoiser(face, PIXELS), make_sampler(name, PIXELS), 3, 16, steps)
    assert torch.allclose(x, face.expand(3, -1, -1, -1), atol=1e-3) and x.abs().max() <= 1


def test_clipping():
    wild = lambda x, t, cond=None: 5*x.roll(1, -1)
    assert sample(wild, make_sampler('dpm++', PIXELS), 2, 8, 10).abs().max() <= 1
    assert sample(wild, make_sampler('dpm++', LATENTS), 2, 8, 10).abs().max() > 1.5


def test_the_loss_is_lambda_times_the_error_of_the_denoiser():
    face, n = render_faces(n=16, size=16, seed=1), 16
    rng = StepRandom(0, 0, n)
    t, eps = rng.randint(0, 1000, n), rng.randn(face.image.shape)
    sigma = PIXELS.signal_and_noise(t, eps)[1]
    c_skip, c_out, c_in, _, lam = table_1(sigma, .5)
    seen = []
    def net(x, s):
        seen.append((x, s))
        return torch.tanh(x.roll(1, -1))
    got = diffusion_loss(PIXELS)(net, face, StepRandom(0, 0, n))
    x = face.image + sigma*eps
    torch.testing.assert_close(seen[0][0], c_in*x)
    assert torch.equal(seen[0][1], t)
    D = c_skip*x + c_out*torch.tanh((c_in*x).roll(1, -1))
    torch.testing.assert_close(got, (lam*(D - face.image)**2).mean((1, 2, 3)), rtol=1e-3, atol=1e-3)


def test_a_wrapped_network_is_the_denoiser():
    net = lambda x, t, cond=None: torch.tanh(x.roll(1, -1)) + (t/1000).view(-1, 1, 1, 1)
    D, x = Preconditioned(net, PIXELS), some(5, 3, 4, 4)
    sigma = PIXELS.signal_and_noise(T, x)[1].flatten()
    seen = net(PIXELS.scale_model_input(x, T), T)
    torch.testing.assert_close(D(x, sigma), PIXELS.predict_x0(seen, x, T))


def test_saved_and_loaded(tmp_path):
    edm = make_scheduler(400, prediction='edm', clip=False, sigma_data=.7)
    edm.save_pretrained(tmp_path/'edm')
    again = EDM.from_pretrained(tmp_path/'edm')
    assert torch.equal(noise_levels(again), noise_levels(edm)) and again.config.sigma_data == .7
    sampler = make_sampler('euler', edm, 'trailing')
    sampler.save_pretrained(tmp_path/'sampler')
    loaded = EDMSolver.from_pretrained(tmp_path/'sampler')
    for s in (sampler, loaded):
        set_steps(s, 7)
    assert torch.equal(loaded.sigmas, sampler.sigmas) and torch.equal(loaded.timesteps, sampler.timesteps)
    assert (loaded.config.solver_order, loaded.config.timestep_spacing, loaded.config.thresholding) == (
        1, 'trailing', False)


def test_what_does_not_fit_is_said():
    for wrong in (dict(beta='cosine'), dict(zero_snr=True)):
        with pytest.raises(ValueError, match="prediction='edm' has no betas"):
            make_scheduler(prediction='edm', **wrong)
    with pytest.raises(ValueError, match="unknown sampler 'ddpm' for a network that predicts 'edm'"):
        make_sampler('ddpm', PIXELS)
    with pytest.raises(ValueError, match="must be 'edm', not 'epsilon'"):
        EDM.from_config(make_scheduler().config)
