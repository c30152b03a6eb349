"""Figures write what their results say, say what is missing, and are the same bytes when drawn again."""
import numpy as np, pandas as pd, pytest, torch
from conftest import run_cells
from facegen import compare, rows, show, study
from facegen.core import save_result
from facegen.toyfaces import draw_faces

SCALE = 'smoke'


def frame(values, half=.03, seeds=None, metric='miou', n=256):
    "Records of one row"
    return pd.DataFrame([dict(metric=metric, value=v, low=v - half, high=v + half, n=n, seed=s) for s, v in zip(seeds or range(len(values)), values)])


def test_a_difference_is_between_its_limits_and_turns_its_sign_with_the_rows():
    a, b = frame([.3, .4]), frame([.5, .45], half=.1)
    d, e = compare.difference(a, b, 'miou'), compare.difference(b, a, 'miou')
    assert d.low < d.value < d.high and np.allclose(d[:3], [-e.value and -e[0], -e.high, -e.low])
    assert np.isclose(d.value, .125) and np.isclose(d.high - d.value, np.hypot(.03, .1)) and d.n == 256


def test_a_difference_counts_only_seeds_that_both_have():
    d = compare.difference(frame([.3, .9], seeds=[0, 1]), frame([.5, .1], seeds=[0, 2]), 'miou')
    assert np.allclose(d.each, [.2])
    for bad in (frame([.5], seeds=[4]), frame([.5, .6], seeds=[0, 0])):
        with pytest.raises(ValueError, match='cannot be paired'): compare.difference(frame([.3]), bad, 'miou')


def test_silence_needs_overlap_and_disjoint_intervals_are_never_silent():
    for gap in np.linspace(-.2, .2, 41):
        a, b = frame([.5]), frame([.5 + gap]); said = compare.verdict(compare.difference(a, b, 'miou'))
        if said.startswith('no difference'): assert abs(gap) <= .06 + 1e-9  # the two intervals overlap
        if abs(gap) > .06 + 1e-9: assert said == ('more' if gap > 0 else 'less')
    assert compare.verdict(compare.difference(frame([.5, .5], .01), frame([.9, .4], .01), 'miou')) == 'the seeds disagree'


def test_a_sentence_holds_both_values_and_the_verdict():
    s = compare.sentence('mIoU', frame([.3]), frame([.6]), 'miou')
    assert s == 'mIoU 0.300 -> 0.600 (+0.300 [+0.258, +0.342], more)'
    assert 'no difference that n = 256 can show' in compare.sentence('mIoU', frame([.3]), frame([.31]), 'miou')


def test_a_drawn_mask_mirrors_as_the_mask_does():
    from facegen.faces import flip
    f = draw_faces(n=4, size=32, seed=3)
    assert torch.allclose(compare.mirrored(show.mask_rgb(f.mask)), show.mask_rgb(flip(f).mask), atol=1e-6)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path)); monkeypatch.delenv('FACEGEN_FACES', raising=False); return tmp_path.resolve()


def said(metric, value, half=.02, floor=.5, ceiling=.9, n=256, **tags):
    return dict(metric=metric, value=value, low=value - half, high=value + half, n=n, floor=floor, ceiling=ceiling, classifier='a classifier', parser='a parser', **tags)


def distance(value, **tags): return said('frechet', value, 1.5, 3., None, floor_low=2., floor_high=4., network='a classifier', **tags)


def made_up(row, seed=0, scale=SCALE, rank=.5, nce=.3, ba=.7, miou=.4, mirror=.5, frechet=20.):
    "The result of a row of the ladder, with its strips"
    name = rows.run_name(row, scale, seed); job = rows.job(name); faces = draw_faces(n=8, size=32, seed=seed)
    params = rows.default_params(job['notebook']) | job['params'] | dict(size=32, trained_on=100, parameters=2e6, flipped=['Wearing_Lipstick', '5_o_Clock_Shadow']*4)
    metrics = [said('embedding_rank', rank, floor=.4, ceiling=1.), said('published_nce', nce, floor=2., ceiling=0.), said('balanced_accuracy', ba),
               said('balanced_accuracy_hidden', ba - .05), said('average_precision', ba - .2, floor=.3), said('flip_success', .5, floor=.2, ceiling=None),
               said('flip_leakage', .05, floor=.3, ceiling=None), said('miou', miou, floor=.2, ceiling=.8), said('boundary_f1', miou, floor=.2, ceiling=.8),
               said('mirror_followed', mirror, n=128), distance(frechet)]
    hidden = '_' if name[0] == '_' else ''
    show.save_gallery(torch.cat([faces.image, show.mask_rgb(faces.mask)]), f'{hidden}asked-toy-32')
    for kind in ('drawn', 'mask-mirrored', 'one-attribute-flipped'): show.save_gallery(faces.image, f'{name}-{kind}')
    save_result(name, params, metrics)


def made_up_guidance(scale=SCALE):
    name = rows.run_name('guidance', scale, 0); job = rows.job(name); params = rows.default_params(job['notebook']) | job['params']; metrics = []
    settings = [(*map(float, s.split()), 0., 1.) for s in params['settings'].split(',')] + [(3., 2., 0., .5), (3., 2., .5, 1.)]
    for a, m, low, high in settings:
        tags = dict(attrs_scale=a, mask_scale=m, low_t=low, high_t=high); on = high - low
        metrics += [said('balanced_accuracy', .84 - .26*2.7**-(a*on + .1) - .01*m, **tags), said('miou', .78 - .4*2.7**-(m*on + .1) - .012*a, floor=.2, ceiling=.8, **tags),
                    said('spread', .9 - .06*a - .05*m, floor=0., ceiling=1., n=64, **tags), distance(14 + (a - 2)**2 + (m - 1.5)**2, **tags)]
        show.save_gallery(draw_faces(n=8, size=32).image, f'{name}-{a:g}-{m:g}')
    faces = draw_faces(n=8, size=32); show.save_gallery(torch.cat([faces.image, show.mask_rgb(faces.mask)]), f'{name}-asked')
    save_result(name, params, metrics)


def drawn(notebook, home, scale=SCALE):
    "Run a figure notebook's code here, which is quicker than in a kernel; returns the figure's bytes and all that was printed"
    text, _ = run_cells(notebook, scale=scale)
    return (home/'figures'/f'{study.figure_name(rows.FIGURES[notebook], scale)}.png').read_bytes(), text


def test_infonce_says_what_moves_and_what_does_not(home):
    with pytest.raises(ValueError, match="no results of row 'attrs'"): drawn('41_fig_infonce', home)
    for s in (0, 1): made_up('attrs', s); made_up('attrs+nce', s, rank=.8)
    a, text = drawn('41_fig_infonce', home)
    assert '1 of 2 measures move (rank agreement: more); with the loss, likeness is ranked better than before' in text and '2 trainings each' in text
    assert 'none of the 6 measures moves by more than n = 256 can show' in text and drawn('41_fig_infonce', home)[0] == a and len(a) > 20_000
    for s in (0, 1): made_up('attrs+nce', s, rank=.5, frechet=40.)  # worse is said as gladly
    assert 'none of the 2' in (text := drawn('41_fig_infonce', home)[1]) and '1 of 6 measures move (Frechet distance: more)' in text


def test_pooled_answers_no_hardly_a_little_or_yes(home):
    with pytest.raises(ValueError, match="no results of row 'attrs'"): drawn('42_fig_pooled', home)
    made_up('attrs', miou=.3); made_up('published', miou=.32); made_up('spatial', miou=.7, mirror=.95)
    a, text = drawn('42_fig_pooled', home)
    assert text.startswith('No: with row published 50% of n = 128 faces follow a mirrored mask, no more than chance') and 'published 4%, spatial 80%' in text and drawn('42_fig_pooled', home)[0] == a
    made_up('published', mirror=.525); assert drawn('42_fig_pooled', home)[1].startswith('Hardly: with row published 52% of n = 128')  # attrs has 50 %
    made_up('published', mirror=.6); assert drawn('42_fig_pooled', home)[1].startswith('A little')
    made_up('published', mirror=.95); assert drawn('42_fig_pooled', home)[1].startswith('Yes')


def test_guidance_compares_one_scale_with_two_and_the_command_draws_the_same_bytes(home):
    made_up('spatial+guided', miou=.7)
    with pytest.raises(ValueError, match="no results of row 'guidance'"): drawn('43_fig_guidance', home)
    made_up_guidance(); a, text = drawn('43_fig_guidance', home)
    assert 'Two scales (' in text and 'of the ceiling in attributes' in text and 'the price: less spread' in text
    assert study.draw('43_fig_guidance', SCALE).read_bytes() == a
