"""schedules: our formulas against diffusers' schedulers, for every schedule and every prediction"""
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from facegen.core import generator
from facegen.diffusion.schedules import (
    PREDICTIONS, SCHEDULES, add_noise, make_scheduler, predict_eps, predict_x0, snr, training_target)

CASES = [(b, p, z) for b in SCHEDULES for p in PREDICTIONS for z in (False, True) if not (z and p == 'epsilon')]


def batch(n=4, size=8):
    g = generator('test_noise')
    return torch.rand(n, 3, size, size, generator=g)*2 - 1, torch.randn(n, 3, size, size, generator=g)


@pytest.mark.parametrize('beta,prediction,zero', CASES)
def test_formulas_equal_diffusers(beta, prediction, zero):
    s = make_scheduler(beta=beta, prediction=prediction, zero_snr=zero)
    s.register_to_config(clip_sample=False)
    x0, eps = batch()
    t = torch.tensor([0, 250, 600, 998])
    xt = add_noise(x0, eps, t, s.alphas_cumprod)
    torch.testing.assert_close(xt, s.add_noise(x0, eps, t))
    out = torch.randn(x0.shape, generator=generator('out'))
    ddim = DDIMScheduler.from_config(s.config)
    ddim.set_timesteps(1000)
    for i, ti in enumerate(t):  # what DDPM and DDIM themselves call the predicted original sample
        want = s.step(out[i:i+1], int(ti), xt[i:i+1], generator=generator(0)).pred_original_sample
        torch.testing.assert_close(predict_x0(out, xt, t, s)[i:i+1], want, rtol=1e-4, atol=1e-4)
        theirs = ddim.step(out[i:i+1], int(ti), xt[i:i+1]).pred_original_sample
        torch.testing.assert_close(theirs, want, rtol=1e-4, atol=1e-4)
    target = dict(epsilon=eps, sample=x0, v_prediction=s.get_velocity(x0, eps, t))[prediction]
    torch.testing.assert_close(training_target(x0, eps, t, s), target)


@pytest.mark.parametrize('beta,prediction,zero', CASES)
def test_answer_and_way_back(beta, prediction, zero):
    s = make_scheduler(beta=beta, prediction=prediction, zero_snr=zero)
    x0, eps = (v.double() for v in batch())
    t = torch.tensor([1, 250, 600, 900])
    xt = add_noise(x0, eps, t, s.alphas_cumprod.double())
    out = training_target(x0, eps, t, s)
    torch.testing.assert_close(predict_x0(out, xt, t, s), x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predict_eps(out, xt, t, s), eps, rtol=1e-4, atol=1e-4)
    if prediction == 'v_prediction':  # a rotation: |x0|^2 + |eps|^2 = |xt|^2 + |v|^2
        torch.testing.assert_close(x0**2 + eps**2, xt**2 + out**2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('beta', SCHEDULES)
def test_schedules(beta):
    s = make_scheduler(beta=beta)
    abar = s.alphas_cumprod
    assert len(abar) == 1000 and (abar.diff() < 0).all() and 0 < abar[-1] < abar[0] < 1
    assert (snr(abar).diff() < 0).all()
    assert snr(torch.tensor([0., .5])).tolist() == [0., 1.]


def test_paper_schedule():
    s = make_scheduler()
    torch.testing.assert_close(s.betas, torch.linspace(1e-4, .02, 1000))
    assert s.config.prediction_type == 'epsilon' and s.config.clip_sample and s.config.variance_type == 'fixed_small'
    assert len(make_scheduler(T=2000).alphas_cumprod) == 2000


def test_zero_terminal_snr():
    for beta in SCHEDULES:
        plain = make_scheduler(beta=beta, prediction='v_prediction')
        zero = make_scheduler(beta=beta, prediction='v_prediction', zero_snr=True)
        assert zero.alphas_cumprod[-1] == 0
        torch.testing.assert_close(zero.alphas_cumprod[0], plain.alphas_cumprod[0])
        torch.testing.assert_close(zero.betas, rescale_zero_terminal_snr(plain.betas))
    x0, eps = batch()
    t = torch.full((4,), 999)
    torch.testing.assert_close(add_noise(x0, eps, t, zero.alphas_cumprod), eps)  # nothing of the face is left
    torch.testing.assert_close(training_target(x0, eps, t, zero), -x0)           # and v asks for the face


def test_variance_is_kept():
    x0, eps = torch.randn(2, 1000, 1, 8, 8, generator=generator('variance'))
    xt = add_noise(x0, eps, torch.arange(1000), make_scheduler().alphas_cumprod)
    assert abs(xt.flatten(1).var(1).mean() - 1) < .02


def test_a_sampler_is_no_noise_scheduler():
    "A sampler of a flow has another word for its prediction: it is refused, not taken for noise"
    from facegen.diffusion.samplers import make_sampler
    x0, eps = batch()
    with pytest.raises(ValueError, match="predicts 'flow_prediction': pass the noise scheduler of the training"):
        predict_x0(eps, x0, torch.arange(4), make_sampler('dpm++', make_scheduler(prediction='flow')))


@pytest.mark.parametrize('wrong,says', [
    (dict(prediction='edm', sigma_data=-1.), 'it must be above 0'),
    (dict(sigma_data=1.), "belongs to prediction='edm'"), (dict(beta='cubic'), 'linear, scaled_linear, cosine'),
    (dict(prediction='noise'), 'epsilon, sample, v_prediction, flow, edm'),
    (dict(zero_snr=True), 'take v_prediction'), (dict(T=100), 'of the signal'),
    (dict(beta='cosine', clip=False), 'take v_prediction')])
def test_wrong_calls(wrong, says):
    with pytest.raises(ValueError, match=says):
        make_scheduler(**wrong)


def test_short_schedules_that_work():
    assert make_scheduler(T=50, beta='cosine').alphas_cumprod[-1] < 1e-3
    assert make_scheduler(T=50, prediction='v_prediction', zero_snr=True).alphas_cumprod[-1] == 0


def test_devices_and_types_follow_the_batch():
    s, (x0, eps) = make_scheduler(), batch()
    t = torch.arange(4)
    assert add_noise(x0.half(), eps.half(), t, s.alphas_cumprod).dtype == torch.half
    assert add_noise(x0[:, :, 0], eps[:, :, 0], t, s.alphas_cumprod).shape == (4, 3, 8)
