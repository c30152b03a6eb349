"""The figures about LoRA say what their results say, whichever way those fall, and are the same bytes when drawn again."""
import pytest, torch
from conftest import run_cells
from facegen import rows, show, study
from facegen.core import save_result
from facegen.toyfaces import draw_faces

SCALE = 'smoke'


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path)); monkeypatch.delenv('FACEGEN_FACES', raising=False); return tmp_path.resolve()


def said(metric, value, half, floor, ceiling, **tags):
    return dict(metric=metric, value=value, low=value - half, high=value + half, n=64, floor=floor, ceiling=ceiling, network='a classifier', **tags)


def made_up(row, kernel, ba=.6, seed=0, guidance=2., energy=.5, **change):
    "The result of an arm, with its strips"
    name = rows.run_name(row, SCALE, seed); job = rows.job(name); p = rows.default_params(job['notebook']) | job['params'] | change
    empty = (p['asked'] or p['told']) == 'empty'; method = p['method']; lora = method == 'lora'; g = 1. if empty else guidance
    p |= dict(base='stable-smoke-s0', trained_on=16, trained=1000*p['rank'] if lora else 250_000*(method == 'full'), frozen=0 if method == 'full' else 250_000,
              tried={'1': kernel} if empty else {'1': kernel + .2, '2': kernel}, guidance=g,
              energy={str(k): energy**(1/k) for k in (1, 2, 4, 8, 16, 32, 64)} if method == 'full' else None)
    if not lora: p |= dict(rank=None, alpha=None)
    metrics = [said('kernel', kernel, .1, -.01, .3, guidance=g, chosen=True), said('balanced_accuracy', ba, .02, .5, .9, guidance=g, chosen=True),
               said('balanced_accuracy_hidden', ba, .02, .5, .9, guidance=g, chosen=True), said('copy_share', .1, .05, 1., .1, guidance=g, chosen=True)]
    if g > 1: metrics += [m | dict(value=m['value'] + .2, high=m['high'] + .2, guidance=1., chosen=False) for m in metrics]
    show.save_gallery(draw_faces(n=8, size=32, seed=seed).image, f'{name}-chosen')
    if lora: show.save_gallery(torch.cat([draw_faces(n=5, size=32, seed=seed).image]*6), f'{name}-strength', ncol=5)
    save_result(name, p, metrics)


def drawn(notebook, home):
    text, _ = run_cells(notebook, scale=SCALE)
    return (home/'figures'/f'{study.figure_name(rows.FIGURES[notebook], SCALE)}.png').read_bytes(), text


def arms(base=4., full=.6, uncond=.9, lora=.5, ba=.8):
    for s in (0, 1):
        made_up('zero-shot', base, .6, s); made_up('full', full, .8, s); made_up('lora-uncond', uncond, .5, s); made_up('lora', lora, ba, s)


def test_lora_says_whether_it_helps_and_whether_attributes_help_more(home):
    with pytest.raises(ValueError, match="no results of row 'zero-shot'"): drawn('47_fig_lora', home)
    arms(); a, text = drawn('47_fig_lora', home)
    assert text.startswith('Yes, it helps, and it helps more with attributes. Distance, base -> LoRA: 4.00 -> 0.50') and 'With attributes it also listens' in text
    assert drawn('47_fig_lora', home)[0] == a and len(a) > 20_000
    arms(lora=.9, ba=.5); text = drawn('47_fig_lora', home)[1]
    assert 'Yes, it helps, and no difference between with and without attributes is shown' in text and 'Nor is it shown to listen better' in text
    arms(lora=5., ba=.4); text = drawn('47_fig_lora', home)[1]
    assert text.startswith('No, it harms, and with attributes it is farther') and 'With attributes it even listens less' in text
    arms(base=.5, lora=.5); assert drawn('47_fig_lora', home)[1].startswith('It is not shown to help')
    made_up('lora-silent', .7, asked='published'); made_up('zero-shot-uncond', 4.2)
    assert drawn('47_fig_lora', home)[0] != a


def test_thin_names_the_thinnest_rank_that_is_enough(home):
    arms()
    with pytest.raises(ValueError, match="no results of row 'lora-r1' or"): drawn('48_fig_ranks', home)
    for row, k in (('lora-r1', 1.5), ('lora-r2', .55), ('lora-r16', .5), ('lora-x1', .9), ('lora-x6', .7)): made_up(row, k)
    a, text = drawn('48_fig_ranks', home)
    assert text.startswith('Rank 2 is thin enough: 0.8 % of the denoiser') and 'Even rank 1 (0.4 % of the denoiser) goes a long way from nothing trained, 4.00 -> 1.50' in text and '84 % lies in the first 4 directions' in text
    assert drawn('48_fig_ranks', home)[0] == a
    made_up('lora-r1', .5); assert drawn('48_fig_ranks', home)[1].startswith('Rank 1 is thin enough')
    for row in ('lora-r1', 'lora-r2'): made_up(row, 1.5)
    assert drawn('48_fig_ranks', home)[1].startswith('Thinner than rank 4 costs: rank 4 -> 2, +1.00')


def test_strength_shows_every_strength_of_both_adapters(home):
    with pytest.raises(ValueError, match="no results of row 'lora'"): drawn('49_fig_strength', home)
    arms(); a, _ = drawn('49_fig_strength', home); assert drawn('49_fig_strength', home)[0] == a and len(a) > 20_000
