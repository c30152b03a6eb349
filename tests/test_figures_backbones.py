"""Backbones and data: the words follow from made-up results, whichever way these turn; what cannot be compared is left out and named."""
import pytest
from conftest import run_cells
from matplotlib.backends.backend_agg import FigureCanvasAgg
from facegen import rows, show, study
from facegen.core import save_result
from facegen.toyfaces import draw_faces

SCALE = 'smoke'
FACES = draw_faces(n=16, size=32, seed=1).image
STEP = {'unet': 1., 'dit-s': .5, 'dit-l': 2.5} | {f'r{i}': 2. for i in range(7)}  # TFLOPs a step
BUDGET = 20.
NETS = ['unet', 'dit-s', 'dit-l']


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path)); monkeypatch.delenv('FACEGEN_FACES', raising=False); return tmp_path.resolve()


def said(metric, value, half, **tags):
    return dict(metric=metric, value=value, low=value - half, high=value + half, n=400, n_real=400, network='a classifier') | tags


def trained(row, steps, compute=None, seed=0, budget=BUDGET, gap=.02, share=.5, half=.1, gallery=True, **params):
    "The result of a training that ends at kernel distance `steps` after equal steps and at `compute` where the budget is spent"
    name = rows.run_name(row, SCALE, seed); job = rows.job(name); net = row.split('-few')[0]
    p = rows.default_params(job['notebook']) | job['params'] | dict(size=32, budget=budget, trained_on=27 if '-few' in row else 270, parameters=2e6*STEP[net], gflops=STEP[net],
                                                                     training_seconds=100., peak_memory_mb=900.) | params
    equal = round(budget/STEP[net]); moments = sorted({10, p['steps'], *([equal] if equal else [])}); metrics = []
    for k in moments:
        v = steps if k == p['steps'] else compute if k == equal else steps + 1
        tags = dict(step=k, tflops=k*STEP[net], equal_steps=k == p['steps'], equal_compute=k == equal)
        for w in ('raw', 'ema'):
            metrics += [said('kernel', v + (w == 'raw'), half, floor=0., floor_low=-.1, floor_high=.1, ceiling=None, weights=w, **tags),
                        said('frechet', 20*v, 20*half, floor=5., floor_low=4., floor_high=6., ceiling=None, weights=w, **tags)]
        metrics += [said('copy_share', share, .05, floor=1., ceiling=.51, n_crowd=270, weights='ema', **tags), said('copy_ratio', 1 - share/10, .01, floor=0., ceiling=.99, weights='ema', **tags),
                    said('generalisation_gap', gap*k/p['steps'], .005, floor=0., ceiling=None, weights='ema', **tags)]
    save_result(name, p | dict(moments=moments, trained_for=moments[-1]), metrics)
    if gallery:
        show.save_gallery(FACES, f'{name}-ema')
        if equal: show.save_gallery(FACES, f'{name}-equal-compute')


def drawn(notebook, home):
    "Run a figure notebook's code here; returns the figure's bytes, all that was printed, and texts that spill"
    text, names = run_cells(notebook, scale=SCALE)
    FigureCanvasAgg(names['fig']).draw(); spill = outside(names['fig'])
    return (home/'figures'/f'{study.figure_name(rows.FIGURES[notebook], SCALE)}.png').read_bytes(), text, spill


def outside(fig):
    "Texts of the figure that run over its right edge, or over each other"
    box = [(t.get_text(), t.get_window_extent()) for t in fig.texts if t.get_text()]
    over = [a[:40] for a, x in box if x.x1 > fig.bbox.x1 + 2]
    return over + [f'{a[:30]} | {b[:30]}' for i, (a, x) in enumerate(box) for b, y in box[:i]
                   if min(x.x1, y.x1) - max(x.x0, y.x0) > 2 and min(x.y1, y.y1) - max(x.y0, y.y0) > 2]


def test_backbones_answers_both_equalities_and_is_the_same_bytes_again(home):
    with pytest.raises(ValueError, match="no results of row 'unet-few' at scale 'smoke': run `make study"): drawn('44_fig_backbones', home)
    for s in (0, 1, 2):  # Large leads after equal steps, Small after equal compute
        for row, steps, compute in (('unet-few', 2., 2.), ('dit-s-few', 2.5, 1.), ('dit-l-few', 1., 3.)): trained(row, steps + .02*s, compute + .02*s, s)
    a, text, spill = drawn('44_fig_backbones', home)
    assert 'After equal steps: DiT-L does; after equal compute: DiT-S does.' in text and not spill
    assert 'At equal steps (20): DiT-S against UNet +0.50 [+0.36, +0.64], farther; DiT-L against UNet -1.00 [-1.14, -0.86], nearer; DiT-L against DiT-S -1.50' in text
    assert 'At equal compute (20 TFLOPs): DiT-S against UNet -1.00' in text and 'DiT-L against DiT-S +2.00 [+1.86, +2.14], farther.' in text
    assert '20 steps of UNet, 40 steps of DiT-S, 8 steps of DiT-L' in text and 'Here, Large against Small: at equal steps nearer; at equal compute farther.' in text
    assert drawn('44_fig_backbones', home)[0] == a and 20_000 < len(a) < 400_000
    assert study.draw('44_fig_backbones', SCALE).read_bytes() == a


def test_backbones_shows_the_other_unets_and_says_so_where_there_is_no_budget(home):
    for row, v in (('unet-few', 2.), ('dit-s-few', 3.), ('dit-l-few', 2.05)): trained(row, v, budget=0.)
    a, text, spill = drawn('44_fig_backbones', home)
    assert "no moment of equal compute: scale 'smoke' has no budget" in text and 'After equal steps: not that these faces and seeds could tell.' in text and 'equal compute (' not in text and not spill
    for i in range(1, 7): trained(f'r{i}-few', 2 + i/5, budget=0.)
    b, text, spill = drawn('44_fig_backbones', home); assert 'seed 0, one dot' in text and b != a and not spill
    for row in NETS: trained(f'{row}-few', 2.1, budget=0., seed=1)
    assert 'UNet, DiT-S and DiT-L: seeds 0, 1; UNet r1, UNet r2, UNet r3, UNet r4, UNet r5 and UNet r6: seed 0, one dot' in drawn('44_fig_backbones', home)[1]


def test_backbones_leaves_out_what_was_trained_otherwise_and_names_it(home):
    for row in NETS: trained(f'{row}-few', 2., 2.)
    trained('dit-s-few', 9., 9., seed=1, lr=.5); trained('unet-few', 9., 9., seed=1, network='another'); _, text, _ = drawn('44_fig_backbones', home)
    assert 'left out, since not trained and measured as _unet-few-smoke-s0: _dit-s-few-smoke-s1, _unet-few-smoke-s1' in text and '9.0' not in text
    trained('dit-l-few', 2., 2., lr=.5)
    with pytest.raises(ValueError, match="row 'dit-l-few' has no result trained and measured as _unet-few-smoke-s0"): drawn('44_fig_backbones', home)
    trained('dit-l-few', 2., 2., seed=5); save_result('_dit-l-few-smoke-s0', dict(steps=3), [said('kernel', 1., .1, step=3, weights='ema', floor=0., ceiling=None)])  # an old file
    with pytest.raises(ValueError, match='share no seed'): drawn('44_fig_backbones', home)


def test_data_says_whether_large_gains_more_and_shows_learning_by_heart(home):
    with pytest.raises(ValueError, match="no results of row 'dit-s' at scale 'smoke': run `make study"): drawn('45_fig_data', home)
    for s in (0, 1, 2):  # Large gains 2, Small gains nothing after equal steps; after equal compute it is the other way about
        for row, steps, compute in (('dit-s', 2., 1.), ('dit-s-few', 2.05, 3.), ('dit-l', 1., 2.), ('dit-l-few', 3., 2.05)):
            trained(row, steps + .02*s, compute + .02*s, s, gap=.3 if 'few' in row else .01, share=.8 if 'few' in row else .5)
    a, text, spill = drawn('45_fig_data', home)
    assert 'What 270 faces instead of 27 change' in text and not spill
    assert 'At equal steps (20) DiT-S: no difference that n = 400 can show; DiT-L: nearer. Large gains more than Small (+1.95 [+1.75, +2.15]).' in text
    assert 'At equal compute (20 TFLOPs) DiT-S: nearer; DiT-L: no difference that n = 400 can show. Small gains more than Large (-1.95' in text
    assert 'DiT-S gap 30.0 % on 27, 1.0 % on 270, copy share 0.80 and 0.50' in text and 'Held-out faces score a copy share of 0.51 against the 270 of either side' in text
    assert 'Small with more data: at equal steps no difference that n = 400 can show; at equal compute nearer.' in text
    assert drawn('45_fig_data', home)[0] == a and 20_000 < len(a) < 400_000 and study.draw('45_fig_data', SCALE).read_bytes() == a


def test_data_shows_the_unet_where_it_ran_on_both_and_says_where_there_is_no_budget(home):
    for row in ('dit-s', 'dit-s-few', 'dit-l', 'dit-l-few', 'unet'): trained(row, 2., budget=0.)
    a, text, spill = drawn('45_fig_data', home)
    assert "no moment of equal compute: scale 'smoke' has no budget" in text and 'UNet' not in text and not spill
    assert 'DiT-S and DiT-L: no difference that n = 400 can show. Whether Large gains more is not decided' in text
    trained('unet-few', 3., budget=0.); b, text, spill = drawn('45_fig_data', home); assert 'UNet: nearer; DiT-S and DiT-L: no difference' in text and a != b and not spill


def test_data_refuses_trainings_that_share_no_seed(home):
    for row, s in (('dit-s', 0), ('dit-s-few', 0), ('dit-l', 1), ('dit-l-few', 1)): trained(row, 2., 2., s)
    with pytest.raises(ValueError, match='share no seed'): drawn('45_fig_data', home)


def test_changes_reads_what_differs_from_the_results_and_says_which_move(home):
    with pytest.raises(ValueError, match="no results of row 'unet-few' at scale 'smoke': run `make study"): drawn('52_fig_changes', home)
    for row, v in (('unet-few', 2.), ('unet-few-flow', 1.), ('unet-few-lr-lowest', 4.), ('unet-few-no-flip', 2.02), ('r0-few', 2.), ('r6-few', 1.)): trained(row, v, v)
    a, text, spill = drawn('52_fig_changes', home); assert not spill and drawn('52_fig_changes', home)[0] == a
    assert 'Clear of zero: straight lines (rectified flow) and r6: nearer; learns 80 times slower: farther. 4 of 4 have one training each, which decides nothing.' in text
    names = run_cells('52_fig_changes', scale=SCALE)[1]; steps = {l.head: l.step for l in names['lines']}
    assert list(steps)[:4] == ['what is changed below', 'straight lines (rectified flow)', 'no face is mirrored', 'learns 80 times slower']
    assert steps['no face is mirrored'] == 'flip off' and steps['learns 80 times slower'] == 'lr 0.001 -> 1.25e-05' and 'prediction sample -> flow' in steps['straight lines (rectified flow)']
    for row in ('unet-few', 'unet-few-flow'): trained(row, 2., 2., seed=1)
    for row in ('r0-few', 'r6-few'): trained(row, v := 2. - (row == 'r6-few'), v, seed=1)
    assert 'Clear of zero: r6: nearer; learns 80 times slower: farther. 2 of 4 have' in drawn('52_fig_changes', home)[1]  # the flow's seeds disagree
