"""What EMA buys, and how many steps are enough: the words follow from made-up results."""
import pytest
from conftest import run_cells
from facegen.study import experiments
from facegen import plotting
from facegen.study import runner
from facegen.core import save_result
from facegen.synthetic.toyfaces import render_faces

SCALE = 'smoke'
FACES = render_faces(n=24, size=32, seed=1).image


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    return tmp_path.resolve()


def distances(kid, half=.05, **tags):
    "Both distances; the Frechet distance follows KID"
    def record(metric, times, reference):
        return dict(metric=metric, value=times*kid, low=times*(kid - half), high=times*(kid + half), n=400, n_real=400,
                    chance=None, upper=None, reference=reference, reference_low=reference - .1,
                    reference_high=reference + .1, recon=None,
                    network='a classifier', **tags)
    return [record('kid', 1, 0.), record('frechet', 20, 5.)]


def trained(row, values, seed=0, gallery=True, **params):
    "The result of a training; `values` is step -> (raw, EMA)"
    name = experiments.run_name(row, SCALE, seed)
    job = experiments.job(name)
    made_up = dict(trained_on=27 if '-few' in row else 270, parameters=2e6, milestones=list(values),
                   n_milestones=1 if 'cosine' in row else 2)
    params = experiments.default_params(job['notebook']) | job['params'] | made_up | params
    records = []
    for step, both in values.items():
        for weights, kid in zip(('raw', 'ema'), both):
            records += distances(kid, step=step, weights=weights)
    save_result(name, params, records)
    even = [k for k in values if not k*params['n_milestones'] % params['steps']]
    if gallery:
        plotting.save_gallery(FACES[:8*len(even)], f'{name}-steps', ncol=4*len(even))


def sampled(kids, chosen, good, seconds=.01):
    "The result of the samplers; `kids` in the order of the settings"
    name = experiments.run_name('samplers', SCALE, 0)
    made_up = dict(T=1000, prediction='sample', chosen=list(chosen))
    params = experiments.default_params('33_samplers') | experiments.job(name)['params'] | made_up
    settings = [(s.split()[0], int(s.split()[1])) for s in params['settings'].split(',')]
    assert len(settings) == len(kids)
    records = []
    for (s, k), kid in zip(settings, kids):
        plotting.save_gallery(FACES[:8], f'{name}-{s}-{k}')
        tags = dict(sampler=s, sampling_steps=k, seconds_a_face=k*seconds, good=f'{s} {k}' in good)
        records += distances(kid, **tags)
    save_result(name, params, records)


def drawn(notebook, home, **params):
    "Run a figure notebook's code here; returns the figure's bytes, all that was printed, and its names"
    text, names = run_cells(notebook, scale=SCALE, **params)
    file = home/'figures'/f'{runner.figure_name(experiments.FIGURES[notebook], SCALE)}.png'
    return file.read_bytes(), ' '.join(text.split()), names


def test_ema_needs_its_first_row_only_and_is_the_same_bytes_again(home):
    with pytest.raises(ValueError, match="no results of experiment 'unet' at scale 'smoke': run `make study"):
        drawn('40_ema', home)
    trained('dit-s', {10: (2., 1.9), 20: (1., .5), 43: (.9, .4)})
    with pytest.raises(ValueError, match="no results of experiment 'unet'"):
        drawn('40_ema', home)
    only, text, names = drawn('40_ema', home, rows='dit-s unet')
    assert names['shown'] == ['dit-s'] and 'after 43 steps: DiT-Small 0.90 raw -> 0.40 EMA (gain +0.50' in text
    trained('unet', {10: (2., 2.1), 20: (1., .7)})
    a, text, names = drawn('40_ema', home)
    assert a != only and len(a) > 20_000 and drawn('40_ema', home)[0] == a
    assert 'after 20 steps: UNet 1.00 raw -> 0.70' in text
    assert 'DiT-Small 1.00 raw -> 0.50' in text  # the last step of both
    assert 'What is left of the gain when the learning rate decays is not measured here' in text
    assert 'only the sign can be compared. Here: UNet and DiT-Small: a gain' in text


@pytest.mark.parametrize('ends, word, each', [([(1., .7), (1., .8)], 'a gain', '2 x a gain'),
                                              ([(.7, 1.), (.8, 1.)], 'a loss', '2 x a loss'),
                                              ([(1., .99), (1., 1.)], 'no difference that n = 400 can show',
                                               '2 x no difference'), ([(1., .2), (1., 1.2)], 'the seeds disagree',
                                                                      '1 x a gain, 1 x a loss')])
def test_ema_says_gain_loss_nothing_or_disagreement(home, ends, word, each):
    "The words follow from the intervals, for all seeds and for each"
    for s, e in enumerate(ends):
        trained('unet', {10: (2., 2.), 20: e}, s)
    _, text, names = drawn('40_ema', home)
    d = names['gain']('unet', 'kid', 20)
    assert f']: {word}; by seed {each})' in text and f'Here: UNet: {word}.' in text
    assert abs(d.value - sum(a - b for a, b in ends)/2) < 1e-9 and d.low < d.value < d.high


def test_ema_leaves_out_a_seed_that_was_trained_otherwise_and_says_so(home):
    trained('unet', {10: (2., 2.), 20: (1., .7)})
    trained('unet', {10: (2., 2.), 20: (5., 1.)}, 1, trained_on=12000)
    _, text, names = drawn('40_ema', home)
    assert 'left out, since not trained as the first seed of their experiment: _unet-smoke-s1' in text
    assert '1.00 raw -> 0.70 EMA' in text and '; seed 0, one' in names['caption'][0]


def test_ema_compares_a_constant_rate_with_a_falling_one(home):
    trained('unet', {10: (2., 2.), 20: (1., .7)})
    trained('unet-few', {10: (2., 2.), 20: (1.5, 1.)}, trained_on=27)
    assert 'is not measured here' in drawn('40_ema', home)[1]
    trained('unet-few-cosine', {20: (.9, .9)})
    a, text, names = drawn('40_ema', home)
    assert '27 faces, 1 seed: KID 1.50 -> 1.00 at a constant learning rate, 0.90 -> 0.90 with cosine decay' in text
    assert 'decay leaves less to gain (gain 0.50 smaller' in text
    assert names['lines'] == ['unet', 'unet-few', 'unet-few-cosine'] and 'not measured' not in text
    trained('unet-few-cosine', {20: (.9, .35)})
    assert 'whether decay leaves less to gain cannot be told' in drawn('40_ema', home)[1]
    trained('unet-few-cosine', {20: (1.9, .7)})
    assert 'decay leaves more to gain' in drawn('40_ema', home)[1]
    trained('unet-few', {10: (2., 2.), 20: (1.5, 1.)}, decay='cosine')
    assert 'is not measured here' in drawn('40_ema', home)[1]  # both fall: nothing to compare


def test_ema_refuses_rows_without_a_common_moment(home):
    trained('unet', {10: (2., 2.), 20: (1., .7)})
    trained('dit-s', {15: (2., 2.), 30: (1., .7)}, steps=30)
    with pytest.raises(ValueError, match='experiments unet, dit-s share no milestone'):
        drawn('40_ema', home)


def test_steps_says_what_is_cheapest_and_what_the_study_uses(home):
    with pytest.raises(ValueError, match="no results of experiment 'samplers' at scale 'smoke': run `make study"):
        drawn('46_sampling_steps', home)
    sampled([1., 1.3, 9., 1.02, 1.01], ('dpm++', 5), ['ddpm 10', 'dpm++ 5', 'unipc 5'])
    a, text, names = drawn('46_sampling_steps', home)
    assert 'DPM-Solver++ 5 is the cheapest that is good enough: KID 1.02 [0.97, 1.07] against 1.00' in text
    assert '1.00 [0.95, 1.05] of DDPM 10' in text
    assert '2.0 times fewer passes' in text and '2.0 times fewer seconds (0.05 s a face instead of 0.1 s)' in text
    assert 'unconditional experiments with DPM-Solver++ 5, which is the chosen one' in text
    assert 'DDIM more than 5' in text and 'UniPC 5' in text
    assert 'Frechet distance 20.4 against 20.0 [19.0, 21.0]: it agrees' in text
    assert '0 of them differ from the chosen one' in text
    assert names['above'] == ['DPM-Solver++ 2 at 9']  # far off, said in words
    assert list(names['strips']) == [('ddpm', 10), ('dpm++', 5), ('dpm++', 2)]  # the same sampler with too few
    assert drawn('46_sampling_steps', home)[0] == a and len(a) > 20_000
    assert runner.plot_figure('46_sampling_steps', SCALE).read_bytes() == a


def test_steps_says_plainly_when_the_study_uses_another_setting(home, monkeypatch):
    sampled([1., 1.3, 1.6, 1.04, 1.], ('unipc', 5), ['ddpm 10', 'dpm++ 5', 'unipc 5'])
    _, text, names = drawn('46_sampling_steps', home)
    assert 'DPM-Solver++ 5, which is not the chosen one: it is good enough, with as many passes' in text
    assert names['strips'][('dpm++', 5)] == 'the study'
    sampled([1., 1.3, 1.04, 1.6, 1.6], ('dpm++', 2), ['ddpm 10', 'dpm++ 2'])
    _, text, names = drawn('46_sampling_steps', home)
    assert 'not the chosen one: it is not good enough by this measure, with 2.5 times as many passes' in text
    assert 'better than the baseline' not in text
    monkeypatch.setitem(experiments.SCALES[SCALE], '32_unconditional', dict(sampling_steps=7))
    assert 'DPM-Solver++ 7, which was not measured here' in drawn('46_sampling_steps', home)[1]


def test_steps_can_find_nothing_cheaper_or_everything_good(home):
    sampled([1., 3., 9., 2., 2.], ('ddpm', 10), ['ddpm 10'])
    _, text, names = drawn('46_sampling_steps', home)
    assert text.count('Nothing cheaper than DDPM 10 is good enough: KID 1.00 [0.95, 1.05]')
    assert 'times fewer' not in text and 'minus' not in text
    sampled([1., 1., 1., 1., 1.], ('dpm++', 2), ['ddpm 10', 'ddim 5', 'dpm++ 2', 'dpm++ 5', 'unipc 5'])
    _, text, names = drawn('46_sampling_steps', home)
    assert 'too few steps' not in names['strips'].values() and '5.0 times fewer passes' in text
    assert 'at this n it may be worse by up to 0.07' in text


def test_steps_says_when_the_reference_is_not_the_best(home):
    "Then everything is good enough, and the rule is applied once more against the nearest setting"
    every = ['ddpm 10', 'ddim 5', 'dpm++ 2', 'dpm++ 5', 'unipc 5']
    sampled([2., 1.2, 1.5, 1.02, 1.], ('dpm++', 2), every)
    _, text, names = drawn('46_sampling_steps', home)
    assert 'But 4 of 4 other settings are better than the baseline.' in text
    assert 'minus DDPM 10: -0.500 [-0.571, -0.429], lower; it is not worse' in text
    assert 'Held against the best, UniPC 5 (1.00 [0.95, 1.05]), UniPC 5 is the cheapest that is good enough.' in text
    assert "By that rule the study's setting, with as many passes, is good enough." in text
    assert names['strips'][('unipc', 5)] == 'lowest KID'
    sampled([2., 1.2, 1.5, 1.2, 1.], ('dpm++', 2), every)
    assert "the study's setting, with as many passes, is not good enough." in drawn('46_sampling_steps', home)[1]
    sampled([2., 1.2, 1.5, 1., 1.2], ('dpm++', 2), every)
    text = drawn('46_sampling_steps', home)[1]
    assert 'DPM-Solver++ 5 is the cheapest that is good enough. By that rule it is what the study uses.' in text
