"""What the tests share: one thread each, no hub, and the folder of real faces where there is one."""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
from pathlib import Path
import pytest


@pytest.fixture(scope='session')
def real_faces() -> Path:
    "The folder that FACEGEN_FACES names, with CelebAMask-HQ, celeba64 and pairs128 in it"
    folder = os.environ.get('FACEGEN_FACES', '')
    if not folder: pytest.skip('FACEGEN_FACES is not set: no real faces here')
    if not Path(folder).is_dir(): pytest.fail(f'FACEGEN_FACES names {folder}, which is not a folder')
    return Path(folder)
