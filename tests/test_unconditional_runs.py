"""Unconditional experiments train, measure and write at smoke; two that are compared differ in what they should."""
import math, shutil

import pytest, torch
from conftest import run_cells

from facegen.core import load_result, root
from facegen.models.dit import BACKBONES
from facegen.models.flops import count_flops
from facegen.study import experiments

UNCONDITIONAL = [name for name, e in experiments.EXPERIMENTS.items() if e.notebook == '32_unconditional']


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "One root for all, so that faces are rendered once"
    folder = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FACEGEN_ROOT', str(folder))
        yield folder


def run(experiment, **more):
    "Run an experiment's notebook here, with its arguments at smoke and no judge trained; its result"
    name = experiments.run_name(experiment, 'smoke', 0)
    j = experiments.job(name)
    shutil.rmtree(root()/'data'/'runs'/name, ignore_errors=True)  # another test may have run it otherwise
    given = {k: v for k, v in j['params'].items() if k not in experiments.EXPERIMENTS[experiment].needs}
    run_cells(j['notebook'], **given | more)
    return load_result(name)


@pytest.mark.parametrize('name', UNCONDITIONAL)
def test_an_experiment_trains_at_smoke(home, name):
    "The network learns for all its steps, and both kinds of equality, cost and memory stand in the result"
    job = experiments.job(experiments.run_name(name, 'smoke', 0))
    want = experiments.default_params('32_unconditional') | job['params']
    shorter = dict(steps=want['steps']*2//5, samples=4, sampling_steps=2, n_bootstrap=5)  # at length in `make study`
    want |= shorter
    with torch.device('meta'):
        net = BACKBONES[want['backbone']](want['network'], 32)
    cost = count_flops(net, torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))
    step = want['batch']*cost['train_gflops']/1e3  # TFLOPs
    budget = 1.25*want['steps']*step
    p = (out := run(name, budget=budget, **shorter))['params']
    shared = (want.keys() & p.keys()) - experiments.EXPERIMENTS[name].needs.keys()  # no other network is trained here
    assert {k: p[k] for k in shared} == {k: want[k] for k in shared} | dict(budget=budget)
    assert p['parameters'] > 0 and p['training_seconds'] > 0 and p['peak_memory_mb'] > 100
    assert 2.5 < p['train_gflops']/p['gflops'] < 3.1
    found = {(m['metric'], m['weights']) for m in out['metrics'] if m['equal_steps']}
    signs = {'copy_ratio', 'copy_ratio_low', 'copy_share', 'train_error', 'heldout_error', 'generalization_gap'}
    assert {w for _, w in found} == {'ema', 'raw'} if want['raw'] else {'ema'}  # what a figure shows, and no more
    assert found >= {(k, w) for k in ('kid', 'frechet') for _, w in found}
    assert signs & {k for k, _ in found} == (signs if want['memorization'] else set())
    assert not any((k, 'raw') in found for k in signs)
    equal = {m['tflops'] for m in out['metrics'] if m['equal_compute']}
    assert len(equal) == 1 and abs(equal.pop() - budget) <= step
    assert all(math.isfinite(m[k]) for m in out['metrics'] for k in ('value', 'low', 'high'))
    assert {m['step'] for m in out['metrics']} == set(p['milestones']) and p['trained_for'] == max(p['milestones'])
    assert (root()/'data'/'runs'/f'_{name}-smoke-s0'/'model'/'config.json').exists()


def test_a_subset_is_a_tenth_and_nested(home):
    "The same training but for the faces"
    a, b = (experiments.job(experiments.run_name(name, 'smoke', 0))['params'] for name in ('dit-s', 'dit-s-few'))
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} - {'raw'} == {'subset', 'run'}
    whole, part = (run(name)['params']['trained_on'] for name in ('dit-s', 'dit-s-few'))
    assert part == -(-whole//10)


def test_samplers_run_on_a_trained_denoiser(home):
    "On a UNet and a transformer; the first setting is the reference, the chosen one the cheapest within its interval"
    for name in ('unet', 'dit-s'):
        if not (root()/'data'/'runs'/f'_{name}-smoke-s0'/'model').exists():
            run(name)
        out = run('samplers', model=f'data/runs/_{name}-smoke-s0/model')
        k = [m for m in out['metrics'] if m['metric'] == 'kid']
        good = [m for m in k if m['value'] <= k[0]['high']]
        assert len(k) == 4 and [m['good'] for m in k] == [m in good for m in k]
        assert out['params']['chosen'][1] == min(m['sampling_steps'] for m in good)
