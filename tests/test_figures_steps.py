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
NETWORKS = dict(kid='_classifier-smoke-s0', kid_32px='_classifier32-smoke-s0', kid_outside='efficientnet-lite0')


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    return tmp_path.resolve()


def record(metric, value, half=.05, reference=0., **tags):
    marks = dict(reference=reference, reference_low=reference - .1, reference_high=reference + .1, recon=None)
    return dict(metric=metric, value=value, low=value - half, high=value + half, n=400, n_real=400, chance=None,
                upper=None, network=NETWORKS.get(metric), **marks, **tags)


def trained(row, values, seed=0, eyes=('kid_32px', 'kid_outside'), **params):
    "The result of a training; `values` is step -> (raw, EMA), through `eyes`; what is left of them sees the EMA alone"
    name = experiments.run_name(row, SCALE, seed)
    job = experiments.job(name)
    made_up = dict(trained_on=27 if '-few' in row else 270, parameters=2e6, milestones=list(values), n_milestones=2)
    params = experiments.default_params(job['notebook']) | job['params'] | made_up | params
    records = []
    for step, both in values.items():
        for weights, kid in zip(('raw', 'ema'), both):
            seen = NETWORKS if weights == 'ema' else ('kid', *eyes)
            records += [record(m, kid + (m == 'kid'), step=step, weights=weights) for m in seen]
    save_result(name, params, records)
    even = [k for k in values if not k*params['n_milestones'] % params['steps']]
    plotting.save_gallery(FACES[:4*len(even)], f'{name}-steps', ncol=2*len(even))


def sampled(kids, outside=(), detail=(), seconds=.01):
    "The result of the samplers; values in the order of the settings"
    name = experiments.run_name('samplers', SCALE, 0)
    params = experiments.default_params('33_samplers') | experiments.job(name)['params']
    params |= dict(T=1000, prediction='flow')
    settings = [(s.split()[0], int(s.split()[1])) for s in params['settings'].split(',')]
    assert settings == [('euler', 10), ('euler', 5), ('dpm++', 2), ('dpm++', 5)] and len(settings) == len(kids)
    records = []
    for i, (s, k) in enumerate(settings):
        plotting.save_gallery(FACES[:8], f'{name}-{s}-{k}')
        tags = dict(sampler=s, sampling_steps=k, seconds_a_face=k*seconds)
        records += [record('kid', 9., **tags), record('kid_32px', kids[i], **tags)]
        if outside:
            records += [record('kid_outside', outside[i], **tags)]
        if detail:
            records += [record('high_frequency', detail[i], .02, 1., **tags)]
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
    assert names['shown'] == ['dit-s'] and 'after 43 steps: DiT-Small: one seed decides nothing.' in text
    trained('unet', {10: (2., 2.1), 20: (1., .7)})
    a, text, names = drawn('40_ema', home)
    assert a != only and len(a) > 20_000 and drawn('40_ema', home)[0] == a
    assert 'after 20 steps: UNet and DiT-Small: one seed decides nothing.' in text  # the last step of both
    assert 'UNet, EMA minus raw: -0.30 [-0.37, -0.23] and -0.30 [-0.37, -0.23]: one seed' in text
    assert 'only the sign can be compared.' in text and runner.plot_figure('40_ema', SCALE).read_bytes() == a


@pytest.mark.parametrize('ends, word', [([(1., .7), (1., .71), (1.1, .8)], 'better'),
                                        ([(.7, 1.), (.8, 1.11), (.7, 1.)], 'worse'),
                                        ([(1., .99), (1., 1.01), (1., 1.)], 'not decided by 3 seeds'),
                                        ([(1., .2), (1., 1.2), (1., .9)], 'not decided by 3 seeds')])
def test_ema_is_decided_by_its_seeds(home, ends, word):
    for s, e in enumerate(ends):
        trained('unet', {10: (2., 2.), 20: e}, s)
    _, text, names = drawn('40_ema', home)
    d = names['found']['unet']['kid_32px']
    assert f'after 20 steps: UNet: {word}.' in text and 'nothing is said about quality' not in text
    assert abs(d.value - sum(b - a for a, b in ends)/3) < 1e-9 and d.low < d.value < d.high


def test_ema_makes_no_claim_where_one_network_saw_the_raw_weights(home):
    for s in range(3):
        trained('unet', {10: (2., 2.), 20: (1., .7 + .01*s)}, s, eyes=())
    _, text, names = drawn('40_ema', home)
    assert names['metrics'] == ['kid'] and 'UNet: better by the only distance.' in text
    assert 'One network looked at the raw weights, so nothing is said about quality.' in text


def test_ema_leaves_out_what_was_trained_otherwise_or_in_another_space_and_says_so(home):
    trained('unet', {10: (2., 2.), 20: (1., .7)})
    trained('unet', {10: (2., 2.), 20: (5., 1.)}, 1, trained_on=12000)
    trained('unet-few', {10: (2., 2.), 20: (1., .7)}, autoencoder='')
    _, text, names = drawn('40_ema', home)
    assert 'not in one space with the others: _unet-few-smoke-s0 _unet-smoke-s1' in text
    assert names['shown'] == ['unet'] and 'the same noise; seed 0.' in names['caption'][0]


def test_ema_refuses_rows_without_a_common_moment(home):
    trained('unet', {10: (2., 2.), 20: (1., .7)})
    trained('dit-s', {15: (2., 2.), 30: (1., .7)}, steps=30)
    with pytest.raises(ValueError, match='experiments unet, dit-s share no milestone'):
        drawn('40_ema', home)


def test_steps_says_which_settings_are_within_chance_of_the_reference_by_every_measure(home):
    with pytest.raises(ValueError, match="no results of experiment 'samplers' at scale 'smoke': run `make study"):
        drawn('46_sampling_steps', home)
    sampled([1., 1.3, 9., 1.02], [2., 2.4, 9., 2.03], [.9, .5, .1, .91])
    a, text, names = drawn('46_sampling_steps', home, few=5)
    assert ('Against Euler 10: Euler 5: 32 px KID and outside KID higher, fine detail lower; '
            'DPM-Solver++ 5: within chance by 32 px KID, outside KID and fine detail.') in text
    assert 'Fewest steps that stay within chance: Euler 10, DPM-Solver++ 5.' in text
    assert ('DPM-Solver++ 5 minus Euler 10: 32 px KID +0.02 [-0.05, +0.09]; outside KID +0.03 [-0.04, +0.10]; '
            'fine detail +0.01 [-0.02, +0.04].') in text
    assert 'Above the edge: 32 px KID: DPM-Solver++ 2 at 9' in text and '; outside KID: DPM-Solver++ 2 at 9.' in text
    assert 'unconditional experiments with DPM-Solver++ 5: within chance' in text
    assert 'Seconds a face: Euler 10 0.1, Euler 5 0.05, DPM-Solver++ 5 0.05.' in text
    assert drawn('46_sampling_steps', home, few=5)[0] == a and len(a) > 20_000


def test_steps_lets_any_single_measure_object(home):
    "A distance that is level does not hide fine detail that is lost"
    sampled([1., 1., 1., 1.], [2., 2., 2., 2.], [.9, .7, .5, .9])
    text = drawn('46_sampling_steps', home, few=5)[1]
    assert 'Euler 5: fine detail lower; DPM-Solver++ 5: within chance by 32 px KID, outside KID' in text
    sampled([1., 1., .5, 1.], [2., 2., 2., 1.], [.9, .9, .9, .9])
    text = drawn('46_sampling_steps', home, few=5)[1]
    assert 'KID and fine detail; DPM-Solver++ 5: outside KID lower.' in text
    assert 'Fewest steps that stay within chance: Euler 5, DPM-Solver++ more than 5.' in text


def test_steps_works_with_one_measure_and_says_what_was_not_measured(home, monkeypatch):
    sampled([1., 1., 1.5, 1.])
    a, text, names = drawn('46_sampling_steps', home)
    assert names['measures'] == ['kid_32px'] and '5: within chance by 32 px KID;' in text
    assert '20 steps were not measured here.' in text
    assert 'Fewest steps that stay within chance: Euler 5, DPM-Solver++ 5.' in text
    assert runner.plot_figure('46_sampling_steps', SCALE).read_bytes() == a
    monkeypatch.setitem(experiments.SCALES[SCALE], '32_unconditional', dict(sampling_steps=7))
    assert 'DPM-Solver++ 7: not measured here' in drawn('46_sampling_steps', home)[1]
