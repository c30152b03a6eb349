"""Two scales: their limits, one batch a step, no answer computed in vain, an interval, and a negative condition."""
import pytest
import torch
from torch import nn

from facegen.conditioning.conditional_unet import load_denoiser, make_denoiser
from facegen.core import seed_all
from facegen.conditioning.guidance import ClassifierFreeGuidance, guidance_weights
from facegen.diffusion.schedules import make_scheduler
from facegen.diffusion.samplers import make_sampler, sample
from facegen.conditioning.condition_encoders import CONDITIONINGS, Cond
from facegen.synthetic.toyfaces import render_faces

torch.set_num_threads(1)


class Spy(nn.Module):
    "Counts its calls, and answers with the first known attribute, the known share of the mask, and a bit of x"
    def __init__(self):
        super().__init__()
        self.calls = []
    def forward(self, x, t, cond=None):
        self.calls.append((len(x), cond))
        if cond is None: return x
        a, m = cond.attrs[:, 0].nan_to_num(-2.), (cond.mask >= 0).float().mean((1, 2))
        return x + (a + 10*m)[:, None, None, None]


@pytest.fixture(scope='module')
def face(): return render_faces(n=4, size=32, seed=5)


@pytest.fixture(scope='module')
def cond(face): return Cond(face.attrs, face.mask)


@pytest.fixture(scope='module')
def model():
    seed_all(0)
    return make_denoiser('smoke', 'spatial', 32).eval()


def at(t, n=4): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.full((n,), t)


@torch.no_grad()
def ask(net, cond, t=400, **keys): return ClassifierFreeGuidance(net, **keys)(*at(t, len(cond)), cond)


def close(a, b): return torch.allclose(a, b, atol=1e-5)


def test_the_factors_add_up_to_one_and_have_their_limits():
    assert guidance_weights(1, 1) == (0, 0, 1) and guidance_weights(0, 0) == (1, 0, 0)
    assert guidance_weights(0, 1) == (0, 1, 0) and guidance_weights(3, 3) == (-2, 0, 3)
    for a in (-1., 0., .3, 1., 4.):
        for m in (0., .7, 1., 2.5):
            assert sum(guidance_weights(a, m)) == pytest.approx(1)


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_zero_and_one_are_the_plain_answers(conditioning, cond):
    seed_all(0)
    model = make_denoiser('smoke', conditioning, 32).eval()
    x, t = at(400)
    with torch.no_grad():
        assert torch.equal(ask(model, cond, attrs_scale=1, mask_scale=1), model(x, t, cond))
        assert torch.equal(ask(model, cond, attrs_scale=0, mask_scale=0), model(x, t))
        assert torch.equal(model(x, t, cond.drop()), model(x, t))
        assert torch.equal(ask(model, cond, attrs_scale=0, mask_scale=1), model(x, t, cond.drop(True, False)))
        unconditional = ClassifierFreeGuidance(model, 3, 2)(x, t)
        assert torch.equal(unconditional, model(x, t)), 'without a condition there is nothing to guide to'


@pytest.mark.parametrize('a,m', [(3., 2.), (3., 3.), (.5, 0.), (0., 4.), (1., 2.), (-1., 1.)])
def test_it_is_the_formula(model, cond, a, m):
    x, t = at(400)
    with torch.no_grad():
        none, some, both = (model(x, t, c) for c in (cond.drop(), cond.drop(True, False), cond))
    assert close(ask(model, cond, attrs_scale=a, mask_scale=m), none + m*(some - none) + a*(both - some))
    if a == m:
        assert close(ask(model, cond, attrs_scale=a, mask_scale=m), none + a*(both - none)), 'the classic form'


@pytest.mark.parametrize('a,m,passes', [
    (1, 1, 1), (0, 0, 1), (0, 1, 1), (3, 3, 2), (1, 0, 3), (3, 1, 2), (0, 3, 2), (3, 2, 3), (.5, 2., 3)])
def test_all_that_is_needed_and_no_more_in_one_batch(cond, a, m, passes):
    spy = Spy()
    ask(spy, cond, attrs_scale=a, mask_scale=m)
    assert [n for n, _ in spy.calls] == [4*passes]
    c = spy.calls[0][1]
    parts = [c[i:i + 4] for i in range(0, 4*passes, 4)]
    kinds = [(bool(p.attrs.isnan().all()), bool((p.mask == -1).all())) for p in parts]
    all_kinds = (True, True), (True, False), (False, False)
    assert kinds == [kind for kind, w in zip(all_kinds, guidance_weights(a, m)) if w]


def test_a_row_follows_its_own_condition_also_in_the_large_batch(model, cond):
    x, t = at(400)
    with torch.no_grad():
        rows = torch.cat([ClassifierFreeGuidance(model, 3, 2)(x[i:i + 1], t[:1], cond[i:i + 1]) for i in range(4)])
    assert close(ask(model, cond, attrs_scale=3, mask_scale=2), rows)


def test_outside_its_interval_the_answer_is_plain(cond):
    for t, on in ((0, False), (299, False), (300, True), (450, True), (600, True), (601, False), (999, False)):
        spy = Spy()
        out = ask(spy, cond, t, attrs_scale=3, mask_scale=2, interval=(.3, .6))
        assert spy.calls[0][0] == (12 if on else 4) and torch.equal(out, Spy()(*at(t), cond)) == (not on)
    for t in (0, 999):
        spy = Spy()
        ask(spy, cond, t, attrs_scale=3, mask_scale=2)
        assert spy.calls[0][0] == 12, 'by default always'
    spy = Spy()
    ask(spy, cond, 40, attrs_scale=3, mask_scale=2, interval=(.5, 1.), T=50)
    assert spy.calls[0][0] == 12
    spy = Spy()
    ask(spy, cond, 57, attrs_scale=3, mask_scale=2, interval=(0, .57), T=100)
    assert spy.calls[0][0] == 12, 'both ends belong to it'
    for wrong in ((.8, .2), (-.1, .5), (.5, 1.2)):
        with pytest.raises(ValueError, match='must be two shares between 0 and 1, low first'):
            ClassifierFreeGuidance(Spy(), interval=wrong)


def test_sampling_a_flow_makes_one_pass_where_guidance_is_off(cond):
    "Timesteps of a flow are T times its time, so (.2, .8) are the middle three fifths of the steps"
    spy, flow = Spy(), make_scheduler(prediction='flow', clip=False)
    guided = ClassifierFreeGuidance(spy, 3, 2, interval=(.2, .8))
    sample(guided, make_sampler('dpm++', flow), 4, 32, 20, cond)
    rows = [n for n, _ in spy.calls]
    on = [200 <= t <= 800 for t in range(1000, 0, -50)]
    assert rows == [12 if yes else 4 for yes in on] and sum(on) == 13


def test_a_negative_condition_takes_the_place_of_unknown(model, cond, face):
    away, x, t = face.attrs[3], *at(400)
    instead = Cond(away.expand(4, -1), cond.mask)
    with torch.no_grad():
        none, some, both = (model(x, t, c) for c in (instead.drop(False, True), instead, cond))
    def guided(c, *scales, negative=away):
        return ask(model, c, attrs_scale=scales[0], mask_scale=scales[1], negative_cond=negative)
    assert close(guided(cond, 3, 2), none + 2*(some - none) + 3*(both - some))
    assert close(guided(cond, 3, 2, negative=away.expand(4, -1)), guided(cond, 3, 2))
    assert torch.equal(guided(cond, 1, 1), both), 'at scale 1 it has no effect'
    assert close(guided(instead, 5, 2), guided(instead, 2, 2)), 'asked for and led away from'


def test_guidance_leads_further_along_a_straight_line(model, cond):
    a, b, c = (ask(model, cond, attrs_scale=s, mask_scale=1) for s in (1, 2, 3))
    assert close(c - b, b - a) and (b - a).abs().max() > 1e-3


def test_it_samples_like_the_denoiser_it_wraps(model, cond):
    "Scale 1 draws the same bits; other scales other faces; batches do not matter; dropout is off"
    def generate(net, batch=64):
        return sample(net, make_sampler('dpm++', make_scheduler()), 4, 32, 4, cond, seed=1, batch=batch)
    guided = ClassifierFreeGuidance(model, 3, 2)
    plain = generate(model)
    assert torch.equal(generate(ClassifierFreeGuidance(model)), plain) and not close(generate(guided), plain)
    assert torch.allclose(generate(guided, 3), generate(guided), atol=1e-4)
    seed_all(0)
    loose = ClassifierFreeGuidance(make_denoiser('smoke', 'described', 32).train(), 3, 2)
    assert torch.equal(generate(loose), generate(loose)) and loose.training and loose.model.training


def test_more_guidance_makes_faces_of_one_condition_alike_and_less_so_in_an_interval():
    "The kept network: standard deviation of each latent over sixteen noises"
    kept, _ = load_denoiser('longer-laptop-s0')
    one, sampler = render_faces(n=1, size=64, seed=5), make_sampler('dpm++', make_scheduler(prediction='flow'))
    same = Cond(one.attrs.expand(16, -1), one.mask.expand(16, -1, -1))
    def diversity(scale, interval=(0, 1)):
        guided = ClassifierFreeGuidance(kept, scale, scale, interval)
        return sample(guided, sampler, 16, 16, 8, same, seed=0, channels=4).std(0).mean().item()
    plain, middle, always = diversity(1.), diversity(4., (.2, .8)), diversity(4.)
    assert plain > 1.05*middle > 1.05*always
