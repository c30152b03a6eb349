"""What every chapter leans on: files, random streams, results."""
import json, os, subprocess, sys

import pytest
import torch

from facegen import core


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    return tmp_path


RECORD = dict(metric='frechet', value=1., n=64, low=.9, high=1.2, chance=None, reference=.1, upper=None)


def test_root_is_found_from_below_and_can_be_set(monkeypatch, tmp_path):
    monkeypatch.delenv('FACEGEN_ROOT', raising=False)
    top = core.root()
    monkeypatch.chdir(top/'nbs')
    assert core.root() == top and (top/'settings.ini').exists()
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    assert core.root() == tmp_path.resolve()


def test_generator_depends_on_its_keys_alone():
    def sample(*keys): return torch.randn(8, generator=core.generator(*keys))
    first = sample('noise', 0, 1)
    torch.randn(100)
    assert torch.equal(first, sample('noise', 0, 1))
    names = [('noise', 0, 1), ('noise', 1, 0), ('noise', '0', 1), ('noise', 0), ('noise', 0, 1, 0)]
    assert len({tuple(sample(*keys).tolist()) for keys in names}) == 5


def test_generator_is_the_same_in_another_process():
    code = 'from facegen.core import generator as g; print(g("a", 3).initial_seed())'
    env = {**os.environ, 'PYTHONHASHSEED': '7'}
    there = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
    assert int(there) == core.generator('a', 3).initial_seed()


def test_two_runs_with_one_seed_are_bit_identical():
    def run():
        core.seed_all(3)
        layers = torch.nn.Conv2d(3, 8, 3), torch.nn.Dropout(.5), torch.nn.Flatten(), torch.nn.LazyLinear(2)
        net = torch.nn.Sequential(*layers)
        x = torch.randn(4, 3, 8, 8)
        net(x)  # tells the last layer its width
        opt = torch.optim.AdamW(net.parameters())
        for _ in range(5):
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
        return torch.cat([p.flatten() for p in net.parameters()])
    assert torch.equal(run(), run())


def test_device_says_what_there_is():
    assert core.device('cpu').type == 'cpu'
    with pytest.raises(ValueError, match="device 'tpu' is not here; available: .*cpu"):
        core.device('tpu')


def test_a_result_comes_back_and_can_be_diffed(home):
    path = core.save_result('a', dict(steps=3), [RECORD, RECORD | dict(metric='kid')], seconds=2)
    back = core.load_result('a')
    assert path == home.resolve()/'data/results/a.json'
    assert back['metrics'][0] == RECORD and back['params'] == dict(steps=3)
    assert {'torch', 'device', 'commit', 'seconds', 'peak_mb', 'threads'} <= back['env'].keys()
    assert back['env']['peak_mb'] > 0
    assert sum('"metric"' in line for line in path.read_text().splitlines()) == 2  # one line each
    json.loads(path.read_text())


@pytest.mark.parametrize('change, says', [
    (dict(value=float('nan')), 'value is nan, not a finite number'),
    (dict(n=0), 'needs a value and n'),
    (dict(low=2., high=3.), 'outside its interval'),
])
def test_a_bad_record_is_not_written(home, change, says):
    with pytest.raises(ValueError, match=says):
        core.save_result('a', {}, [RECORD | change])
    assert not (home/'data/results/a.json').exists()


@pytest.mark.parametrize('field', core.FIELDS)
def test_no_field_of_a_record_may_be_left_out(home, field):
    with pytest.raises(ValueError, match=f"lacks '{field}'"):
        core.save_result('a', {}, [{k: v for k, v in RECORD.items() if k != field}])


def test_a_damaged_or_missing_result_says_so(home):
    with pytest.raises(FileNotFoundError, match='make study'):
        core.load_result('none')
    core.write_atomic(core.result_path('half'), b'{"run": ')
    with pytest.raises(ValueError, match='not whole JSON'):
        core.load_result('half')


def test_write_atomic_leaves_the_old_file_when_it_cannot_write(tmp_path, monkeypatch):
    core.write_atomic(tmp_path/'a', b'old')
    def broken(*_): raise OSError('disk full')
    monkeypatch.setattr(core.os, 'fsync', broken)
    with pytest.raises(OSError):
        core.write_atomic(tmp_path/'a', b'new')
    assert (tmp_path/'a').read_bytes() == b'old'


def test_progress_goes_to_the_file_that_is_named(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv('FACEGEN_PROGRESS', str(tmp_path/'p'))
    assert list(core.progress(range(3), 'counting')) == [0, 1, 2]
    assert 'counting' in (tmp_path/'p').read_text() and capfd.readouterr().err == ''
