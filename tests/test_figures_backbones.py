"""Backbones, data and details: words follow from made-up results; what cannot be compared is left out and named."""
import pytest
from conftest import run_cells
from matplotlib.backends.backend_agg import FigureCanvasAgg
from facegen.study import experiments
from facegen import plotting
from facegen.study import runner
from facegen.core import save_result
from facegen.synthetic.toyfaces import render_faces

SCALE = 'smoke'
FACES = render_faces(n=16, size=32, seed=1).image
STEP = {'unet': 1., 'dit-s': .5, 'dit-l': 2.5} | {f'r{i}': 2. for i in range(7)}  # TFLOPs a step
BUDGET = 20.
NETS = ['unet', 'dit-s', 'dit-l']


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    return tmp_path.resolve()


def said(metric, value, half, **tags):
    return dict(metric=metric, value=value, low=value - half, high=value + half, n=400, n_real=400,
                chance=None, upper=None) | tags


def distances(kid, outside, half, pixels, **tags):
    "Through every network; in pixels one of 32 px looks"
    marks = dict(reference=0., reference_low=-.1, reference_high=.1, recon=None, **tags)
    if pixels: return [said('kid', kid, half, network='_classifier32-smoke-s0', **marks)]
    networks = dict(kid=(9., '_classifier-smoke-s0'), kid_32px=(kid, '_classifier32-smoke-s0'),
                    kid_outside=(outside, 'efficientnet-lite0'))
    return [said(metric, v, half, network=network, **marks) for metric, (v, network) in networks.items()]


def trained(row, steps, compute=None, seed=0, outside=0., budget=BUDGET, half=.1, gallery=True, gap=.02, **params):
    "A training that has KID `steps` after equal steps, `compute` after equal compute; `outside` is added for that eye"
    name = experiments.run_name(row, SCALE, seed)
    job = experiments.job(name)
    cost = STEP[row.split('-few')[0]]
    made_up = dict(size=32, budget=budget, trained_on=27 if '-few' in row else 270, parameters=2e6*cost, gflops=cost,
                   training_seconds=100., peak_memory_mb=900.)
    p = experiments.default_params(job['notebook']) | job['params'] | made_up | params
    equal = round(budget/cost)
    milestones = sorted({10, p['steps'], *([equal] if equal else [])})
    metrics = []
    for k in milestones:
        v = steps if k == p['steps'] else compute if k == equal else steps + 1
        tags = dict(step=k, tflops=k*cost, equal_steps=k == p['steps'], equal_compute=k == equal, weights='ema')
        metrics += distances(v, v + outside, half, not p['autoencoder'], **tags)
        metrics += [said('generalization_gap', gap*k/p['steps'], .005, reference=0., recon=None, **tags)]
    save_result(name, p | dict(milestones=milestones, trained_for=milestones[-1]), metrics)
    if gallery:
        plotting.save_gallery(FACES, f'{name}-ema')
        if equal:
            plotting.save_gallery(FACES, f'{name}-equal-compute')


def drawn(notebook, home):
    "Run a figure notebook's code here; returns the figure's bytes, all that was printed, and texts that spill"
    text, names = run_cells(notebook, scale=SCALE)
    FigureCanvasAgg(names['page'].fig).draw()
    spill = outside_of(names['page'].fig)
    file = home/'figures'/f'{runner.figure_name(experiments.FIGURES[notebook], SCALE)}.png'
    return file.read_bytes(), ' '.join(text.split()), spill


def outside_of(fig):
    "Texts of the figure that run over its right edge, or over each other"
    box = [(t.get_text(), t.get_window_extent()) for t in fig.texts if t.get_text()]
    over = [a[:40] for a, x in box if x.x1 > fig.bbox.x1 + 2]
    return over + [f'{a[:30]} | {b[:30]}' for i, (a, x) in enumerate(box) for b, y in box[:i]
                   if min(x.x1, y.x1) - max(x.x0, y.x0) > 2 and min(x.y1, y.y1) - max(x.y0, y.y0) > 2]


def test_backbones_answers_both_equalities_and_is_the_same_bytes_again(home):
    with pytest.raises(ValueError, match="no results of experiment 'unet-few' at scale 'smoke': run `make study"):
        drawn('44_backbones', home)
    for s in (0, 1, 2):  # Large leads after equal steps, Small after equal compute
        for row, steps, compute in (('unet-few', 2., 2.), ('dit-s-few', 2.5, 1.), ('dit-l-few', 1., 3.)):
            trained(row, steps + .02*s, compute + .02*s, s)
    a, text, spill = drawn('44_backbones', home)
    assert ('After equal steps, against the UNet: DiT-Small: worse; DiT-Large: better. '
            'After equal compute, against the UNet: DiT-Small: better; DiT-Large: worse.') in text and not spill
    assert ('At equal steps (20): DiT-Small against UNet +0.50 [+0.36, +0.64] and +0.50 [+0.36, +0.64]: worse; '
            'DiT-Large against UNet -1.00 [-1.14, -0.86] and -1.00 [-1.14, -0.86]: better; ') in text
    assert 'At equal compute (20 TFLOPs): DiT-Small against UNet -1.00' in text
    assert '20 steps of UNet, 40 steps of DiT-Small, 8 steps of DiT-Large' in text
    assert 'Here, Large against Small: at equal steps better; at equal compute worse.' in text
    assert 'in latents' in text and 'in pixels' not in text
    assert drawn('44_backbones', home)[0] == a and 20_000 < len(a) < 500_000
    assert runner.plot_figure('44_backbones', SCALE).read_bytes() == a


def test_backbones_says_nothing_of_one_seed_and_names_the_network_that_sees_alone(home):
    for row, v in (('unet-few', 2.), ('dit-s-few', 3.), ('dit-l-few', 1.)):
        trained(row, v, v)
    text = drawn('44_backbones', home)[1]
    assert 'After equal steps, against the UNet: DiT-Small and DiT-Large: one seed decides nothing.' in text
    for s in (0, 1, 2):
        trained('unet-few', 2. + .01*s, 2., s)
        trained('dit-s-few', 1. + .02*s, 2., s, outside=2.)
        trained('dit-l-few', 1. + .02*s, 2., s, outside=1. + .2*(s - 1))
    text = drawn('44_backbones', home)[1]
    assert 'against the UNet: DiT-Small: the distances disagree; DiT-Large: better by one distance of two.' in text
    for row in NETS:  # without the outside network there is no answer about quality
        for s in (0, 1, 2):
            file = home/'data'/'results'/f'_{row}-few-smoke-s{s}.json'
            file.write_text(file.read_text().replace('kid_outside', 'unseen'))
    assert 'DiT-Small and DiT-Large: better by the only distance' in drawn('44_backbones', home)[1]


def test_backbones_keeps_the_unets_in_pixels_apart(home):
    for row, v in (('unet-few', 2.), ('dit-s-few', 3.), ('dit-l-few', 2.05)):
        trained(row, v, budget=0.)
    a, text, spill = drawn('44_backbones', home)
    assert "no milestone of equal compute: scale 'smoke' has no budget" in text and not spill
    assert 'equal compute (' not in text and 'decide nothing: another' not in text
    for i in (*range(7), 0):
        trained(f'r{i}-few', 2 + i/5, budget=0., seed=int(i > 4), **experiments.X0_ADAMW)
    trained('r2-few', 9., budget=0., seed=1, lr=.5)
    b, text, spill = drawn('44_backbones', home)
    assert b != a and not spill
    assert 'left out, since not trained and measured as _r0-few-smoke-s0: _r2-few-smoke-s1' in text
    assert 'r0 to r6 decide nothing: another recipe, no second network, seeds 0, 1; KID: r0 2.00, r1 2.20' in text
    names = run_cells('44_backbones', scale=SCALE)[1]
    assert set(names['r'].row) == set(NETS) and not set(names['u'].row) & set(NETS)
    assert 'in pixels, with the former recipe (x0 prediction, uniform times, AdamW)' in names['recipe_text'](names['q'])


def test_backbones_leaves_out_what_was_trained_otherwise_and_names_it(home):
    for row in NETS:
        trained(f'{row}-few', 2., 2.)
    trained('dit-s-few', 8., 8., seed=1, lr=.5)
    trained('unet-few', 8., 8., seed=1, network='another')
    trained('unet-few', 8., 8., seed=2, autoencoder='')  # in pixels
    _, text, _ = drawn('44_backbones', home)
    assert 'left out, since not trained and measured as _unet-few-smoke-s0' in text
    assert ': _dit-s-few-smoke-s1, _unet-few-smoke-s1, _unet-few-smoke-s2' in text
    assert '8.0' not in text
    trained('dit-l-few', 2., 2., lr=.5)
    with pytest.raises(ValueError,
                       match="experiment 'dit-l-few' has no result trained and measured as _unet-few-smoke-s0"):
        drawn('44_backbones', home)
    trained('dit-l-few', 2., 2., seed=5)
    save_result('_dit-l-few-smoke-s0', dict(steps=3), [said('kid', 1., .1, step=3, weights='ema', reference=0.,
                                                            recon=None, network='a')])  # an old file
    with pytest.raises(ValueError, match='share no seed'):
        drawn('44_backbones', home)


def test_data_says_whether_large_gains_more(home):
    with pytest.raises(ValueError, match="no results of experiment 'dit-s' at scale 'smoke': run `make study"):
        drawn('45_data', home)
    ends = (('dit-s', 2., 1.), ('dit-s-few', 2., 3.), ('dit-l', 1., 2.), ('dit-l-few', 3., 2.))
    for s in (0, 1, 2):  # Large gains 2, Small nothing after equal steps; after equal compute it is the other way about
        for row, steps, compute in ends:
            luck = .03*((2*s + (row == 'dit-l')*s + 3*('few' in row)*s) % 3)
            trained(row, steps + luck, compute + luck, s)
    a, text, spill = drawn('45_data', home)
    assert ('At equal steps, 270 faces instead of 27: DiT-Small: not decided by 3 seeds; DiT-Large: better. '
            'At equal compute, 270 faces instead of 27: DiT-Small: better; DiT-Large: not decided by 3 seeds.') in text
    assert not spill
    assert 'At equal steps (20), KID, 32 px: Large gains more than Small (+2.0' in text
    assert 'At equal compute (20 TFLOPs), KID, outside network: Small gains more than Large (-1.9' in text
    assert 'Small with more data: at equal steps not decided by 3 seeds; at equal compute better.' in text
    assert drawn('45_data', home)[0] == a and 20_000 < len(a) < 500_000
    assert runner.plot_figure('45_data', SCALE).read_bytes() == a


def test_data_shows_the_unet_where_it_ran_on_both_and_says_where_there_is_no_budget(home):
    for row in ('dit-s', 'dit-s-few', 'dit-l', 'dit-l-few', 'unet'):
        trained(row, 2., budget=0.)
    a, text, spill = drawn('45_data', home)
    assert "no milestone of equal compute: scale 'smoke' has no budget" in text and 'UNet' not in text and not spill
    assert 'DiT-Small and DiT-Large: one seed decides nothing.' in text
    trained('unet-few', 3., budget=0., seed=4)  # shares no seed
    assert drawn('45_data', home)[0] == a
    trained('unet-few', 3., budget=0.)
    b, text, spill = drawn('45_data', home)
    assert 'UNet, DiT-Small and DiT-Large: one seed decides nothing' in text and a != b and not spill


def test_data_refuses_trainings_that_share_no_seed(home):
    for row, s in (('dit-s', 0), ('dit-s-few', 0), ('dit-l', 1), ('dit-l-few', 1)):
        trained(row, 2., 2., s)
    with pytest.raises(ValueError, match='share no seed'):
        drawn('45_data', home)


def test_details_reads_what_differs_from_the_results_and_says_which_move(home):
    with pytest.raises(ValueError, match="no results of experiment 'unet-few-pixels' at scale 'smoke': run `make stu"):
        drawn('52_training_details', home)
    former = dict(experiments.X0_ADAMW)
    for row, v in (('unet-few-pixels', 2.), ('unet-few-flow', 1.), ('unet-few-lr-low', 4.), ('unet-few-no-flip', 2.02),
                   ('unet-few-epsilon', 7.), ('unet-few-lr-lowest', 8.), ('unet-few', 6.), ('r0-few', 2.),
                   ('r6-few', 1.)):
        trained(row, v, v, **former | experiments.CHANGES.get(row.removeprefix('unet-few-'), {}))
    a, text, spill = drawn('52_training_details', home)
    assert not spill and drawn('52_training_details', home)[0] == a
    assert 'With another recipe than the rest of the study, so it decides nothing' in text
    assert 'the former recipe (x0 prediction, uniform times, AdamW)' in text
    assert '4 of 4 changes have one training each.' in text and 'None is told apart by its seeds.' in text
    names = run_cells('52_training_details', scale=SCALE)[1]
    steps = {l.head: l.step for l in names['lines']}
    assert list(steps)[:4] == ['UNet in pixels', 'rectified flow', 'no horizontal flip', 'learning rate x 1/8']
    assert not {'epsilon prediction', 'learning rate x 1/80'} & set(steps)  # what says nothing is not drawn
    assert steps['no horizontal flip'] == 'flip off' and steps['learning rate x 1/8'] == 'lr 0.001 -> 0.000125'
    assert steps['rectified flow'] == 'prediction sample -> flow'
    for row, v in (('unet-few-pixels', 2.), ('unet-few-flow', 2.), ('r0-few', 2.1), ('r6-few', 1.12)):
        trained(row, v, v, seed=1, **former | experiments.CHANGES.get(row.removeprefix('unet-few-'), {}))
    text = drawn('52_training_details', home)[1]  # the flow's seeds disagree
    assert 'By seeds: UNet r6: better.' in text and '2 of 4 changes have one training each.' in text
