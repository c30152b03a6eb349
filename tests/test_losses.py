"""One loss for every process: what is asked, how often, and at what price"""
from types import SimpleNamespace

import pytest
import torch

from facegen.diffusion.losses import (
    LOSS_WEIGHTS, THIRDS, TIMESTEP_SAMPLING, StepRandom, diffusion_loss, draw_timesteps_of, thirds_chances, weighting)
from facegen.diffusion.samplers import ideal_denoiser
from facegen.diffusion.schedules import (
    PREDICTIONS, PROCESSES, first_timestep, make_scheduler, noise_levels, predict_eps, signal_and_noise,
    training_target)
from facegen.synthetic.toyfaces import render_faces

KINDS = (*PREDICTIONS, *PROCESSES)


def every(test): return pytest.mark.parametrize('kind', KINDS)(test)


@every
@pytest.mark.parametrize('timestep_sampling', TIMESTEP_SAMPLING)
def test_a_slice_gives_the_numbers_of_the_whole(kind, timestep_sampling):
    face, calls = render_faces(n=6, size=16, seed=1), []
    loss = diffusion_loss(make_scheduler(prediction=kind), condition_of=lambda face, rng: rng.rand(len(face.image)),
                          timestep_sampling=timestep_sampling)
    def net(x, t, cond):
        calls.append((t, cond))
        return x*(t/500).view(-1, 1, 1, 1)
    part = lambda a: loss(net, type(face)(*(x[a:a+2] for x in face)), StepRandom(2, 5, 6, a, a+2))
    whole = loss(net, face, StepRandom(2, 5, 6))
    parts = torch.cat([part(a) for a in (0, 2, 4)])
    assert whole.shape == (6,) and torch.equal(whole, parts) and len(set(whole.tolist())) == 6
    for i in (0, 1):
        assert torch.equal(calls[0][i], torch.cat([c[i] for c in calls[1:]]))


@every
def test_who_knows_the_answer_has_no_loss_and_the_ideal_denoiser_the_least(kind):
    face, n = render_faces(n=32, size=16, seed=1), 32
    scheduler = make_scheduler(prediction=kind)
    rng = StepRandom(0, 0, n)
    t, eps = draw_timesteps_of(scheduler, 'uniform')(rng, n), rng.randn(face.image.shape)
    answer = training_target(face.image, eps, t, scheduler)
    loss = lambda net: diffusion_loss(scheduler)(net, face, StepRandom(0, 0, n))
    assert loss(lambda x, t: answer).max() < 1e-8
    torch.testing.assert_close(loss(lambda x, t: answer + .5), torch.full((n,), .25))
    ideal = ideal_denoiser(face.image, scheduler, .02)
    assert loss(ideal).mean() < loss(lambda x, t: ideal(x, t) + .1).mean()
    assert loss(ideal).mean() < min(loss(lambda x, t: 0*x).mean(), loss(lambda x, t: ideal(x, t)*.9).mean())


def test_streams_of_the_first_version_stay():
    "Timesteps and noise of a seed and a step, written down before the samplings were one family"
    def drawn(kind, row):
        seen = []
        draw = draw_timesteps_of(make_scheduler(prediction=kind), row)
        rng = StepRandom(3, 4, 6)
        seen = draw(rng, 6).tolist()
        again = StepRandom(3, 4, 6)
        if row == 'uniform':
            first = 1 if kind == 'flow' else 0
            assert seen == again.randint(first, 1000 + first, 6).tolist()
        else:
            assert seen == (again.randn((6,)).sigmoid()*1000).ceil().long().clamp(1, 1000).tolist()
        assert torch.equal(rng.randn((6, 2)), again.randn((6, 2))), 'and no number more is drawn'
    for kind in ('epsilon', 'flow'):
        drawn(kind, 'uniform')
    drawn('flow', 'logit-normal')


def test_logit_normal():
    n, rng = 40_000, StepRandom(0, 0, 40_000)
    draw = lambda T: draw_timesteps_of(make_scheduler(T, prediction='flow'), 'logit-normal')
    t = draw(1000)(rng, n)
    assert t.dtype == torch.int64 and 1 <= t.min() and t.max() <= 1000
    logit = (t/1000 - 5e-4).logit()  # the middle of what was rounded up to t
    assert abs(logit.mean()) < .02 and abs(logit.std() - 1) < .02
    assert abs((draw(2)(StepRandom(0, 2, n), n) == 1).float().mean() - .5) < .01, 'as often early as late'
    extreme = SimpleNamespace(randn=lambda shape: torch.tensor([-200., -20., 20., 200.]))
    assert draw(1000)(extreme, 4).tolist() == [1, 1, 1000, 1000]


@every
def test_uniform_is_uniform(kind):
    scheduler, n = make_scheduler(prediction=kind), 40_000
    t = draw_timesteps_of(scheduler, 'uniform')(StepRandom(0, 0, n), n) - first_timestep(scheduler)
    assert t.min() == 0 and t.max() == 999
    assert (torch.histc(t.float(), 10, -.5, 999.5)/n - .1).abs().max() < .01


@every
def test_log_normal_is_edms_in_noise_over_signal(kind):
    "P_mean -1.2, P_std 1.2 (Table 1), cut off where a process has no such levels"
    scheduler, n = make_scheduler(prediction=kind), 40_000
    t = draw_timesteps_of(scheduler, 'log-normal')(StepRandom(0, 0, n), n) - first_timestep(scheduler)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    log_level = noise_levels(scheduler)[t].log()
    assert abs(log_level.quantile(.5) + 1.2) < .03
    for q in (.1587, .8413):  # one standard deviation
        assert abs((log_level.quantile(q) + 1.2).abs() - 1.2) < .05


def test_log_normal_goes_with_the_size_of_the_data():
    "Latents of unit size: all noise twice as large"
    draw = lambda sigma_data: make_scheduler(prediction='edm', sigma_data=sigma_data)
    level = {d: noise_levels(draw(d))[draw_timesteps_of(draw(d), 'log-normal')(StepRandom(0, 0, 9999), 9999)].median()
             for d in (.5, 1.)}
    assert abs(level[1.]/level[.5] - 2) < .05


@pytest.mark.parametrize('T', [12, 1000])
def test_thirds_have_the_published_weights(T):
    "x 2.5 in the noisier half; x 3 in the middle half; x 1.5 and x 2.5 in the two quarters next to the clean end"
    chances = thirds_chances(T)
    assert torch.allclose(chances.sum(1), torch.ones(3)) and chances.min() > 0
    quarters = (chances/chances.amin(1, keepdim=True)).view(3, 4, T//4)
    assert torch.allclose(quarters.std(2), torch.zeros(3, 4), atol=1e-5), 'flat within a quarter'
    want = torch.tensor([[1, 1, 2.5, 2.5], [1, 3, 3, 1], [1.5, 2.5, 1, 1]])
    assert torch.allclose(quarters.mean(2), want, atol=1e-4)


def test_thirds_without_factors_are_uniform(monkeypatch):
    monkeypatch.setattr('facegen.diffusion.losses.THIRDS', tuple(tuple((a, b, 1.) for a, b, _ in t) for t in THIRDS))
    assert torch.allclose(thirds_chances(50), torch.full((3, 50), .02))


@every
def test_thirds_are_drawn_with_their_chances_each_in_its_third(kind):
    scheduler, n = make_scheduler(prediction=kind), 40_000
    draw = draw_timesteps_of(scheduler, 'thirds')
    for step, steps, third in ((0, 9, 0), (2, 9, 0), (3, 9, 1), (5, 9, 1), (6, 9, 2), (8, 9, 2), (0, 1, 0), (9, 9, 2)):
        t = draw(StepRandom(0, step, n, steps=steps), n) - first_timestep(scheduler)
        assert t.dtype == torch.int64 and 0 <= t.min() and t.max() <= 999
        want = thirds_chances(1000)[third].view(10, 100).sum(1)
        assert (torch.histc(t.float(), 10, -.5, 999.5)/n - want).abs().max() < .01, (step, steps)
    ends = SimpleNamespace(step=0, steps=1, rand=lambda n: torch.tensor([0., 1 - 2**-24]))
    assert (draw(ends, 2) - first_timestep(scheduler)).tolist() == [0, 999]


@every
@pytest.mark.parametrize('name', LOSS_WEIGHTS)
def test_a_weighting_says_the_same_for_every_prediction(kind, name):
    "A wrong answer costs w(SNR) times the square of the error in the noise that it means, the epsilon form"
    scheduler = make_scheduler(prediction=kind)
    first, x0 = first_timestep(scheduler), torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))*2 - 1
    t = torch.tensor([30, 200, 400, 600, 800, 950]) + first
    eps, off = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    right = training_target(x0, eps, t, scheduler)
    xt, off = scheduler.add_noise(x0, eps, t), .1*off
    of_noise = (predict_eps(right + off, xt, t, scheduler) - predict_eps(right, xt, t, scheduler)).double()
    alpha, sigma = (w.flatten().double() for w in signal_and_noise(scheduler, t, x0))
    want = LOSS_WEIGHTS[name]((alpha/sigma)**2)*of_noise.square().mean((1, 2, 3))
    got = weighting(name, scheduler)(t)*off.square().mean((1, 2, 3))
    torch.testing.assert_close(got.double(), want, rtol=.02, atol=1e-7)


@every
def test_weights_are_finite_at_both_ends_and_stay_on_their_device(kind):
    scheduler = make_scheduler(prediction=kind)
    ends = torch.tensor([0, 999]) + first_timestep(scheduler)
    for name in LOSS_WEIGHTS:
        weight = weighting(name, scheduler)
        assert weight(ends).isfinite().all() and (weight(ends) >= 0).all()
        meta = weight(ends.to('meta'))
        assert meta.device.type == 'meta' and meta.shape == (2,)


def test_a_table_is_copied_once_a_device(monkeypatch):
    copies, to = [], torch.Tensor.to
    weight = weighting('min-snr', make_scheduler())
    def counted(self, *args, **keys):
        if self.shape == (1000,):
            copies.append(args)
        return to(self, *args, **keys)
    monkeypatch.setattr(torch.Tensor, 'to', counted)
    for _ in range(5):
        weight(torch.tensor([3, 4]))
    assert len(copies) == 1


@every
def test_the_config_says_what_defines_the_loss(kind):
    scheduler = make_scheduler(prediction=kind)
    configs = [diffusion_loss(scheduler, timestep_sampling=row).config for row in TIMESTEP_SAMPLING]
    assert [c['timestep_sampling'] for c in configs] == list(TIMESTEP_SAMPLING)
    assert configs[0]['prediction_type'] == kind and configs[0]['num_train_timesteps'] == 1000
    if kind == 'edm':
        assert diffusion_loss(make_scheduler(prediction='edm', sigma_data=1.)).config['sigma_data'] == 1.


def test_an_unknown_row_is_refused():
    with pytest.raises(ValueError, match="unknown timestep_sampling 'late': it must be one of uniform, logit-normal"):
        diffusion_loss(make_scheduler(), timestep_sampling='late')
