"""What averaging buys, and how many steps are enough: the words follow from made-up results, whichever way these turn."""
import pytest
from conftest import run_cells
from facegen import rows, show, study
from facegen.core import save_result
from facegen.toyfaces import draw_faces

SCALE = 'smoke'
FACES = draw_faces(n=24, size=32, seed=1).image


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path)); monkeypatch.delenv('FACEGEN_FACES', raising=False); return tmp_path.resolve()


def distances(kernel, half=.05, **tags):
    "Both distances; the Frechet distance follows the kernel distance"
    of = lambda metric, k, floor: dict(metric=metric, value=k*kernel, low=k*(kernel - half), high=k*(kernel + half), n=400, n_real=400, floor=floor, floor_low=floor - .1,
                                       floor_high=floor + .1, ceiling=None, network='a classifier', **tags)
    return [of('kernel', 1, 0.), of('frechet', 20, 5.)]


def trained(row, values, seed=0, gallery=True, **params):
    "The result of a training; `values` is step -> (raw, averaged)"
    name = rows.run_name(row, SCALE, seed); job = rows.job(name)
    params = rows.default_params(job['notebook']) | job['params'] | dict(trained_on=27 if '-few' in row else 270, parameters=2e6, moments=list(values), evals=1 if 'cosine' in row else 2) | params
    save_result(name, params, [x for step, both in values.items() for w, v in zip(('raw', 'ema'), both) for x in distances(v, step=step, weights=w)])
    even = [k for k in values if not k*params['evals'] % params['steps']]
    if gallery: show.save_gallery(FACES[:8*len(even)], f'{name}-steps', ncol=4*len(even))


def sampled(kernels, chosen, good, seconds=.01):
    "The result of the ladder of samplers; `kernels` in the order of the settings"
    name = rows.run_name('samplers', SCALE, 0); params = rows.default_params('32_run_samplers') | rows.job(name)['params'] | dict(T=1000, prediction='sample', chosen=list(chosen))
    plan = [(s.split()[0], int(s.split()[1])) for s in params['settings'].split(',')]
    assert len(plan) == len(kernels)
    for s, k in plan: show.save_gallery(FACES[:8], f'{name}-{s}-{k}')
    save_result(name, params, [x for (s, k), v in zip(plan, kernels) for x in distances(v, sampler=s, sampling_steps=k, seconds_a_face=k*seconds, good=f'{s} {k}' in good)])


def drawn(notebook, home, **params):
    "Run a figure notebook's code here; returns the figure's bytes, all that was printed, and its names"
    text, names = run_cells(notebook, scale=SCALE, **params)
    return (home/'figures'/f'{study.figure_name(rows.FIGURES[notebook], SCALE)}.png').read_bytes(), text, names


def test_ema_needs_its_first_row_only_and_is_the_same_bytes_again(home):
    with pytest.raises(ValueError, match="no results of row 'unet' at scale 'smoke': run `make study"): drawn('40_fig_ema', home)
    trained('dit-s', {10: (2., 1.9), 20: (1., .5), 43: (.9, .4)})
    with pytest.raises(ValueError, match="no results of row 'unet'"): drawn('40_fig_ema', home)
    only, text, names = drawn('40_fig_ema', home, rows='dit-s unet')
    assert names['shown'] == ['dit-s'] and 'DiT-S, kernel distance after 43 steps: 0.90 -> 0.40 with averaging (gain +0.50' in text
    trained('unet', {10: (2., 2.1), 20: (1., .7)}); a, text, names = drawn('40_fig_ema', home)
    assert a != only and len(a) > 20_000 and drawn('40_fig_ema', home)[0] == a
    assert 'DiT-S, kernel distance after 20 steps: 1.00 -> 0.50' in text and 'UNet, kernel distance after 20 steps: 1.00 -> 0.70' in text  # the last step of both
    assert 'What a falling learning rate leaves of it is not measured here' in text and 'only the sign can be compared. Here: UNet: a gain; DiT-S: a gain' in text


@pytest.mark.parametrize('ends, word, each', [([(1., .7), (1., .8)], 'a gain', '2 gains'), ([(.7, 1.), (.8, 1.)], 'a loss', '2 losses'),
                                              ([(1., .99), (1., 1.)], 'no difference that n = 400 can show', '2 without a difference'), ([(1., .2), (1., 1.2)], 'the seeds disagree', '1 gain, 1 loss')])
def test_ema_says_gain_loss_nothing_or_disagreement(home, ends, word, each):
    "The words follow from the intervals, for all seeds and for each"
    for s, e in enumerate(ends): trained('unet', {10: (2., 2.), 20: e}, s)
    _, text, names = drawn('40_fig_ema', home); d = names['gain']('unet', 'kernel', 20)
    assert f']: {word}; seed by seed: {each})' in text and f'Here: UNet: {word}.' in text
    assert abs(d.value - sum(a - b for a, b in ends)/2) < 1e-9 and d.low < d.value < d.high


def test_ema_leaves_out_a_seed_that_was_trained_otherwise_and_says_so(home):
    trained('unet', {10: (2., 2.), 20: (1., .7)}); trained('unet', {10: (2., 2.), 20: (5., 1.)}, 1, trained_on=12000)
    _, text, names = drawn('40_fig_ema', home)
    assert 'left out, since not trained as the first seed of their row: _unet-smoke-s1' in text and '1.00 -> 0.70' in text and '; 1 seed, one' in names['caption'][0]


def test_ema_compares_a_constant_rate_with_a_falling_one(home):
    trained('unet', {10: (2., 2.), 20: (1., .7)}); trained('unet-few', {10: (2., 2.), 20: (1.5, 1.)}, trained_on=27)
    assert 'is not measured here' in drawn('40_fig_ema', home)[1]
    trained('unet-few-cosine', {20: (.9, .9)}); a, text, names = drawn('40_fig_ema', home)
    assert '27 faces, 1 seed: at a constant rate 1.50 -> 1.00, at one falling to zero 0.90 -> 0.90: a falling rate leaves less to gain (gain 0.50 smaller' in text
    assert names['lines'] == ['unet', 'unet-few', 'unet-few-cosine'] and 'not measured' not in text
    trained('unet-few-cosine', {20: (.9, .35)}); assert 'whether a falling rate leaves less to gain cannot be told' in drawn('40_fig_ema', home)[1]
    trained('unet-few-cosine', {20: (1.9, .7)}); assert 'a falling rate leaves more to gain' in drawn('40_fig_ema', home)[1]
    trained('unet-few', {10: (2., 2.), 20: (1.5, 1.)}, decay='cosine'); assert 'is not measured here' in drawn('40_fig_ema', home)[1]  # both fall: nothing to compare


def test_ema_refuses_rows_without_a_common_moment(home):
    trained('unet', {10: (2., 2.), 20: (1., .7)}); trained('dit-s', {15: (2., 2.), 30: (1., .7)}, steps=30)
    with pytest.raises(ValueError, match='rows unet, dit-s share no moment'): drawn('40_fig_ema', home)


def test_steps_says_what_is_cheapest_and_what_the_study_uses(home):
    with pytest.raises(ValueError, match="no results of row 'samplers' at scale 'smoke': run `make study"): drawn('46_fig_steps', home)
    sampled([1., 1.3, 9., 1.02, 1.01], ('dpm++', 5), ['ddpm 10', 'dpm++ 5', 'unipc 5']); a, text, names = drawn('46_fig_steps', home)
    assert 'DPM-Solver++ 5 is the cheapest that is good enough: kernel distance 1.02 [0.97, 1.07] against 1.00 [0.95, 1.05] of DDPM 10' in text
    assert '2.0 times fewer passes and 2.0 times fewer seconds (0.05 s a face instead of 0.1 s)' in text
    assert 'unconditional rows with DPM-Solver++ 5, which is the chosen one' in text and 'DDIM more than 5' in text and 'UniPC 5' in text
    assert 'Frechet distance 20.4 against 20.0 [19.0, 21.0]: it agrees' in text and '0 of them differ from the chosen one' in text
    assert names['above'] == ['DPM-Solver++ 2 at 9'] and list(names['strips']) == [('ddpm', 10), ('dpm++', 5), ('dpm++', 2)]  # far off, said in words; the same sampler with too few
    assert drawn('46_fig_steps', home)[0] == a and len(a) > 20_000 and study.draw('46_fig_steps', SCALE).read_bytes() == a


def test_steps_says_plainly_when_the_study_uses_another_setting(home, monkeypatch):
    sampled([1., 1.3, 1.6, 1.04, 1.], ('unipc', 5), ['ddpm 10', 'dpm++ 5', 'unipc 5']); _, text, names = drawn('46_fig_steps', home)
    assert 'DPM-Solver++ 5, which is not the chosen one: it is good enough, with as many passes' in text and names['strips'][('dpm++', 5)] == 'the study'
    sampled([1., 1.3, 1.04, 1.6, 1.6], ('dpm++', 2), ['ddpm 10', 'dpm++ 2']); _, text, names = drawn('46_fig_steps', home)
    assert 'not the chosen one: it is not good enough by this measure, with 2.5 times as many passes' in text
    assert 'But the reference' not in text
    monkeypatch.setitem(rows.SCALES[SCALE], '32_run_unconditional', dict(sampling_steps=7)); assert 'DPM-Solver++ 7, which was not measured here' in drawn('46_fig_steps', home)[1]


def test_steps_can_find_nothing_cheaper_or_everything_good(home):
    sampled([1., 3., 9., 2., 2.], ('ddpm', 10), ['ddpm 10']); _, text, names = drawn('46_fig_steps', home)
    assert text.count('Nothing cheaper than DDPM 10 is good enough: kernel distance 1.00 [0.95, 1.05]') and 'times fewer' not in text and 'minus' not in text
    sampled([1., 1., 1., 1., 1.], ('dpm++', 2), ['ddpm 10', 'ddim 5', 'dpm++ 2', 'dpm++ 5', 'unipc 5']); _, text, names = drawn('46_fig_steps', home)
    assert 'too few' not in names['strips'].values() and '5.0 times fewer passes' in text and 'at this n it may be worse by up to 0.07' in text


def test_steps_says_when_the_reference_is_not_the_best(home):
    "Then everything is good enough, and the rule is applied once more against the nearest setting"
    every = ['ddpm 10', 'ddim 5', 'dpm++ 2', 'dpm++ 5', 'unipc 5']
    sampled([2., 1.2, 1.5, 1.02, 1.], ('dpm++', 2), every); _, text, names = drawn('46_fig_steps', home)
    assert 'But the reference is not the best: 4 of 4 others are nearer to real faces' in text and 'minus DDPM 10: -0.500 [-0.571, -0.429], less; it is not worse' in text
    assert "UniPC 5 (1.00 [0.95, 1.05]), by the same rule UniPC 5 is the cheapest that is good enough, and the study's setting, with as many passes, is good enough." in text
    assert names['strips'][('unipc', 5)] == 'nearest to real'
    sampled([2., 1.2, 1.5, 1.2, 1.], ('dpm++', 2), every); assert "and the study's setting, with as many passes, is not good enough." in drawn('46_fig_steps', home)[1]
    sampled([2., 1.2, 1.5, 1., 1.2], ('dpm++', 2), every); assert 'by the same rule DPM-Solver++ 5 is the cheapest that is good enough, and is what the study uses.' in drawn('46_fig_steps', home)[1]
