"""Figures write what their results say, say what is missing, and are the same bytes when drawn again."""
import numpy as np, pandas as pd, pytest, torch
from conftest import run_cells
from facegen.study import comparisons, plots
from facegen.study import experiments
from facegen import plotting
from facegen.study import runner
from facegen.core import save_result
from facegen.evaluation.paired_bootstrap import t_interval
from facegen.synthetic.toyfaces import render_faces

SCALE = 'smoke'


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    monkeypatch.delenv('FACEGEN_OUT', raising=False)
    return tmp_path.resolve()


def frame(values, half=.03, seeds=None, metric='miou', n=256):
    "Records of one experiment"
    return pd.DataFrame([dict(metric=metric, value=v, low=v - half, high=v + half, n=n, seed=s)
                         for s, v in zip(seeds or range(len(values)), values)])


def test_a_difference_is_between_its_limits_and_turns_its_sign_with_the_rows():
    a, b = frame([.3, .4]), frame([.5, .45], half=.1)
    d, e = comparisons.difference(a, b, 'miou'), comparisons.difference(b, a, 'miou')
    assert d.low < d.value < d.high and np.allclose(d[:3], [-e.value and -e[0], -e.high, -e.low])
    assert np.isclose(d.value, .125) and np.isclose(d.high - d.value, np.hypot(.03, .1)) and d.n == 256


def test_a_difference_counts_only_seeds_that_both_have():
    d = comparisons.difference(frame([.3, .9], seeds=[0, 1]), frame([.5, .1], seeds=[0, 2]), 'miou')
    assert np.allclose(d.per_seed, [.2])
    for bad in (frame([.5], seeds=[4]), frame([.5, .6], seeds=[0, 0])):
        with pytest.raises(ValueError, match='cannot be paired'):
            comparisons.difference(frame([.3]), bad, 'miou')


def test_seeds_decide_between_trainings_and_faces_within_one():
    for gap in np.linspace(-.2, .2, 41):
        one, three = (comparisons.difference(frame([.5]*n), frame([.5 + gap + e for e in (.01, -.01, 0.)[:n]]), 'miou')
                      for n in (1, 3))
        assert comparisons.verdict(one) == 'one seed decides nothing'
        low, high = t_interval(three)
        direction = 'higher' if low > 0 else 'lower' if high < 0 else 'not decided by 3 seeds'
        assert comparisons.verdict(three) == direction
        assert comparisons.decided(three) == (direction in ('higher', 'lower'))
        word = comparisons.verdict_on_faces(one)
        if abs(gap) > .06 + 1e-9:  # disjoint intervals are never silent
            assert word == ('higher' if gap > 0 else 'lower')
        assert word.startswith('no difference that n = 256') == (one.low <= 0 <= one.high)


def test_a_sentence_holds_both_values_and_the_verdict():
    s = comparisons.sentence('mIoU', frame([.3, .3]), frame([.6, .6]), 'miou')
    assert s == 'mIoU 0.300 -> 0.600 (+0.300 [+0.258, +0.342], higher)'
    assert 'one seed decides nothing' in comparisons.sentence('mIoU', frame([.3]), frame([.6]), 'miou')


def test_a_value_is_reproduced_within_what_one_more_seed_would_give():
    "The limit of the prediction interval, both sides; three equal seeds leave the interval over faces to decide"
    seeds = [1., 2., 3.]
    limit = 4.3027*(4/3)**.5
    assert comparisons.reproduced(2 + .99*limit, seeds) == comparisons.reproduced(2 - .99*limit, seeds) == 'reproduced'
    assert comparisons.reproduced(2 - 1.01*limit, seeds) == f'outside by {1.01*limit:.1f} sd'
    assert comparisons.reproduced(2., []) == 'nothing to compare with'
    assert comparisons.reproduced(2., [2.]) == 'one seed: cannot be told'
    assert comparisons.reproduced(.9, [1., 1.], .8, .95) == 'outside: all seeds are equal'
    assert comparisons.reproduced(.9, [1., 1.], .8, 1.) == 'reproduced'


def test_a_bootstrap_is_kept_and_comes_back_to_the_bit(home, monkeypatch):
    g = torch.Generator().manual_seed(1)
    one, two = ([dict(sides=torch.rand(60, generator=g)) for _ in range(2)] for _ in range(2))
    d = comparisons.remembered_bootstrap(one, two, 'mirror_followed')
    assert d == comparisons.paired_bootstrap(one, two, 'mirror_followed')
    monkeypatch.setattr(comparisons, 'paired_bootstrap', lambda *_: 1/0)
    monkeypatch.setattr(comparisons, 'bootstrap_digest', lambda *_: next(kept.glob('*')).stem)
    kept = home/'data/results/_differences'
    assert comparisons.remembered_bootstrap(one, two, 'mirror_followed') == d
    next(kept.glob('*')).write_text('[1, 2')  # half a file is measured again
    with pytest.raises(ZeroDivisionError):
        comparisons.remembered_bootstrap(one, two, 'mirror_followed')


def test_a_digest_changes_with_tables_order_and_metric():
    a, b = [dict(sides=torch.arange(4.))], [dict(sides=torch.tensor([0., 1., 2., 3.0001]))]
    digests = [comparisons.bootstrap_digest(*x, 'mirror_followed') for x in ((a, b), (b, a), (a, a), (a*2, b*2))]
    assert len(set(digests)) == 4


def test_the_demonstration_holds_its_results_against_the_committed_ones(home, monkeypatch):
    for s in (0, 1, 2):
        made_up('attrs', s, 'demo', miou=.3 + .01*s)
    monkeypatch.setenv('FACEGEN_OUT', 'demo')
    made_up('attrs', 0, 'demo', miou=.305)
    t = comparisons.reproduction_table('demo', ['attrs']).set_index('metric')
    assert t.loc['miou', ['value', 'committed', 'sd', 'seeds']].tolist() == ['0.305', '0.310', '0.010', 3]
    assert set(t.verdict) == {'reproduced'}
    made_up('attrs', 0, 'demo', miou=.4, ba=.9)
    t = comparisons.reproduction_table('demo', ['attrs']).set_index('metric')
    assert t.verdict['miou'] == 'outside by 9.0 sd' and t.verdict['balanced_accuracy'] == 'outside: all seeds are equal'


def test_a_drawn_mask_mirrors_as_the_mask_does():
    from facegen.data.faces import flip_faces
    f = render_faces(n=4, size=32, seed=3)
    assert torch.allclose(plots.mirrored_colours(plotting.mask_rgb(f.mask)), plotting.mask_rgb(flip_faces(f).mask),
                          atol=1e-6)


def said(metric, value, half=.02, chance=.5, upper=.9, n=256, **tags):
    return dict(metric=metric, value=value, low=value - half, high=value + half, n=n, chance=chance, upper=upper,
                classifier='a classifier', parser='a parser', **{'reference': None, **tags})


def distance(value, **tags):
    return said('frechet', value, 1.5, None, None, reference=3., reference_low=2., reference_high=4.,
                network='a classifier', **tags)


def made_up(row, seed=0, scale=SCALE, rank=.5, nce=.3, ba=.7, miou=.4, mirror=.5, frechet=20.):
    "The result of a conditional experiment, with its strips"
    name = experiments.run_name(row, scale, seed)
    job = experiments.job(name)
    faces = render_faces(n=8, size=32, seed=seed)
    flipped = ['Wearing_Lipstick', '5_o_Clock_Shadow']*4
    params = experiments.default_params(job['notebook']) | job['params']
    params |= dict(size=32, trained_on=100, parameters=2e6, flipped=flipped)
    metrics = [said('embedding_rank', rank, chance=.4, upper=1.), said('published_nce', nce, chance=2., upper=0.),
               said('balanced_accuracy', ba), said('balanced_accuracy_hidden', ba - .05),
               said('average_precision', ba - .2, chance=.3), said('flip_success', .5, chance=.2, upper=None),
               said('flip_leakage', .05, chance=.3, upper=None), said('miou', miou, chance=.2, upper=.8),
               said('boundary_f1', miou, chance=.2, upper=.8), said('mirror_followed', mirror, n=128),
               distance(frechet), *(distance(frechet) | dict(metric=f'frechet_{k}') for k in ('32px', 'outside')),
               *(distance(frechet/20) | dict(metric=f'kid_{k}') for k in ('32px', 'outside'))]
    hidden = '_' if name[0] == '_' else ''
    plotting.save_gallery(torch.cat([faces.image, plotting.mask_rgb(faces.mask)]), f'{hidden}asked-toy-32')
    for kind in ('drawn', 'mask-mirrored', 'one-attribute-flipped'):
        plotting.save_gallery(faces.image, f'{name}-{kind}')
    save_result(name, params, metrics)


def made_up_guidance(scale=SCALE):
    name = experiments.run_name('guidance', scale, 0)
    job = experiments.job(name)
    params = experiments.default_params(job['notebook']) | job['params']
    settings = [(*map(float, s.split()), 0., 1.) for s in params['settings'].split(',')]
    metrics = []
    for a, m, low, high in settings + [(3., 2., 0., .5), (3., 2., .5, 1.)]:
        tags = dict(attrs_scale=a, mask_scale=m, low_t=low, high_t=high)
        on = high - low
        metrics += [said('balanced_accuracy', .84 - .26*2.7**-(a*on + .1) - .01*m, **tags),
                    said('miou', .78 - .4*2.7**-(m*on + .1) - .012*a, chance=.2, upper=.8, **tags),
                    said('diversity', .9 - .06*a - .05*m, chance=0., upper=1., n=64, **tags),
                    distance(14 + (a - 2)**2 + (m - 1.5)**2, **tags)]
        plotting.save_gallery(render_faces(n=8, size=32).image, f'{name}-{a:g}-{m:g}')
    faces = render_faces(n=8, size=32)
    plotting.save_gallery(torch.cat([faces.image, plotting.mask_rgb(faces.mask)]), f'{name}-asked')
    save_result(name, params, metrics)


def drawn(notebook, home, scale=SCALE):
    "Run a figure notebook's code here; returns the figure's bytes and all that was printed"
    text, _ = run_cells(notebook, scale=scale)
    file = home/'figures'/f'{runner.figure_name(experiments.FIGURES[notebook], scale)}.png'
    return file.read_bytes(), ' '.join(text.split())


def test_infonce_says_what_moves_and_what_does_not(home):
    with pytest.raises(ValueError, match="no results of experiment 'attrs'"):
        drawn('41_infonce', home)
    made_up('attrs')
    made_up('attrs+nce', rank=.8)
    assert drawn('41_infonce', home)[1].count('one seed decides nothing') >= 2
    for s in (0, 1, 2):
        made_up('attrs', s)
        made_up('attrs+nce', s, rank=.8)
    a, text = drawn('41_infonce', home)
    assert '1 of 2 metrics move (rank correlation of similarities: higher)' in text
    assert 'with the loss, similarity is ranked better than before' in text and '3 trainings each' in text
    assert '3 seeds decide none of the 7 metrics' in text
    assert drawn('41_infonce', home)[0] == a and len(a) > 20_000
    for s in (0, 1, 2):
        made_up('attrs+nce', s, rank=.5, frechet=40.)  # worse is said as gladly
    text = drawn('41_infonce', home)[1]
    assert 'none of the 2' in text and '2 of 7 metrics move (Frechet distance, 32 px' in text


def test_pooled_answers_no_hardly_a_little_or_yes(home):
    with pytest.raises(ValueError, match="no results of experiment 'attrs'"):
        drawn('42_pooled_masks', home)
    def three(row, **values):
        for seed in range(3):
            made_up(row, seed, **values)
    three('attrs', miou=.3)
    three('published', miou=.32)
    three('spatial', miou=.7, mirror=.95)
    a, text = drawn('42_pooled_masks', home)
    assert text.startswith('No: with published 50% of n = 128 faces follow a mirrored mask, no more than chance')
    assert 'published 4%, spatial 80%' in text and drawn('42_pooled_masks', home)[0] == a
    three('published', mirror=.525)
    three('attrs', miou=.3, mirror=.525)
    assert drawn('42_pooled_masks', home)[1].startswith('Hardly: with published 52% of n = 128')
    three('attrs', miou=.3)
    three('published', mirror=.6)
    assert drawn('42_pooled_masks', home)[1].startswith('A little')
    three('published', mirror=.95)
    assert drawn('42_pooled_masks', home)[1].startswith('Yes')


def test_guidance_compares_one_scale_with_two_and_the_command_draws_the_same_bytes(home):
    made_up('spatial+dropout', miou=.7)
    with pytest.raises(ValueError, match="no results of experiment 'guidance'"):
        drawn('43_guidance', home)
    made_up_guidance()
    a, text = drawn('43_guidance', home)
    assert 'Two scales (' in text and 'of what is possible in attributes' in text
    assert 'the price: lower diversity' in text
    assert runner.plot_figure('43_guidance', SCALE).read_bytes() == a


def test_the_demonstration_draws_its_experiments_with_their_numbers(home):
    with pytest.raises(ValueError, match=f"no results of experiment '{experiments.DEMO[0]}'"):
        drawn('53_demo', home)
    for row, miou in zip(experiments.DEMO, (.3, .32, .7, .74)):
        made_up(row, miou=miou)
    a, text = drawn('53_demo', home)
    assert 'attributes only 17%, published code 20%, mask concatenated 83%, the same, guided 90%' in text
    assert drawn('53_demo', home)[0] == a and len(a) > 20_000
