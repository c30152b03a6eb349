"""What is built installs: an sdist holds its pins, a wheel every module, and no extra breaks an installation."""
import os, re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ini = ConfigParser(interpolation=None)
ini.read(REPO/'settings.ini')
ini = ini['DEFAULT']


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "The source distribution, and the wheel that is built from it and from nothing else"
    pytest.importorskip('setuptools', minversion='77')
    folder = tmp_path_factory.mktemp('dist')
    ignored = shutil.ignore_patterns('__pycache__')
    for name in 'settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE'.split():
        shutil.copy(REPO/name, folder)
    shutil.copytree(REPO/'facegen', folder/'facegen', ignore=ignored)

    def build(what, cwd):
        code = f'from setuptools import build_meta; build_meta.build_{what}({str(folder)!r})'
        subprocess.run([sys.executable, '-c', code], cwd=cwd, check=True, capture_output=True)
    build('sdist', folder)
    sdist, = folder.glob('*.tar.gz')
    with tarfile.open(sdist) as t:
        t.extractall(folder/'unpacked', filter='data')
    build('wheel', next((folder/'unpacked').iterdir()))
    wheel, = folder.glob('*.whl')
    return sdist, wheel


def modules(names):
    "Paths in the package, from paths that have something before them or not"
    return {m[0] for n in names if (m := re.search(r'facegen/[\w/]+\.py$', n)) and '.egg-info' not in n}


def test_distributions_hold_every_module_and_the_pins(dist):
    sdist, wheel = dist
    here = {str(p.relative_to(REPO)) for p in (REPO/'facegen').rglob('*.py')}
    with tarfile.open(sdist) as t:
        names = t.getnames()
    assert modules(names) == here and any(n.endswith('/settings.ini') for n in names)
    with zipfile.ZipFile(wheel) as z:
        assert modules(z.namelist()) == here
        info = {n.split('/')[-1]: z.read(n).decode() for n in z.namelist() if '.dist-info/' in n}
    assert 'facegen = facegen.study.commands:main' in info['entry_points.txt']
    required = re.findall(r'^Requires-Dist: ([\w.-]+==[\w.]+)$', info['METADATA'], re.M)
    assert [r.replace('_', '-') for r in required] == [r.replace('_', '-') for r in ini['requirements'].split()]
    assert f"Requires-Python: >={ini['min_python']}" in info['METADATA']


def test_the_command_of_the_wheel_runs_with_a_clone(dist, tmp_path):
    "From a folder that belongs to no clone"
    with zipfile.ZipFile(dist[1]) as z:
        z.extractall(tmp_path/'site')
    code = 'import facegen; print(facegen.__file__); from facegen.study.commands import main; main()'
    def facegen(*words, **env):
        env = {k: v for k, v in os.environ.items() if k != 'FACEGEN_ROOT'} | env
        return subprocess.run([sys.executable, '-c', code, *words], cwd=tmp_path, capture_output=True, text=True,
                              env=env | dict(PYTHONPATH=str(tmp_path/'site')))
    p = facegen('table', 'laptop', 'attrs', FACEGEN_ROOT=str(REPO))
    assert p.returncode == 0 and p.stdout.startswith(str(tmp_path/'site')) and 'attrs-laptop-s0' in p.stdout, p.stderr
    p = facegen('table', 'laptop', 'attrs')
    assert p.returncode == 1 and 'set FACEGEN_ROOT to one' in p.stderr and len(p.stderr.splitlines()) == 1


def test_forked_kernels_and_the_command_have_their_libraries_pinned():
    "A kernel is forked through internals of jupyter_client; the command's help is made by fastcore"
    names = {r.split('==')[0] for r in ini['requirements'].split()}
    assert {'jupyter_client', 'fastcore'} <= names


def test_nothing_brings_a_torchvision():
    "One that was built for another torch keeps diffusers and transformers from being imported"
    wanted = ini['requirements'].split() + ini['dev_requirements'].split()
    assert not [r for r in wanted if re.match('torchvision|torch-fidelity|lpips|timm', r)]
    assert re.search(r'pip install .*--no-deps \$\(INCEPTION\)', (REPO/'Makefile').read_text())
    assert re.fullmatch(r'torch-fidelity==[\d.]+', ini['inception_requirements'])
    dry_run = ['make', '--no-print-directory', '-n', 'inception']
    recipe = subprocess.run(dry_run, cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert recipe.splitlines()[-1].endswith(f"--no-deps {ini['inception_requirements']}")


# Python

def fake_python(folder, name, version):
    "A program that answers the Makefile's question as that version would"
    path = folder/name
    path.write_text(f'#!/bin/sh\ntest "{int(version >= (3, 11))}" = 1\n')
    path.chmod(0o755)


def recipe(folder):
    "What `make setup` would do in a folder without .venv, with these programs alone"
    for f in ('Makefile', 'settings.ini', 'setup.py'):
        shutil.copy(REPO/f, folder)
    programs = folder/'programs'
    for tool in ('sh', 'sed', 'head', 'make'):
        if not (programs/tool).exists():
            (programs/tool).symlink_to(shutil.which(tool))
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHON', 'MAKEFLAGS', 'MAKELEVEL')}
    def make(*words): return subprocess.run(['make', *words], cwd=folder, capture_output=True, text=True,
                                            env=env | dict(PATH=str(programs)))
    return make


@pytest.mark.parametrize('there, found', [
    ({'python3.11': (3, 11), 'python3': (3, 13)}, 'python3.11'),
    ({'python3.13': (3, 13), 'python3.12': (3, 12), 'python3': (3, 9)}, 'python3.12'),
    ({'python3.10': (3, 10), 'python3': (3, 14)}, 'python3')])
def test_make_finds_a_python(tmp_path, there, found):
    (tmp_path/'programs').mkdir()
    for name, version in there.items():
        fake_python(tmp_path/'programs', name, version)
    p = recipe(tmp_path)('-n', 'setup')
    assert p.returncode == 0 and f'\n{found} -m venv .venv\n' in p.stdout, p.stdout + p.stderr


def test_make_says_which_python_it_needs(tmp_path):
    (tmp_path/'programs').mkdir()
    fake_python(tmp_path/'programs', 'python3', (3, 10))
    p = recipe(tmp_path)('setup')
    assert p.returncode != 0 and 'facegen needs Python 3.11 or newer' in p.stderr and 'PYTHON=' in p.stderr


def test_make_test_checks_the_style_first_and_notebooks_are_found_in_their_rooms():
    def lines(target):
        dry_run = ['make', '--no-print-directory', '-n', target]
        p = subprocess.run(dry_run, cwd=REPO, capture_output=True, text=True, check=True)
        return [line for line in p.stdout.splitlines() if 'pip install' not in line]
    commands = [line for line in lines('test') if 'ruff' in line or 'pytest' in line]
    assert 'ruff check nbs facegen tests' in commands[0] and 'pytest' in commands[-1]
    named = set(re.findall(r'nbs/\S+\.ipynb', ' '.join(lines('notebooks'))))
    here = {str(p.relative_to(REPO)) for p in (REPO/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    assert named == {n for n in here if not n.startswith('nbs/runs/')}
