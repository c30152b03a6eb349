"""The repository keeps its own promises: exports in sync, notebooks clean and light, pins that agree."""
import ast, json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO/'nbs').glob('*.ipynb'))
CHAPTERS = [p for p in NOTEBOOKS if re.match(r'[012]\d_', p.name)]
ini = ConfigParser(interpolation=None); ini.read(REPO/'settings.ini'); ini = ini['DEFAULT']
BIN = Path(sys.executable).parent


def cells(path, kind): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]
def source(c): return ''.join(c['source'])


def copy(tmp_path):
    "The notebooks and settings alone, in an empty folder"
    for f in ('settings.ini', 'setup.py', 'pyproject.toml'): (tmp_path/f).write_text((REPO/f).read_text())
    (tmp_path/'nbs').mkdir(); (tmp_path/'facegen').mkdir()
    (tmp_path/'facegen'/'__init__.py').write_text((REPO/'facegen'/'__init__.py').read_text())
    for p in NOTEBOOKS: (tmp_path/'nbs'/p.name).write_text(p.read_text())
    return tmp_path


def test_export_leaves_no_diff(tmp_path):
    "An export into an empty folder gives the modules that are committed, no more and no fewer"
    subprocess.run([BIN/'nbdev_export'], cwd=copy(tmp_path), check=True, capture_output=True)
    fresh, here = ({p.name: p.read_text() for p in (d/'facegen').glob('*.py')} for d in (tmp_path, REPO))
    assert sorted(fresh) == sorted(here)
    assert [n for n in fresh if fresh[n] != here[n]] == []


def test_cleaning_leaves_no_diff(tmp_path):
    subprocess.run([BIN/'nbdev_clean'], cwd=copy(tmp_path), check=True, capture_output=True)
    assert [p.name for p in NOTEBOOKS if (tmp_path/'nbs'/p.name).read_text() != p.read_text()] == []


def test_pins_agree():
    pins = {}
    for line in (ini['requirements'], ini['dev_requirements']):
        for word in line.split():
            name, _, pin = word.partition('=='); assert pin, f'{word} is not pinned'; assert pins.setdefault(name, pin) == pin
    env = (REPO/'environment.yml').read_text()
    for name, pin in re.findall(r'- ([a-z-]+)==([\w.]+)', env): assert pins[name] == pin
    assert re.search(r'torch==\S+', env) and env.index('torch==') < env.index('-e .[dev]')
    assert re.search(r'python=(\S+)', env)[1] == ini['min_python']


def test_the_pins_are_what_runs_here():
    from importlib.metadata import version
    for word in (ini['requirements'] + ' ' + ini['dev_requirements']).split():
        name, _, pin = word.partition('=='); assert version(name).split('+')[0] == pin, name


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_light_and_quiet(path):
    assert path.stat().st_size < 420_000
    outputs = [o for c in cells(path, 'code') for o in c['outputs']]
    assert sum(len(json.dumps(o)) for o in outputs) < 300_000 and sum('image/png' in o.get('data', {}) for o in outputs) <= 6
    text = json.dumps([o.get('data', o) for o in outputs if 'image/png' not in o.get('data', {})])
    assert not re.search(r'<Figure|Warning|it/s\]|Traceback|/home/|/root/|/tmp/|/work/', text)
    assert not any(o['output_type'] == 'error' for o in outputs)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_with_a_noun_and_a_promise(path):
    first = source(cells(path, 'markdown')[0]).strip().splitlines()
    assert first[0].startswith('# ') and [l for l in first[1:] if l.strip()][0].startswith('> ')


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_reads_in_ten_minutes(path):
    "Two hundred and twenty words or twenty-five lines of code a minute; directives and imports are not read"
    words = sum(len(re.findall(r'[A-Za-z]+', source(c))) for c in cells(path, 'markdown'))
    lines = sum(len([l for l in source(c).splitlines() if l.strip() and not re.match(r'#\||import |from ', l)]) for c in cells(path, 'code'))
    assert words/220 + lines/25 <= 10
    prose = ' '.join(source(c) for c in cells(path, 'markdown'))
    assert 'What to remember' in prose and 'Exercises' in prose


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_imports_only_chapters_before_it(path):
    order = [p.stem.split('_', 1)[1] for p in CHAPTERS]; here = order.index(path.stem.split('_', 1)[1])
    used = {m for c in cells(path, 'code') for m in re.findall(r'from facegen\.(\w+)', source(c))}
    assert {m for m in used if order.index(m) >= here} == set()


def test_no_picture_of_the_repository_is_a_data_set_face():
    tracked = subprocess.run(['git', 'ls-files'], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    assert not [f for f in tracked if re.search(r'\.(jpe?g|npz|arrow|pkl|pt|bin|ckpt)$', f)]
    assert not [f for f in tracked if f.endswith('.png') and not f.startswith(('figures/', 'data/gallery/'))]
    assert not [f for f in tracked if f.startswith(('data/gallery/', 'figures/')) and (REPO/f).stat().st_size > (100_000 if 'gallery' in f else 400_000)]


def test_commands_that_are_written_down_name_runs():
    "Whoever copies a command from a page gets a row"
    from facegen.rows import parse_name
    pages = [p.read_text() for p in (REPO/'README.md', REPO/'CONTRIBUTING.md', REPO/'data'/'README.md')] + [source(c) for p in NOTEBOOKS for c in cells(p, 'markdown')]
    named = [n for page in pages for n in re.findall(r'facegen (?:launch|keep) ([\w.+-]+-s\d+)', page)]
    assert len(named) >= 4 and all(parse_name(n) for n in named)


def read_by(code):
    "Names that code reads, the record of a run's arguments left out"
    kept = [n for n in ast.parse(code).body if not (isinstance(n, ast.Assign) and any(getattr(t, 'id', '') == 'params' for t in n.targets))]
    return {x.id for n in kept for x in ast.walk(n) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.name[0] == '3'], ids=lambda p: p.stem)
def test_every_argument_of_a_run_does_something(path):
    "An argument that is written down and never read makes a row that measures luck"
    code = cells(path, 'code'); arguments, = (source(c) for c in code if 'parameters' in c['metadata'].get('tags', []))
    assert {a.target.id for a in ast.parse(arguments).body} - {n for c in code if source(c) != arguments for n in read_by(source(c))} == set()
