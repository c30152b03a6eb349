"""What a training costs is counted without running it, and agrees with what runs wrote down."""
import pytest
from facegen import estimates, rows
from facegen.core import load_result, result_path, save_result


def test_a_count_agrees_with_the_runs_that_counted_themselves():
    for row in ('unet', 'dit-s', 'lora', 'full'):
        p, c = load_result(f'{row}-laptop-s0')['params'], estimates.training_cost(row, 'laptop')
        assert c['parameters'] == p['parameters'] and c['tflops'] == pytest.approx(p['train_gflops']*p['batch']*p['steps']/1e3, rel=.01)


def test_published_networks_weigh_what_is_published():
    for row, n in (('dit-s', 34_373_168), ('dit-l', 147_476_784), ('lora', 7_483_392), ('full', 865_910_724)):
        assert estimates.training_cost(row, 'paper')['parameters'] == n


def test_twice_the_steps_cost_twice_as_much(monkeypatch):
    a = estimates.training_cost('attrs', 'smoke')['tflops']; monkeypatch.setitem(rows.SCALES['smoke'], 'attrs', dict(steps=2*rows.SCALES['smoke']['33_run_conditional']['steps']))
    assert estimates.training_cost('attrs', 'smoke')['tflops'] == pytest.approx(2*a)


def test_what_trains_nothing_costs_nothing_and_a_row_without_that_scale_has_no_cost():
    assert estimates.training_cost('samplers', 'smoke') == estimates.training_cost('guidance', 'smoke') == dict(parameters=0, tflops=0.)
    assert estimates.training_cost('zero-shot', 'smoke')['tflops'] == 0 and estimates.training_cost('stable', 'paper') is None


@pytest.mark.parametrize('row', rows.RUNS)
def test_every_row_can_be_counted(row):
    c = estimates.training_cost(row, 'smoke'); assert c['tflops'] > 0 or rows.RUNS[row].notebook not in estimates.TRAINS or rows.RUNS[row].params.get('method') == 'none'


def test_the_table_puts_measured_seconds_beside_counted_operations(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path)); m = dict(metric='x', value=1., n=4, low=None, high=None, floor=None, ceiling=None)
    for s, seconds in ((0, 100), (1, 200)): save_result(f'unet-laptop-s{s}', {}, [m, m | dict(metric='y')], seconds)
    t = estimates.cost_table(rows=['unet', 'dit-s', 'stable']); assert t.loc['unet', 's here'] == 150 and t.loc['dit-s'].isna()['s here'] and t.loc['stable'].isna()['h, paper']
    assert t.loc['unet', 'h, gpu'] == pytest.approx(t.loc['unet', 'TFLOPs, gpu']/estimates.GPU/3600)
