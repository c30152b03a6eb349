"""Two scales: their limits, one batch a step, no answer asked for in vain, an interval, and what is led away from."""
import pytest
import torch
from torch import nn

from facegen.conditional import make_denoiser
from facegen.core import seed_all
from facegen.guidance import Guided, shares
from facegen.noise import make_scheduler
from facegen.sampling import make_sampler, sample
from facegen.tellers import TELLERS, Cond
from facegen.toyfaces import draw_faces

torch.set_num_threads(1)


class Spy(nn.Module):
    "Counts what it is asked, and answers with the first known attribute, the share of the mask that is told, and a bit of x"
    def __init__(self): super().__init__(); self.asked = []
    def forward(self, x, t, cond=None):
        self.asked.append((len(x), cond))
        if cond is None: return x
        a, m = cond.attrs[:, 0].nan_to_num(-2.), (cond.mask >= 0).float().mean((1, 2))
        return x + (a + 10*m)[:, None, None, None]


@pytest.fixture(scope='module')
def face(): return draw_faces(n=4, size=32, seed=5)


@pytest.fixture(scope='module')
def cond(face): return Cond(face.attrs, face.mask)


@pytest.fixture(scope='module')
def model(): seed_all(0); return make_denoiser('smoke', 'spatial', 32).eval()


def at(t, n=4): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.full((n,), t)


@torch.no_grad()
def ask(net, cond, t=400, **keys): return Guided(net, **keys)(*at(t, len(cond)), cond)


def close(a, b): return torch.allclose(a, b, atol=1e-5)


def test_the_factors_add_up_to_one_and_have_their_limits():
    assert (shares(1, 1), shares(0, 0), shares(0, 1), shares(3, 3)) == ((0, 0, 1), (1, 0, 0), (0, 1, 0), (-2, 0, 3))
    for a in (-1., 0., .3, 1., 4.):
        for m in (0., .7, 1., 2.5): assert sum(shares(a, m)) == pytest.approx(1)


@pytest.mark.parametrize('told', TELLERS)
def test_zero_and_one_are_the_plain_answers(told, cond):
    seed_all(0); model = make_denoiser('smoke', told, 32).eval(); x, t = at(400)
    with torch.no_grad():
        assert torch.equal(ask(model, cond, attrs=1, mask=1), model(x, t, cond))
        assert torch.equal(ask(model, cond, attrs=0, mask=0), model(x, t)) and torch.equal(model(x, t, cond.drop()), model(x, t))
        assert torch.equal(ask(model, cond, attrs=0, mask=1), model(x, t, cond.drop(True, False)))
        assert torch.equal(Guided(model, 3, 2)(x, t), model(x, t)), 'without a condition there is nothing to guide to'


@pytest.mark.parametrize('a,m', [(3., 2.), (3., 3.), (.5, 0.), (0., 4.), (1., 2.), (-1., 1.)])
def test_it_is_the_formula(model, cond, a, m):
    x, t = at(400)
    with torch.no_grad(): none, some, both = (model(x, t, c) for c in (cond.drop(), cond.drop(True, False), cond))
    assert close(ask(model, cond, attrs=a, mask=m), none + m*(some - none) + a*(both - some))
    if a == m: assert close(ask(model, cond, attrs=a, mask=m), none + a*(both - none)), 'the classic form with one scale'


@pytest.mark.parametrize('a,m,passes', [(1, 1, 1), (0, 0, 1), (0, 1, 1), (3, 3, 2), (1, 0, 3), (3, 1, 2), (0, 3, 2), (3, 2, 3), (.5, 2., 3)])
def test_all_that_is_needed_and_no_more_in_one_batch(cond, a, m, passes):
    spy = Spy(); ask(spy, cond, attrs=a, mask=m)
    assert [n for n, _ in spy.asked] == [4*passes]
    c = spy.asked[0][1]; kinds = [(bool(r.attrs.isnan().all()), bool((r.mask == -1).all())) for r in (c[i:i + 4] for i in range(0, 4*passes, 4))]
    assert kinds == [kind for kind, s in zip(((True, True), (True, False), (False, False)), shares(a, m)) if s]


def test_a_row_hears_its_own_condition_also_in_the_large_batch(model, cond):
    x, t = at(400)
    with torch.no_grad(): rows = torch.cat([Guided(model, 3, 2)(x[i:i + 1], t[:1], cond[i:i + 1]) for i in range(4)])
    assert close(ask(model, cond, attrs=3, mask=2), rows)


def test_outside_its_interval_the_answer_is_plain(cond):
    for t, on in ((0, False), (299, False), (300, True), (450, True), (600, True), (601, False), (999, False)):
        spy = Spy(); out = ask(spy, cond, t, attrs=3, mask=2, interval=(.3, .6))
        assert spy.asked[0][0] == (12 if on else 4) and torch.equal(out, Spy()(*at(t), cond)) == (not on)
    for t in (0, 999): spy = Spy(); ask(spy, cond, t, attrs=3, mask=2); assert spy.asked[0][0] == 12, 'by default always'
    spy = Spy(); ask(spy, cond, 40, attrs=3, mask=2, interval=(.5, 1.), T=50); assert spy.asked[0][0] == 12
    for wrong in ((.8, .2), (-.1, .5), (.5, 1.2)):
        with pytest.raises(ValueError, match='must be two shares between 0 and 1, low first'): Guided(Spy(), interval=wrong)


def test_a_negative_takes_the_place_of_not_known(model, cond, face):
    away, x, t = face.attrs[3], *at(400)
    instead = Cond(away.expand(4, -1), cond.mask)
    with torch.no_grad(): none, some, both = (model(x, t, c) for c in (instead.drop(False, True), instead, cond))
    assert close(ask(model, cond, attrs=3, mask=2, negative=away), none + 2*(some - none) + 3*(both - some))
    assert close(ask(model, cond, attrs=3, mask=2, negative=away.expand(4, -1)), ask(model, cond, attrs=3, mask=2, negative=away))
    assert torch.equal(ask(model, cond, attrs=1, mask=1, negative=away), both), 'at scale 1 it is not heard'
    assert close(ask(model, instead, attrs=5, mask=2, negative=away), ask(model, instead, attrs=2, mask=2, negative=away)), 'asked for and led away from'


def test_guidance_leads_further_along_a_straight_line(model, cond):
    a, b, c = (ask(model, cond, attrs=s, mask=1) for s in (1, 2, 3))
    assert close(c - b, b - a) and (b - a).abs().max() > 1e-3


def test_it_samples_like_the_denoiser_it_wraps(model, cond):
    "Scale 1 draws the same bits; other scales other faces; batches do not matter; dropout is off"
    draw = lambda net, batch=64: sample(net, make_sampler('dpm++', make_scheduler()), 4, 32, 4, cond, seed=1, batch=batch)
    assert torch.equal(draw(Guided(model)), draw(model)) and not close(draw(Guided(model, 3, 2)), draw(model))
    assert torch.allclose(draw(Guided(model, 3, 2), 3), draw(Guided(model, 3, 2)), atol=1e-4)
    seed_all(0); loose = Guided(make_denoiser('smoke', 'described', 32).train(), 3, 2)
    assert torch.equal(draw(loose), draw(loose)) and loose.training and loose.model.training
