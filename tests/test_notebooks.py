"""Every notebook runs from its first cell to its last, as *Run all* would run it."""
from pathlib import Path

import nbformat, pytest
from nbclient import NotebookClient

from facegen.kernels import Manager, forked, warm

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1]/'nbs').glob('*.ipynb'))


def run_all(path):
    with forked():
        NotebookClient(nbformat.read(path, 4), kernel_manager_class=Manager, timeout=600, resources={'metadata': {'path': str(path.parent)}}).execute()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path): warm(run_all, path)
