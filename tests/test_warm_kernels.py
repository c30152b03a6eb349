"""A forked kernel is a kernel: the same numbers, its own process, gone when nobody needs it."""
import os, signal, subprocess, sys, time

import pytest

from facegen.study import _warm_kernels

pytestmark = pytest.mark.skipif(not _warm_kernels.forks(), reason='kernels are forked on Linux only')
CODE = '''
import os, random, numpy, torch
from facegen.core import seed_all
seed_all(3)
print(os.getpid(), random.random(), numpy.random.rand(), torch.randn(2, 3))'''
SETUP = f'''
import nbformat, os, sys
from nbclient import NotebookClient
from facegen.study._warm_kernels import Kernel, Manager
import facegen.core
def printed(manager, code={CODE!r}):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, kernel_manager_class=manager).execute()
    return nb.cells[0].outputs[0].text
'''


def python(code):
    "Run code after SETUP in a process of its own"
    return subprocess.run([sys.executable, '-c', SETUP + code], capture_output=True, text=True, check=True)


def gone(pid):
    try:
        os.kill(pid, 0)
        return False
    except ProcessLookupError: return True


def test_a_forked_kernel_gives_the_numbers_of_a_started_one():
    "Also after the process has drawn numbers of its own, since a run sets its seed"
    out = python('''
import random, torch
random.random(), torch.randn(5)
with Kernel() as k:
    Manager.waiting = k
    forked = printed(Manager)
    assert Manager.waiting is None
started = printed(Manager)
(a, x), (b, y) = (s.split(' ', 1) for s in (forked, started))
assert int(a) == k.pid and a != b and x == y, (forked, started)
print(k.pid)''').stdout
    assert gone(int(out))


def test_a_kernel_that_was_never_asked_ends():
    with _warm_kernels.Kernel() as k:
        assert k.poll() is None
    assert k.poll() == 0 and gone(k.pid)


def test_a_kernel_ends_with_the_process_that_asked_for_it(tmp_path):
    "SIGKILL leaves no time to say goodbye"
    path = tmp_path/'pid'
    code = f'import os, time; open({str(path)!r}, "w").write(str(os.getpid())); time.sleep(600)'
    p = subprocess.Popen([sys.executable, '-c', SETUP + f'''
with Kernel() as k:
    Manager.waiting = k
    printed(Manager, {code!r})'''], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (path.exists() and path.read_text()) and time.monotonic() < until:
            time.sleep(.1)
        kernel = int(path.read_text())
        p.send_signal(signal.SIGKILL)
        p.wait()
        while not gone(kernel) and time.monotonic() < until:
            time.sleep(.1)
        assert gone(kernel)
    finally:
        p.kill()


CHAIN = '''
import os, sys, time
from pathlib import Path
from facegen.study._warm_kernels import Kernel, warm

def be_busy(folder):
    "What a run is: a process, and a kernel that has begun to work"
    with Kernel() as k:
        k.start_kernel(['-f', f'{folder}/kernel.json'], dict(os.environ), folder)
        while not os.path.exists(f'{folder}/kernel.json'):
            time.sleep(.1)
        Path(folder, 'pids').write_text(f'{os.getpid()} {k.pid} {os.getppid()}')
        time.sleep(600)

if __name__ == '__main__':
    warm(be_busy, sys.argv[1])
'''


@pytest.mark.parametrize('victims', ['who asked', 'the whole group'])
def test_nothing_is_left_of_a_run_when_those_who_asked_for_it_are_killed(tmp_path, victims):
    """The server imports ipykernel before anybody is a kernel, so it never looks for its parent, and a kernel has
    a process group of its own: without help it would go on, and write into its run's folder"""
    (tmp_path/'chain.py').write_text(CHAIN)
    p = subprocess.Popen([sys.executable, tmp_path/'chain.py', tmp_path], start_new_session=True,
                         stderr=subprocess.DEVNULL)
    pids, until = [], time.monotonic() + 120
    try:
        while not (tmp_path/'pids').exists() or len((tmp_path/'pids').read_text().split()) < 3:
            assert time.monotonic() < until and p.poll() is None
            time.sleep(.1)
        pids = [int(pid) for pid in (tmp_path/'pids').read_text().split()]
        assert not any(map(gone, pids))
        if victims == 'who asked':
            p.kill()
        else:
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        until = time.monotonic() + 20
        while not all(map(gone, pids)) and time.monotonic() < until:
            time.sleep(.1)
        assert [pid for pid in pids if not gone(pid)] == []
    finally:
        for pid in (p.pid, *pids):
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


def test_warm_runs_elsewhere_and_passes_failure_on(tmp_path):
    "In a process of its own, since a process has one fork server, and other tests want theirs"
    made = str(tmp_path/'made')
    out = python(f'''
from facegen.study._warm_kernels import warm
if __name__ == "__main__":
    warm(os.mkdir, {made!r})
    assert os.path.isdir({made!r})
    try: warm(os.mkdir, {made!r})
    except RuntimeError as e: print(e)''')
    assert 'mkdir' in out.stdout and 'FileExistsError' in out.stderr


def test_the_server_imports_every_module():
    ours = {'facegen.core', 'facegen.study.runner', 'facegen.study.commands', 'facegen.study._warm_kernels'}
    assert ours <= set(_warm_kernels.imports())
