"""Every unconditional row trains, measures and writes its result at scale smoke; two rows that are compared differ in what they should."""
import math, shutil
import pytest
import torch
from conftest import run_cells
from facegen import rows
from facegen.core import load_result, root
from facegen.cost import cost_of
from facegen.dit import BACKBONES
from facegen.toyfaces import write_toyfaces

ROWS = [r for r, run in rows.RUNS.items() if run.notebook == '32_run_unconditional']


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "One root for all rows, so that faces are drawn once; a folder called celeba64 holds drawn faces"
    folder = tmp_path_factory.mktemp('rows'); write_toyfaces(folder/'real'/'celeba64', 64, 64)
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FACEGEN_ROOT', str(folder)); m.setenv('FACEGEN_FACES', str(folder/'real')); yield folder


def run(row, **more):
    "Run a row's notebook here, with its arguments at smoke and no judge trained; its result"
    name = rows.run_name(row, 'smoke', 0); j = rows.job(name)
    shutil.rmtree(root()/'data'/'runs'/name, ignore_errors=True)  # another test may have run it otherwise
    run_cells(j['notebook'], **{k: v for k, v in j['params'].items() if k not in rows.RUNS[row].needs} | more)
    return load_result(name)


@pytest.mark.parametrize('row', ROWS)
def test_a_row_trains_at_smoke(home, row):
    "The network learns for all its steps, and both moments of equality, cost and memory stand in the result"
    want = rows.default_params('32_run_unconditional') | rows.job(rows.run_name(row, 'smoke', 0))['params']
    with torch.device('meta'): net = BACKBONES[want['backbone']](want['network'], 32)
    step = want['batch']*cost_of(net, torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))['train_gflops']/1e3  # TFLOPs
    budget = 1.25*want['steps']*step; p = (out := run(row, budget=budget))['params']
    if want['prediction'] == 'flow': want['sampler'] = 'euler'  # its own
    assert {k: p[k] for k in want.keys() & p.keys()} == {k: want[k] for k in want.keys() & p.keys()} | dict(classifier='', budget=budget)
    assert p['parameters'] > 0 and 2.5 < p['train_gflops']/p['gflops'] < 3.1 and p['training_seconds'] > 0 and p['peak_memory_mb'] > 100
    found = {(m['metric'], m['weights']) for m in out['metrics'] if m['equal_steps']}
    assert found == {(k, w) for k in ('kernel', 'frechet') for w in ('raw', 'ema')} | {(k, 'ema') for k in (
        'copy_ratio', 'copy_ratio_low', 'copy_share', 'train_error', 'held_error', 'generalisation_gap')}
    equal = {m['tflops'] for m in out['metrics'] if m['equal_compute']}
    assert len(equal) == 1 and abs(equal.pop() - budget) <= step
    assert all(math.isfinite(m[k]) for m in out['metrics'] for k in ('value', 'low', 'high'))
    assert {m['step'] for m in out['metrics']} == set(p['moments']) and p['trained_for'] == max(p['moments'])
    assert (root()/'data'/'runs'/f'_{row}-smoke-s0'/'model'/'config.json').exists()


def test_few_is_a_tenth_and_nested(home):
    "The same training but for the faces"
    a, b = (rows.job(rows.run_name(row, 'smoke', 0))['params'] for row in ('dit-s', 'dit-s-few'))
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == {'few', 'run'}
    whole, part = (run(row)['params']['trained_on'] for row in ('dit-s', 'dit-s-few'))
    assert part == -(-whole//10)


def test_the_ladder_of_samplers_runs_on_a_trained_row(home):
    "On a UNet and on a transformer; the first setting is the reference, the chosen one is the cheapest within its interval"
    for row in ('unet', 'dit-s'):
        if not (root()/'data'/'runs'/f'_{row}-smoke-s0'/'model').exists(): run(row)
        out = run('samplers', model=f'data/runs/_{row}-smoke-s0/model')
        k = [m for m in out['metrics'] if m['metric'] == 'kernel']; good = [m for m in k if m['value'] <= k[0]['high']]
        assert len(k) == 5 and [m['good'] for m in k] == [m in good for m in k]
        assert out['params']['chosen'][1] == min(m['sampling_steps'] for m in good)
