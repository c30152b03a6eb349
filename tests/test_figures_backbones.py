"""Backbones and data: the words follow from made-up results, and what cannot be compared is left out and named."""
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
                chance=None, upper=None, network='a classifier') | tags


def trained(row, steps, compute=None, seed=0, budget=BUDGET, gap=.02, share=.5, half=.1, gallery=True, **params):
    "The result of a training that has KID `steps` after equal steps and `compute` where the budget is spent"
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
        tags = dict(step=k, tflops=k*cost, equal_steps=k == p['steps'], equal_compute=k == equal)
        for w in ('raw', 'ema'):
            metrics += [said('kid', v + (w == 'raw'), half, reference=0., reference_low=-.1, reference_high=.1,
                             recon=None, weights=w, **tags),
                        said('frechet', 20*v, 20*half, reference=5., reference_low=4., reference_high=6.,
                             recon=None, weights=w, **tags)]
        tags |= dict(weights='ema')
        metrics += [said('copy_share', share, .05, reference=.51, recon=None, n_reference=270, **tags),
                    said('copy_ratio', 1 - share/10, .01, reference=.99, recon=None, **tags),
                    said('generalization_gap', gap*k/p['steps'], .005, reference=0., recon=None, **tags)]
    save_result(name, p | dict(milestones=milestones, trained_for=milestones[-1]), metrics)
    if gallery:
        plotting.save_gallery(FACES, f'{name}-ema')
        if equal:
            plotting.save_gallery(FACES, f'{name}-equal-compute')


def drawn(notebook, home):
    "Run a figure notebook's code here; returns the figure's bytes, all that was printed, and texts that spill"
    text, names = run_cells(notebook, scale=SCALE)
    FigureCanvasAgg(names['page'].fig).draw()
    spill = outside(names['page'].fig)
    file = home/'figures'/f'{runner.figure_name(experiments.FIGURES[notebook], SCALE)}.png'
    return file.read_bytes(), ' '.join(text.split()), spill


def outside(fig):
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
    assert 'After equal steps: DiT-Large does; after equal compute: DiT-Small does.' in text and not spill
    assert ('At equal steps (20): DiT-Small against UNet +0.50 [+0.36, +0.64], worse; '
            'DiT-Large against UNet -1.00 [-1.14, -0.86], better; DiT-Large against DiT-Small -1.50') in text
    assert 'At equal compute (20 TFLOPs): DiT-Small against UNet -1.00' in text
    assert 'DiT-Large against DiT-Small +2.00 [+1.86, +2.14], worse.' in text
    assert '20 steps of UNet, 40 steps of DiT-Small, 8 steps of DiT-Large' in text
    assert 'Here, Large against Small: at equal steps better; at equal compute worse.' in text
    assert drawn('44_backbones', home)[0] == a and 20_000 < len(a) < 400_000
    assert runner.plot_figure('44_backbones', SCALE).read_bytes() == a


def test_backbones_shows_the_other_unets_and_says_so_where_there_is_no_budget(home):
    for row, v in (('unet-few', 2.), ('dit-s-few', 3.), ('dit-l-few', 2.05)):
        trained(row, v, budget=0.)
    a, text, spill = drawn('44_backbones', home)
    assert "no milestone of equal compute: scale 'smoke' has no budget" in text and not spill
    assert 'After equal steps: not that these faces and seeds could tell.' in text and 'equal compute (' not in text
    for i in range(1, 7):
        trained(f'r{i}-few', 2 + i/5, budget=0.)
    b, text, spill = drawn('44_backbones', home)
    assert 'seed 0, one dot' in text and b != a and not spill
    for row in NETS:
        trained(f'{row}-few', 2.1, budget=0., seed=1)
    _, text, _ = drawn('44_backbones', home)
    assert 'UNet, DiT-Small and DiT-Large: seeds 0, 1;' in text
    assert 'UNet r1, UNet r2, UNet r3, UNet r4, UNet r5 and UNet r6: seed 0, one dot' in text


def test_backbones_leaves_out_what_was_trained_otherwise_and_names_it(home):
    for row in NETS:
        trained(f'{row}-few', 2., 2.)
    trained('dit-s-few', 9., 9., seed=1, lr=.5)
    trained('unet-few', 9., 9., seed=1, network='another')
    _, text, _ = drawn('44_backbones', home)
    assert 'left out, since not trained and measured as _unet-few-smoke-s0' in text
    assert ': _dit-s-few-smoke-s1, _unet-few-smoke-s1' in text
    assert '9.0' not in text
    trained('dit-l-few', 2., 2., lr=.5)
    with pytest.raises(ValueError,
                       match="experiment 'dit-l-few' has no result trained and measured as _unet-few-smoke-s0"):
        drawn('44_backbones', home)
    trained('dit-l-few', 2., 2., seed=5)
    save_result('_dit-l-few-smoke-s0', dict(steps=3), [said('kid', 1., .1, step=3, weights='ema', reference=0.,
                                                            recon=None)])  # an old file
    with pytest.raises(ValueError, match='share no seed'):
        drawn('44_backbones', home)


def test_data_says_whether_large_gains_more_and_shows_memorisation(home):
    with pytest.raises(ValueError, match="no results of experiment 'dit-s' at scale 'smoke': run `make study"):
        drawn('45_data', home)
    for s in (0, 1,
              2):  # Large gains 2, Small gains nothing after equal steps; after equal compute it is the other way about
        for row, steps, compute in (('dit-s', 2., 1.), ('dit-s-few', 2.05, 3.), ('dit-l', 1., 2.),
                                    ('dit-l-few', 3., 2.05)):
            trained(row, steps + .02*s, compute + .02*s, s, gap=.3 if 'few' in row else .01,
                    share=.8 if 'few' in row else .5)
    a, text, spill = drawn('45_data', home)
    assert 'KID on 270 faces instead of 27' in text and not spill
    assert 'At equal steps (20) DiT-Small: no difference that n = 400 can show; DiT-Large: better.' in text
    assert 'At equal steps (20): Large gains more than Small (+1.95 [+1.75, +2.15]).' in text
    assert 'At equal compute (20 TFLOPs) DiT-Small: better; DiT-Large: no difference that n = 400 can show.' in text
    assert 'At equal compute (20 TFLOPs): Small gains more than Large (-1.95' in text
    assert 'DiT-Small: generalization gap 30.0 % on 27, 1.0 % on 270; copy share 0.80 and 0.50' in text
    assert 'Held-out faces score a copy share of 0.51 against the 270 of either side' in text
    assert 'Small with more data: at equal steps no difference that n = 400 can show; at equal compute better.' in text
    assert drawn('45_data', home)[0] == a and 20_000 < len(a) < 400_000
    assert runner.plot_figure('45_data', SCALE).read_bytes() == a


def test_data_shows_the_unet_where_it_ran_on_both_and_says_where_there_is_no_budget(home):
    for row in ('dit-s', 'dit-s-few', 'dit-l', 'dit-l-few', 'unet'):
        trained(row, 2., budget=0.)
    a, text, spill = drawn('45_data', home)
    assert "no milestone of equal compute: scale 'smoke' has no budget" in text and 'UNet' not in text and not spill
    assert 'DiT-Small and DiT-Large: no difference that n = 400 can show.' in text
    assert 'Whether Large gains more is not decided' in text
    trained('unet-few', 3., budget=0.)
    b, text, spill = drawn('45_data', home)
    assert 'UNet: better; DiT-Small and DiT-Large: no difference' in text and a != b and not spill


def test_data_refuses_trainings_that_share_no_seed(home):
    for row, s in (('dit-s', 0), ('dit-s-few', 0), ('dit-l', 1), ('dit-l-few', 1)):
        trained(row, 2., 2., s)
    with pytest.raises(ValueError, match='share no seed'):
        drawn('45_data', home)


def test_changes_reads_what_differs_from_the_results_and_says_which_move(home):
    with pytest.raises(ValueError, match="no results of experiment 'unet-few' at scale 'smoke': run `make study"):
        drawn('52_training_details', home)
    for row, v in (('unet-few', 2.), ('unet-few-flow', 1.), ('unet-few-lr-lowest', 4.), ('unet-few-no-flip', 2.02),
                   ('r0-few', 2.), ('r6-few', 1.)):
        trained(row, v, v)
    a, text, spill = drawn('52_training_details', home)
    assert not spill and drawn('52_training_details', home)[0] == a
    assert 'Clear of zero: rectified flow and UNet r6: better; learning rate x 1/80: worse.' in text
    assert '4 of 4 have one training each, which decides nothing.' in text
    names = run_cells('52_training_details', scale=SCALE)[1]
    steps = {l.head: l.step for l in names['lines']}
    assert list(steps)[:4] == ['UNet', 'rectified flow', 'no horizontal flip', 'learning rate x 1/80']
    assert steps['no horizontal flip'] == 'flip off' and steps['learning rate x 1/80'] == 'lr 0.001 -> 1.25e-05'
    assert 'prediction sample -> flow' in steps['rectified flow']
    for row in ('unet-few', 'unet-few-flow'):
        trained(row, 2., 2., seed=1)
    for row in ('r0-few', 'r6-few'):
        trained(row, v := 2. - (row == 'r6-few'), v, seed=1)
    text = drawn('52_training_details', home)[1]  # the flow's seeds disagree
    assert 'Clear of zero: UNet r6: better; learning rate x 1/80: worse. 2 of 4 have' in text
