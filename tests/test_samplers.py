"""samplers: single steps against diffusers, whole paths against data whose best denoiser is known in closed form"""
import pytest
import torch
from torch import nn

from facegen.core import generator
from facegen.diffusion.schedules import PREDICTIONS, make_scheduler, predict_eps, predict_x0
from facegen.diffusion.samplers import SAMPLERS, denoise, ideal_denoiser, make_sampler, sample, set_steps

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
    for steps, says in ((30, '25 or 40'), (61, '50 or 100'), (0, 'take 1'), (2000, '1000')):
        with pytest.raises(ValueError, match=says):
            set_steps(s, steps)


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
    with pytest.raises(ValueError, match='trailing or leading'):
        make_sampler('ddim', make_scheduler(), 'linspace')
