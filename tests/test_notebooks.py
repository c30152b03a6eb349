"""Every notebook runs from its first cell to its last, as *Run all* would, and leaves the committed figures alone."""
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from facegen.core import bootstrap_size
from facegen.study._warm_kernels import Manager, forked, warm

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (REPO/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
DRAWS = [p for p in NOTEBOOKS if p.parent.name == 'figures' or p.stem == 'index']  # from committed results to figures/


def run_all(path, home=''):
    "Run a notebook; `home` is where it finds the data and leaves its figures, drawn there with fewer resamples"
    if home:
        os.environ['FACEGEN_ROOT'] = str(home)
        bootstrap_size(25)  # a forked kernel inherits it
    notebook = nbformat.read(path, 4)
    client = NotebookClient(notebook, kernel_manager_class=Manager, timeout=600,
                            resources={'metadata': {'path': str(path.parent)}})
    with forked():
        client.execute()


@pytest.fixture
def home(tmp_path):
    "A root with the repository's data and notebooks, and with figures of its own"
    for name in ('data', 'nbs'):
        (tmp_path/name).symlink_to(REPO/name)
    (tmp_path/'figures').mkdir()
    return tmp_path


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p not in DRAWS], ids=lambda p: str(p.relative_to(REPO/'nbs')))
def test_notebook_runs(path):
    warm(run_all, path)


@pytest.mark.parametrize('path', DRAWS, ids=lambda p: p.stem)
def test_notebook_draws_what_is_committed(path, home):
    "A figure of the same name as one in figures/; the other tests of figures say what must stand in it"
    warm(run_all, path, home)
    drawn = {p.name for p in (home/'figures').iterdir()}
    assert drawn and drawn <= {p.name for p in (REPO/'figures').iterdir()}
