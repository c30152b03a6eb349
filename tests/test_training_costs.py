"""What a training costs is counted without running it, and agrees with what runs wrote down."""
import pytest

from facegen.core import load_result, save_result
from facegen.study import experiments, training_costs


def test_a_count_agrees_with_the_runs_that_counted_themselves():
    for name in ('unet', 'dit-s', 'lora', 'full'):
        p, c = load_result(f'{name}-laptop-s0')['params'], training_costs.training_cost(name, 'laptop')
        assert c['parameters'] == p['parameters']
        assert c['tflops'] == pytest.approx(p['train_gflops']*p['batch']*p['steps']/1e3, rel=.01)


def test_published_networks_weigh_what_is_published():
    for name, n in (('dit-s', 34_373_168), ('dit-l', 147_476_784), ('lora', 7_483_392), ('full', 865_910_724)):
        assert training_costs.training_cost(name, 'paper')['parameters'] == n


def test_twice_the_steps_cost_twice_as_much(monkeypatch):
    a = training_costs.training_cost('attrs', 'smoke')['tflops']
    smoke = experiments.SCALES['smoke']
    monkeypatch.setitem(smoke, 'attrs', dict(steps=2*smoke['34_conditional']['steps']))
    assert training_costs.training_cost('attrs', 'smoke')['tflops'] == pytest.approx(2*a)


def test_what_trains_nothing_costs_nothing_and_what_has_no_part_in_a_scale_has_no_cost():
    for name in ('samplers', 'guidance'):
        assert training_costs.training_cost(name, 'smoke') == dict(parameters=0, tflops=0.)
    assert training_costs.training_cost('zero-shot', 'smoke')['tflops'] == 0
    assert training_costs.training_cost('stable', 'paper') is None


@pytest.mark.parametrize('name', experiments.EXPERIMENTS)
def test_every_experiment_can_be_counted(name):
    this, cost = experiments.EXPERIMENTS[name], training_costs.training_cost(name, 'smoke')
    trains = this.notebook in training_costs.TRAINED_NETWORKS and this.params.get('method') != 'none'
    assert cost['tflops'] > 0 or not trains


def test_the_table_puts_measured_seconds_beside_counted_operations(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    m = dict(metric='x', value=1., n=4, low=None, high=None, chance=None, reference=None, upper=None)
    for s, seconds in ((0, 100), (1, 200)):
        save_result(f'unet-laptop-s{s}', {}, [m, m | dict(metric='y')], seconds)
    t = training_costs.cost_table(experiments=['unet', 'dit-s', 'stable'])
    assert t.loc['unet', 's here'] == 150 and t.loc['dit-s'].isna()['s here'] and t.loc['stable'].isna()['h, paper']
    assert t.loc['unet', 'h, gpu'] == pytest.approx(t.loc['unet', 'TFLOPs, gpu']/training_costs.GPU_TFLOPS/3600)
