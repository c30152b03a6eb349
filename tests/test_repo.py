"""The repository keeps its own promises: exports in sync, light notebooks, arrows that point down, true pages."""
import ast, json, re, subprocess, sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
NBS = REPO/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if re.match(r'\d\d_', p.name) and p.parent.name not in ('runs', 'figures')]
FIGURES = [p for p in NOTEBOOKS if p.parent.name == 'figures']
RUNS = [p for p in NOTEBOOKS if p.parent.name == 'runs']
MODULES = sorted(p for p in (REPO/'facegen').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
BY_HAND = 'study/_warm_kernels.py'  # no notebook exports it
BASICS = {'core', 'plotting', 'toyfaces'}  # every chapter may use them, no chapter names them
ini = ConfigParser(interpolation=None)
ini.read(REPO/'settings.ini')
ini = ini['DEFAULT']
BIN = Path(sys.executable).parent


def cells(path, kind): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]
def source(c): return ''.join(c['source'])
def place(path): return str(path.relative_to(NBS).with_suffix(''))


def noun(path):
    "The module that a chapter is about, without its room"
    return re.sub(r'^\d\d_', '', path.stem)


def module(path):
    "Its module, with the room"
    return '.'.join([*path.relative_to(NBS).parent.parts, noun(path)])


def every(paths): return pytest.mark.parametrize('path', paths, ids=place)


# Exports, cleaning, pins

def copy(tmp_path):
    "The notebooks and settings alone, in an empty folder"
    for f in ('settings.ini', 'setup.py', 'pyproject.toml'):
        (tmp_path/f).write_text((REPO/f).read_text())
    (tmp_path/'facegen').mkdir()
    (tmp_path/'facegen'/'__init__.py').write_text((REPO/'facegen'/'__init__.py').read_text())
    for p in NOTEBOOKS:
        there = tmp_path/p.relative_to(REPO)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(p.read_text())
    return tmp_path


def package(root):
    "Path in the package -> text"
    files = {str(p.relative_to(root/'facegen')): p.read_text() for p in (root/'facegen').rglob('*.py')}
    files.pop(BY_HAND, None)
    return files


def test_export_leaves_no_diff(tmp_path):
    "An export into an empty folder gives the modules that are committed, no more and no fewer"
    subprocess.run([BIN/'nbdev_export'], cwd=copy(tmp_path), check=True, capture_output=True)
    fresh, here = package(tmp_path), package(REPO)
    assert sorted(fresh) == sorted(here)
    assert [n for n in fresh if fresh[n] != here[n]] == []


def test_cleaning_leaves_no_diff(tmp_path):
    subprocess.run([BIN/'nbdev_clean'], cwd=copy(tmp_path), check=True, capture_output=True)
    assert [place(p) for p in NOTEBOOKS if (tmp_path/p.relative_to(REPO)).read_text() != p.read_text()] == []


def test_pins_agree():
    pins = {}
    for line in (ini['requirements'], ini['dev_requirements']):
        for word in line.split():
            name, _, pin = word.partition('==')
            assert pin, f'{word} is not pinned'
            assert pins.setdefault(name, pin) == pin
    env = (REPO/'environment.yml').read_text()
    for name, pin in re.findall(r'- ([a-z-]+)==([\w.]+)', env):
        assert pins[name] == pin
    assert re.search(r'torch==\S+', env) and env.index('torch==') < env.index('-e .[dev]')
    assert re.search(r'python=(\S+)', env)[1] == ini['min_python']


def test_the_pins_are_what_runs_here():
    from importlib.metadata import version
    for word in (ini['requirements'] + ' ' + ini['dev_requirements']).split():
        name, _, pin = word.partition('==')
        assert version(name).split('+')[0] == pin, name


# Notebooks

@every(NOTEBOOKS)
def test_a_notebook_is_light_and_quiet(path):
    assert path.stat().st_size < 420_000
    outputs = [o for c in cells(path, 'code') for o in c['outputs']]
    assert sum(len(json.dumps(o)) for o in outputs) < 300_000
    assert sum('image/png' in o.get('data', {}) for o in outputs) <= 6
    text = json.dumps([o.get('data', o) for o in outputs if 'image/png' not in o.get('data', {})])
    assert not re.search(r'<Figure|Warning|it/s\]|Traceback|/home/|/root/|/tmp/|/work/', text)
    assert not any(o['output_type'] == 'error' for o in outputs)


@every(NOTEBOOKS)
def test_a_notebook_opens_with_a_noun_and_a_promise(path):
    first = source(cells(path, 'markdown')[0]).strip().splitlines()
    assert first[0].startswith('# ') and [line for line in first[1:] if line.strip()][0].startswith('> ')


@every(CHAPTERS)
def test_a_chapter_closes_with_what_to_remember_and_exercises(path):
    prose = ' '.join(source(c) for c in cells(path, 'markdown'))
    assert 'What to remember' in prose and 'Exercises' in prose


@every(CHAPTERS)
def test_a_chapter_exports_to_the_module_of_its_path(path):
    "nbs/<room>/NN_<noun>.ipynb is facegen/<room>/<noun>.py"
    exports = re.findall(r'^#\| default_exp (\S+)$', '\n'.join(source(c) for c in cells(path, 'code')), re.M)
    assert exports == [module(path)]


@every(RUNS + FIGURES)
def test_a_run_and_a_figure_export_nothing(path):
    assert not re.search(r'^#\| ?(default_exp|export)', '\n'.join(source(c) for c in cells(path, 'code')), re.M)


def test_numbers_are_unique_in_a_room_and_nouns_in_the_house():
    "So that a number orders, and a chapter can be called by its last name"
    numbered = [(p.parent, p.name[:2]) for p in NOTEBOOKS if re.match(r'\d\d_', p.name)]
    assert len(numbered) == len(set(numbered))
    assert len(CHAPTERS) == len({noun(p) for p in CHAPTERS})


@every(RUNS)
def test_every_argument_of_a_run_does_something(path):
    "An argument that is written down and never read makes an experiment that measures chance"
    code = cells(path, 'code')
    arguments, = (source(c) for c in code if 'parameters' in c['metadata'].get('tags', []))
    read = {n for c in code if source(c) != arguments for n in names_read(source(c))}
    assert {a.target.id for a in ast.parse(arguments).body} - read == set()


def names_read(code):
    "Names that code reads, the record of a run's arguments left out"
    def is_record(n): return isinstance(n, ast.Assign) and any(getattr(t, 'id', '') == 'params' for t in n.targets)
    kept = [n for n in ast.parse(code).body if not is_record(n)]
    return {x.id for n in kept for x in ast.walk(n) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}


# Arrows

BELOW = {  # room -> rooms that its modules may import; `study` may import everything
    'core': '', 'plotting': 'core', 'data': 'core',
    'synthetic': 'core plotting data',
    'diffusion': 'core plotting data',
    'training': 'core plotting data diffusion',
    'models': 'core plotting data diffusion training',
    'conditioning': 'core plotting data diffusion training models',
    'adaptation': 'core plotting data diffusion training models',
    'evaluation': 'core plotting data diffusion training models conditioning adaptation'}


def modules_named(code, package=()):
    "Modules of facegen that code imports, as 'room.module' or 'core'; `package` is where the code itself lives"
    found = set()
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.Import):
            found |= {a.name for a in n.names}
        elif isinstance(n, ast.ImportFrom):
            above = package[:len(package) - n.level + 1] if n.level else ()
            start = '.'.join([*above, *([n.module] if n.module else [])])
            found |= {start, *(f'{start}.{a.name}' for a in n.names)}
    known = {'.'.join(['facegen', *p.relative_to(REPO/'facegen').with_suffix('').parts]) for p in MODULES}
    return {m.removeprefix('facegen.') for m in found & known}


def test_imports_of_every_kind_are_seen():
    code = ('import facegen.core\nfrom facegen.data import faces\nfrom facegen import plotting\n'
            'def f(): from facegen.models.unet import UNET')
    assert modules_named(code) == {'core', 'data.faces', 'plotting', 'models.unet'}
    code = 'from ..core import root\nfrom . import losses\nfrom .schedules import add_noise'
    assert modules_named(code, ('facegen', 'diffusion')) == {'core', 'diffusion.losses', 'diffusion.schedules'}


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(REPO/'facegen')))
def test_arrows_point_down_only(path):
    "Exported code imports from rooms below its own"
    package = ('facegen', *path.relative_to(REPO/'facegen').parent.parts)
    room = [*package, path.stem][1]
    used = {m.split('.')[0] for m in modules_named(path.read_text(), package)} - {room}
    assert room == 'study' or used - set(BELOW[room].split()) == set()


def chapters_used(path):
    "Modules of facegen that a notebook's cells import, those without a chapter left out"
    used = {m for c in cells(path, 'code') for m in modules_named(source(c))}
    return {m for m in used if not m.split('.')[-1].startswith('_')}


@every(CHAPTERS)
def test_a_chapter_imports_in_its_room_only_chapters_before_it(path):
    "Its cells as well as its module: numbers are the reading order"
    number = {module(p): p.name[:2] for p in CHAPTERS if p.parent == path.parent}
    assert {m for m in chapters_used(path) & number.keys() if number[m] >= path.name[:2]} == set()


def needs(path):
    "Chapters that a chapter says it needs, by their last names"
    said = re.search(r'\bNeeds (.*?)(?:\.\s|\.$|\n|$)', source(cells(path, 'markdown')[1]))
    assert said, f'{place(path)}: its second markdown cell has no sentence "Needs ..."'
    return set(re.findall(r'`(\w+)`', said[1]))


@every(CHAPTERS)
def test_a_chapter_needs_what_its_cells_import(path):
    assert needs(path) == {m.split('.')[-1] for m in chapters_used(path)} - BASICS


# Code that reads downwards

SHORT = (ast.Return, ast.Raise, ast.Continue, ast.Break, ast.Pass)


def is_short(statement):
    "What may stand on the line of its header: a way out, a docstring, or `...`"
    if isinstance(statement, SHORT): return True
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant): return False
    return statement.value.value is ... or isinstance(statement.value.value, str)


def suites(code):
    "Every header with the statements below it"
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, (ast.Module, ast.IfExp, ast.Lambda)): continue
        for name in ('body', 'orelse', 'finalbody'):
            if getattr(n, name, None):
                yield n, getattr(n, name)


def crowded(code, tries=False):
    "Lines on which a header and its body stand together; `tries` lets try and except of one simple statement pass"
    lines, found = code.splitlines(), []
    for header, body in suites(code):
        line = lines[body[0].lineno - 1]
        before = line.encode()[:body[0].col_offset].strip()
        if not before: continue
        one = len(body) == 1
        if one and is_short(body[0]): continue
        if tries and one and isinstance(header, (ast.Try, ast.ExceptHandler)) and not hasattr(body[0], 'body'): continue
        found.append(line.strip())
    return found


CROWDED = ['if x: y = 1', 'for a in b: print(a)', 'while x: x -= 1', 'with a: b()', 'def f(x): x.go()',
           'class A: x = 1', 'if x:\n    a()\nelse: b()', 'try: a()\nexcept E: pass',
           'def f(\n    x, # what\n): x.go()', 'match x:\n    case 1: go()', 'def f(x): return x; y']
READABLE = ['if x: return', 'for a in b:\n    print(a)', 'def f(x): return x', 'def f(x): "Says so"', 'def f(): ...',
            'class E(Exception): pass', 'y = 1 if x else 2', 'if x:\n    a()\nelif y:\n    b()',
            '@a\ndef f(x): return x', 'def f(\n    x, # what\n)->int: # it\n    "Do"\n    return x']


def test_crowded_lines_are_found():
    assert [c for c in CROWDED if not crowded(c)] == [] and [c for c in READABLE if crowded(c)] == []
    assert not crowded('try: a()\nexcept E as e: print(e)', tries=True) and crowded('if a: b()', tries=True)


TESTS = sorted((REPO/'tests').glob('*.py'))


@pytest.mark.parametrize('path', NOTEBOOKS + MODULES + TESTS, ids=lambda p: str(p.relative_to(REPO)))
def test_a_body_stands_below_its_header(path):
    if path.suffix == '.py':
        assert crowded(path.read_text(), tries=path.parent.name == 'tests') == []
        return
    for c in cells(path, 'code'):
        assert crowded(source(c), tries=not re.search(r'^#\| ?export', source(c), re.M)) == []


def test_ruff_finds_nothing():
    "One statement a line, 120 columns, nothing unused or unknown, in notebooks as well"
    command = [BIN/'ruff', 'check', '--no-cache', '--output-format', 'concise', '.']
    found = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-4000:]


# Words

MISLEADING = """Teller TELLERS told Told Guided Held Eye lowrank LOUDNESS TIMES given_away say_plan draw_faces keeper
    name_unused add_up in_common by_word at_most chosen_on parsed_by revive boots kernel_blind held_error
    generalisation_gap""".split()
PHRASES = ['kernel distance', 'told nothing', 'told no mask', 'laid beside', 'learnt by heart', '[Tt]ellers?']
MARKS = r'(?<![.\w\'"])(?:[Ff]loors?|[Cc]eilings?)(?![\w(])'  # best end of a distance, worst of an accuracy
HERE = ('nbs/glossary.ipynb', 'tests/test_repo.py')  # only the glossary, which translates, and this test may hold them


def pages():
    "File -> all that a reader finds written in it, saved outputs left out"
    plain = [*MODULES, *TESTS, *(REPO/'benchmarks').glob('*.py'), *(REPO/'figures').glob('*.md')]
    plain += [REPO/name for name in ('data/README.md', 'README.md', 'CONTRIBUTING.md', 'Snakefile', 'Makefile')]
    text = {p: p.read_text() for p in plain}
    for p in NOTEBOOKS:
        text[p] = '\n'.join(source(c) for kind in ('markdown', 'code') for c in cells(p, kind))
    return {f: t for p, t in text.items() if (f := str(p.relative_to(REPO))) not in HERE}


@pytest.mark.parametrize('pattern', [rf'\b(?:{"|".join(PHRASES)})\b', rf'`(?:{"|".join(MISLEADING)})\b', MARKS],
                         ids=['phrases', 'names', 'floor and ceiling'])
def test_words_that_mislead_are_gone(pattern):
    found = {f: sorted(set(re.findall(pattern, text))) for f, text in pages().items()}
    assert {f: w for f, w in found.items() if w} == {}


def identifiers(code):
    "All names that code makes or uses: variables, attributes, arguments, functions, classes, imports"
    for n in ast.walk(ast.parse(code)):
        for field in ('id', 'attr', 'arg', 'name'):
            yield getattr(n, field, None)


def test_names_that_mislead_are_gone():
    code = {p: [p.read_text()] for p in MODULES + TESTS}
    code |= {p: [source(c) for c in cells(p, 'code')] for p in NOTEBOOKS}
    found = {p: set(MISLEADING) & {n for c in codes for n in identifiers(c)} for p, codes in code.items()}
    assert {str(p.relative_to(REPO)): w for p, w in found.items() if w} == {}


# The index and the glossary

INDEX, GLOSSARY = NBS/'index.ipynb', NBS/'glossary.ipynb'
LINK = re.compile(r'\]\(([\w/.]+\.ipynb)\)')


def sections(path, level):
    "Heading -> the text below it, to the next heading of that level or above"
    text = '\n\n'.join(source(c) for c in cells(path, 'markdown'))
    parts = re.split(rf'^(#{{1,{level}}}) (.*)$', text, flags=re.M)
    return {parts[i + 1]: parts[i + 2] for i in range(1, len(parts), 3) if len(parts[i]) == level}


PATHS = {k: LINK.findall(v) for k, v in sections(INDEX, 3).items()} if INDEX.exists() else {}


def rests_on():
    "Figure notebook -> nouns of the chapters that the index wants read before it"
    lines = [line for line in sections(INDEX, 2)['Figures'].splitlines() if line.startswith('|')]
    rows = [line.split('|') for line in lines if LINK.search(line)]
    return {LINK.search(r[1])[1]: set(re.findall(r'`(\w+)`', r[-2])) for r in rows}


def test_the_map_names_every_notebook_once():
    "In the tables of the index: chapters, runs and figures"
    lines = '\n'.join(source(c) for c in cells(INDEX, 'markdown')).splitlines()
    named = [LINK.search(line)[1] for line in lines if line.startswith('|') and LINK.search(line)]
    assert sorted(named) == sorted(place(p) + '.ipynb' for p in CHAPTERS + RUNS + FIGURES)


def test_links_of_the_index_lead_somewhere():
    text = '\n'.join(source(c) for c in cells(INDEX, 'markdown'))
    assert [f for f in re.findall(r'\]\((?!http)([^)#]+)', text) if not (NBS/f).exists()] == []
    for name, link in re.findall(r'\[`(\w+)`\]\(([\w/.]+\.ipynb)\)', text):
        assert name in (noun(NBS/link), (NBS/link).stem)


def test_a_figure_rests_on_the_chapters_it_imports():
    "The machinery of the study left out, which every figure uses and no reader needs"
    nouns, table = {noun(p) for p in CHAPTERS}, rests_on()
    assert sorted(table) == sorted(place(p) + '.ipynb' for p in FIGURES)
    for figure, before in table.items():
        used = {m.split('.')[-1] for m in chapters_used(NBS/figure) if not m.startswith('study.')} - BASICS
        assert before and before <= nouns and used <= before, figure


@pytest.mark.parametrize('name', PATHS)
def test_a_reading_path_can_be_read(name):
    "Each chapter's Needs stand before it, and so do the chapters that a figure rests on"
    assert PATHS[name] and len(PATHS[name]) == len(set(PATHS[name]))
    table, read = rests_on(), set()
    for link in PATHS[name]:
        path = NBS/link
        before = needs(path) if path in CHAPTERS else table.get(link, set())
        assert before - read - BASICS == set(), f'{link} comes too early'
        read.add(noun(path))


def test_there_are_paths_for_everybody_and_one_is_the_whole_book():
    words = ' '.join(PATHS).lower()
    assert all(w in words for w in ('student', 'reproducer', 'teacher'))
    book, = (v for k, v in PATHS.items() if 'whole book' in k.lower())
    chapters = [link for link in book if NBS/link in CHAPTERS]
    assert sorted(chapters) == sorted(place(p) + '.ipynb' for p in CHAPTERS)


def test_every_term_of_the_glossary_has_a_chapter_that_exists():
    rows = [line for c in cells(GLOSSARY, 'markdown') for line in source(c).splitlines() if line.startswith('| **')]
    assert len(rows) >= 60
    terms = [re.match(r'\| \*\*(.+?)\*\*', r)[1] for r in rows]
    assert len(terms) == len(set(terms))
    modules = {module(p) for p in CHAPTERS}
    for r in rows:
        named = re.findall(r'`([\w.]+)`', re.split(r'(?<!\\)\|', r)[-3])
        assert named and set(named) <= modules, r


# What the pages say

def test_no_picture_of_the_repository_is_a_data_set_face():
    tracked = subprocess.run(['git', 'ls-files'], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    assert not [f for f in tracked if re.search(r'\.(jpe?g|npz|arrow|pkl|pt|bin|ckpt)$', f)]
    assert not [f for f in tracked if f.endswith('.png') and not f.startswith(('figures/', 'data/gallery/'))]
    for folder, limit in (('data/gallery/', 100_000), ('figures/', 400_000)):
        assert not [f for f in tracked if f.startswith(folder) and (REPO/f).stat().st_size > limit]


def written():
    "Every page with instructions, and the prose of every notebook"
    files = [p.read_text() for p in (REPO/'README.md', REPO/'CONTRIBUTING.md', REPO/'data'/'README.md')]
    return files + [source(c) for p in NOTEBOOKS for c in cells(p, 'markdown')]


def test_commands_that_are_written_down_name_runs():
    "Whoever copies a command from a page gets a result"
    from facegen.study.experiments import parse_name
    named = [n for page in written() for n in re.findall(r'facegen (?:launch|keep) ([\w.+-]+-s\d+)', page)]
    assert len(named) >= 4 and all(parse_name(n) for n in named)


@cache
def usage(): return subprocess.run([BIN/'facegen', '--help'], capture_output=True, text=True, check=True).stdout


PAGES = [REPO/'README.md', REPO/'CONTRIBUTING.md', REPO/'data'/'README.md']


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_commands_modules_and_links_that_are_written_down_exist(page):
    text = page.read_text()
    targets = re.findall(r'^([a-z]+):', (REPO/'Makefile').read_text(), re.M)
    assert set(re.findall(r'(?:`|^    )make ([a-z]+)', text, re.M)) <= set(targets)
    verbs = re.findall(r'^  (\w+) ', usage(), re.M)
    assert verbs and set(re.findall(r'(?:bin/|^    |`)facegen (\w+)', text, re.M)) <= set(verbs)
    for name in re.findall(r'\bfacegen\.([a-z_]+(?:\.[a-z_]+)*)', text):
        path = REPO/'facegen'/name.replace('.', '/')
        assert path.is_dir() or path.with_suffix('.py').exists(), name
    assert [f for f in re.findall(r'\]\((?!http)([^)#]+)', text) if not (page.parent/f).exists()] == []


def test_the_ten_lines_of_the_readme_are_those_of_the_index():
    "Where they are run, and where their picture comes from"
    block, = re.findall(r'```python\n(.*?)```', (REPO/'README.md').read_text(), re.S)
    assert block.strip() in [source(c) for c in cells(INDEX, 'code')]


def readme_table():
    "Experiment -> what the README says of it"
    found = re.findall(r'^\| .*?`([\w.+-]+)` \| (.+) \|$', (REPO/'README.md').read_text(), re.M)
    return {row: [v.replace('**', '').strip() for v in rest.split('|')] for row, rest in found}


def test_the_table_of_the_readme_says_what_the_results_say():
    "Mean over seeds, with the lowest and the highest KID; the marks are those of real faces after the autoencoder"
    from facegen.study.runner import results
    found, said = results('laptop'), readme_table()
    assert len(said) >= 8
    measured = found.groupby(['row', 'metric']).value.agg(['mean', 'min', 'max', 'count'])
    for row, (kid, *rest) in said.items():
        v = measured.loc[row, 'kid_32px']
        assert kid == f'{v["mean"]:.2f}' + (f' ({v["min"]:.2f} to {v["max"]:.2f})' if v['count'] > 1 else ''), row
        means = [f'{measured.loc[(row, m), "mean"]:.2f}' for m in ('kid_outside', 'balanced_accuracy', 'miou')]
        assert rest == [*means, f'{v["count"]:.0f}'], row
        assert all(np.ptp(measured.loc[(row, m), ['min', 'max']]) <= .05 for m in ('balanced_accuracy', 'miou')), row
    first = found[(found.row == 'spatial') & (found.seed == 0)].set_index('metric')
    marks = [first.recon[m] for m in ('kid_32px', 'kid_outside', 'balanced_accuracy', 'miou')]
    assert re.search(r'\| ' + r' \| '.join(f'{m:.2f}' for m in marks) + r' \|', (REPO/'README.md').read_text())
