"""The command explains itself, answers a typing error with what was meant, and imports what it needs."""
import inspect, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
from fastcore.docments import docments

from facegen import __version__
from facegen.study import commands, experiments, runner

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    return tmp_path.resolve()


@pytest.fixture(autouse=True)
def no_folder_of_its_own(monkeypatch):
    "The verb `demo` names one for its process"
    monkeypatch.setenv('FACEGEN_OUT', '')


def said(capsys, line, code=0):
    "What a command prints, and how it ends"
    end = 0
    try:
        commands.main(line.split())
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        end = 1 if isinstance(e.code, str) else e.code
    out = capsys.readouterr()
    assert end == code, out
    return ' '.join((out.out + out.err).split())


def test_help_lists_every_verb_with_one_line(capsys):
    verbs = ('demo study lottery inspect plan pack launch sample distance keep samples eyes judge ruler draw figures '
             'table')
    assert set(commands.VERBS) == set(verbs.split())
    text = said(capsys, '--help')
    assert all(f' {verb} {f.__doc__} ' in text for verb, f in commands.VERBS.items())
    assert all('\n' not in f.__doc__ for f in commands.VERBS.values())
    assert said(capsys, '--version') == f'facegen {__version__}'


@pytest.mark.parametrize('verb', commands.VERBS)
def test_help_of_a_verb_explains_every_argument(capsys, verb):
    text, call = said(capsys, f'{verb} --help'), commands.VERBS[verb]
    assert call.__doc__ in text
    explained = docments(call, full=True, returns=False)
    assert list(explained) == list(inspect.signature(call).parameters)
    for name, d in explained.items():
        meaning = d.docment or d.anno.help
        shown = rf"(?:{name}|--{name.replace('_', '-')})"  # a word, or an option
        assert meaning and re.search(rf'{shown}\b.*{re.escape(meaning)}', text), name


@pytest.mark.parametrize('line, right, code', [
    ('plann laptop 1', 'plan', 2),
    ('tabel laptop', 'table', 2),
    ('plan labtop 1', 'laptop', 1),
    ('study labtop', 'laptop', 1),
    ('demo --scale smok', 'smoke', 1),
    ('sample nowhere Smilling', 'Smiling', 1),
    ('plan laptop 1 spatail', 'spatial', 1),
    ('table smoek', 'smoke', 1),
    ('table laptop spatail', 'spatial', 1),
    ('figures papr', 'paper', 1),
    ('draw 44_backbone laptop', '44_backbones', 1),
    ('draw 44_backbones laptp', 'laptop', 1),
    ('launch spatail-laptop-s2', 'spatial-laptop-s2', 1),
    ('keep parser32-laptop', 'parser32-laptop-s0', 1)])
def test_a_wrong_word_is_answered_with_what_was_meant(home, capsys, line, right, code):
    text = said(capsys, line, code)
    assert f"(did you mean '{right}'?)" in text and 'facegen: ' in text


def test_words_that_mean_nothing_end_with_the_choice_there_is(home, capsys):
    assert "there is no experiment 'nosuch': choose among" in said(capsys, 'table laptop nosuch', 1)
    assert "there is no experiment 'nosuch': choose among" in said(capsys, 'plan smoke 1 nosuch', 1)
    assert "no verb 'xyz'" in said(capsys, 'xyz', 2) and 'a verb is missing' in said(capsys, '', 2)
    assert "invalid int value: 'x'" in said(capsys, 'plan laptop x', 2)
    assert 'no results at scale gpu' in said(capsys, 'table gpu', 1)


def test_a_plan_names_what_is_left_out(home, capsys, monkeypatch):
    text = said(capsys, 'plan laptop 1')
    rendered = [e for e in experiments.EXPERIMENTS.values() if e.params.get('faces', 'toy').startswith('toy')]
    n = sum('laptop' in e.scales for e in rendered)
    assert f'{n} of {n} runs' in text and 'left out' in text and 'parser-pairs128' in text
    assert '12 of 12 runs' in said(capsys, 'plan laptop 12 unet --jobs 1')
    (home/'pairs128').mkdir()
    monkeypatch.setenv('FACEGEN_FACES', str(home))
    assert 'parser-pairs128' not in said(capsys, 'plan laptop 1')


def test_a_stopped_command_says_how_to_go_on(monkeypatch):
    def stopped(*_): raise KeyboardInterrupt
    monkeypatch.setattr(runner, 'launch', stopped)
    with pytest.raises(SystemExit, match='launch was stopped; the same command goes on'):
        commands.main(['launch', 'unet-laptop-s0'])


@pytest.mark.parametrize('line', ['--help', '--version', 'plan --help', 'plan smoke 1 nosuch', 'launch unet-laptop',
                                  'table laptop spatial', 'plan laptop 1 --job'])
def test_what_computes_nothing_imports_no_network_library(line):
    "So that it is answered at once"
    code = f'''
import sys
from facegen.study.commands import main
try: main({line.split()})
except SystemExit: pass
heavy = "torch", "diffusers", "transformers", "papermill", "snakemake", "matplotlib"
print([m for m in heavy if m in sys.modules])'''
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=REPO)
    assert p.returncode == 0 and p.stdout.splitlines()[-1] == '[]', p.stdout + p.stderr


def test_outside_of_a_clone_it_says_what_it_needs(tmp_path):
    "One sentence, where neither the folder nor the package belongs to a clone"
    shutil.copytree(REPO/'facegen', tmp_path/'facegen', ignore=shutil.ignore_patterns('__pycache__'))
    code = 'from facegen.study.commands import main; main(["table", "laptop"])'
    env = {k: v for k, v in os.environ.items() if k != 'FACEGEN_ROOT'}
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert p.returncode == 1, p.stdout + p.stderr
    assert len(p.stderr.strip().splitlines()) == 1
    assert p.stderr.startswith('facegen: ') and 'clone' in p.stderr and 'FACEGEN_ROOT' in p.stderr
