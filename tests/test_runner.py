"""A batch skips, resumes, fails and recovers as it should, and its results become one table."""
import os, shutil, subprocess, sys
from pathlib import Path

import nbformat, pytest

from facegen.core import load_result, save_result
from facegen.study import experiments, runner

REPO = Path(__file__).resolve().parents[1]
RECORD = dict(metric='frechet', value=1., n=64, low=.9, high=1.2, chance=None, reference=.1, upper=None, headline=True,
              network='x')


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    return tmp_path.resolve()


def test_an_argument_that_no_notebook_knows_is_an_error(home):
    with pytest.raises(ValueError, match='30_judges has no parameter stepz'):
        runner.execute('30_judges', home/'x.ipynb', dict(stepz=1), 'x')


def test_results_and_table(home):
    save_result('unet-laptop-s0', dict(steps=3), [RECORD, RECORD | dict(headline=False)], 5)
    save_result('stray', {}, [RECORD])
    save_result('_unet-smoke-s0', {}, [RECORD])
    assert len(runner.results()) == 3 and len(runner.results('laptop')) == 2
    assert len(runner.headline_table('laptop')) == len(runner.headline_table('laptop', ['unet', 'attrs'])) == 1
    with pytest.raises(ValueError, match='no results at scale gpu'):
        runner.headline_table('gpu')
    with pytest.raises(ValueError, match='no results of attrs at scale laptop: run `facegen launch attrs-laptop-s0`'):
        runner.headline_table('laptop', ['attrs'])
    with pytest.raises(ValueError, match="no experiment 'unett'"):
        runner.headline_table('laptop', ['unett'])


def snake(home, *more, ok=True):
    "Run the Snakefile at smoke in `home`"
    command = ['snakemake', '--snakefile', str(REPO/'Snakefile'), '--directory', str(home), '--cores', '2',
               '--keep-going', '--rerun-incomplete', '--config', 'scale=smoke', 'seeds=2', 'demo=1', '--']
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    p = subprocess.run([*command, *(more or ['demo'])], capture_output=True, text=True,
                       env={**os.environ, 'PATH': path, 'MPLBACKEND': 'agg'})
    assert (p.returncode == 0) == ok, p.stdout + p.stderr
    return p.stdout + p.stderr


def test_a_batch_runs_skips_and_reruns_only_what_changed(home):
    "Everything runs once, judges first since no weights are here; then nothing; then only what has no result any more"
    snake(home)
    made = {p.name: p.stat().st_mtime_ns for p in (home/'data/results').glob('*.json')}
    generators = experiments.run_names('smoke', 2, experiments.DEMO)
    judges = experiments.run_names('smoke', 1, ['classifier32', 'parser32'])
    assert set(made) == {f'{n}.json' for n in generators + judges}
    plotted = runner.available_figures('smoke', experiments.DEMO)
    assert set((home/'figures').glob('*.png')) == {runner.figure_path(f, 'smoke') for f in plotted}
    assert 'Nothing to be done' in snake(home)
    a, b = (load_result(home/f'data/results/_attrs-smoke-s{s}.json') for s in (0, 1))
    assert a['params']['seed'] == 0 and b['params']['seed'] == 1 and a['metrics'] != b['metrics']
    before = a['metrics']
    (home/'data/results/_attrs-smoke-s0.json').unlink()
    snake(home)
    now = {p.name: p.stat().st_mtime_ns for p in (home/'data/results').glob('*.json')}
    assert {n for n in made if now[n] != made[n]} == {'_attrs-smoke-s0.json'}
    again = load_result(home/'data/results/_attrs-smoke-s0.json')
    assert again['metrics'] == before  # the same numbers, to the last bit


def test_a_failing_run_stops_its_branch_only_and_keeps_its_notebook(home):
    "A judge whose folder holds a foreign state fails; the parser, another branch, is still made"
    bad = home/'data/runs/_classifier32-smoke-s0'
    bad.mkdir(parents=True)
    (bad/'state.safetensors').write_bytes(b'not a state')
    out = snake(home, ok=False)
    assert (home/'data/results/_parser32-smoke-s0.json').exists()
    assert not (home/'data/results/_attrs-smoke-s0.json').exists()
    assert '_classifier32-smoke-s0 failed with' in out
    assert str(bad/'_classifier32-smoke-s0.ipynb') in out
    kept = nbformat.read(bad/'_classifier32-smoke-s0.ipynb', 4)
    assert any(o.output_type == 'error' for c in kept.cells if c.cell_type == 'code' for o in c.outputs)


def test_a_run_starts_from_committed_weights_where_no_run_is_here(home):
    "What ran here comes first, then weights of the repository; without either the path stays as it was"
    def want(): return runner.from_weights(experiments.job('attrs-laptop-s0'))['params']
    assert want()['classifier'] == 'data/runs/classifier32-laptop-s0/judge'
    judge = home/'data/runs/classifier32-laptop-s0/judge'
    judge.mkdir(parents=True)
    (judge/'config.json').write_text('{}')
    assert runner.keep_weights('classifier32-laptop-s0') == home/'data/weights/classifier32-laptop-s0'
    assert want()['classifier'] == 'data/runs/classifier32-laptop-s0/judge'
    shutil.rmtree(home/'data/runs')
    assert want()['classifier'] == 'data/weights/classifier32-laptop-s0/judge'
    assert want()['parser'] == 'data/runs/parser32-laptop-s0/judge'
    with pytest.raises(FileNotFoundError, match='facegen launch parser32-laptop-s0'):
        runner.keep_weights('parser32-laptop-s0')
    big = home/'data/runs/parser32-laptop-s0/judge'
    big.mkdir(parents=True)
    (big/'config.json').write_bytes(b'x'*3_100_000)
    with pytest.raises(ValueError, match='3.1 MB'):
        runner.keep_weights('parser32-laptop-s0')


def test_committed_weights_are_small_and_load():
    "data/weights holds what `from_weights` may take: at most 3 MB each, and a network that opens"
    from facegen.evaluation.judges import load_classifier, load_parser
    for folder in (REPO/'data'/'weights').iterdir():
        if folder.is_dir():
            assert sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) < 3e6, folder
    c, name = load_classifier(str(REPO/'data/weights/classifier32-laptop-s0/judge'))
    assert name == 'classifier32-laptop-s0' and c.config.size == 32
    p, name = load_parser(str(REPO/'data/weights/parser32-laptop-s0/judge'))
    assert name == 'parser32-laptop-s0' and p.config.size == 32
