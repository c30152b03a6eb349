"""What the tests share: one thread each, no hub, and the folder of real faces where there is one."""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import contextlib, io, json
from pathlib import Path

import pytest


def run_cells(notebook, **params):
    "Run a notebook's code here, which is quicker than in a kernel; returns all that was printed, and its names"
    from facegen import core, plotting
    from facegen.study import experiments
    before = core.bootstrap_size()
    plotting.plt.switch_backend('agg')
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        for c in json.loads(experiments.notebook_path(notebook).read_text())['cells']:
            if c['cell_type'] != 'code': continue
            exec(''.join(c['source']), names)
            if 'parameters' in c['metadata'].get('tags', []):
                names |= params
    plotting.plt.close('all')
    core.bootstrap_size(before)
    return out.getvalue(), names


@pytest.fixture(scope='session')
def real_faces() -> Path:
    "The folder that FACEGEN_FACES names, with CelebAMask-HQ, celeba64 and pairs128 in it"
    folder = os.environ.get('FACEGEN_FACES', '')
    if not folder:
        pytest.skip('FACEGEN_FACES is not set: no real faces here')
    if not Path(folder).is_dir():
        pytest.fail(f'FACEGEN_FACES names {folder}, which is not a folder')
    return Path(folder)


@pytest.fixture(scope='module')
def few_resamples():
    "Twenty resamples behind each interval of a module"
    from facegen.core import bootstrap_size
    before = bootstrap_size()
    bootstrap_size(20)
    yield
    bootstrap_size(before)
