"""A batch skips, resumes, fails and recovers as it should, and its results become one table."""
import io, os, platform, shutil, subprocess, sys, time
from pathlib import Path

import nbformat, pytest, torch

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


def with_needs(runs):
    "Runs, and all that they need, directly or not"
    found = set(runs)
    for run in runs:
        found |= with_needs(experiments.job(run)['needs'])
    return found


def test_a_batch_runs_skips_and_reruns_only_what_changed(home):
    "Everything runs once, judges first since no weights are here; then nothing; then only what has no result any more"
    snake(home)
    made = {p.name: p.stat().st_mtime_ns for p in (home/'data/results').glob('*.json')}
    generators = experiments.run_names('smoke', 2, experiments.DEMO)
    assert set(made) == {f'{n}.json' for n in with_needs(generators)}
    first = generators[0]
    assert set((home/'figures').glob('*.png')) == {runner.figure_path(experiments.DEMO_FIGURE, 'smoke')}
    assert 'Nothing to be done' in snake(home)
    a, b = (load_result(home/f'data/results/{run}.json') for run in generators[:2])
    assert a['params']['seed'] == 0 and b['params']['seed'] == 1 and a['metrics'] != b['metrics']
    before = a['metrics']
    (home/f'data/results/{first}.json').unlink()
    snake(home)
    now = {p.name: p.stat().st_mtime_ns for p in (home/'data/results').glob('*.json')}
    assert {n for n in made if now[n] != made[n]} == {f'{first}.json'}
    again = load_result(home/f'data/results/{first}.json')
    assert again['metrics'] == before  # the same numbers, to the last bit


def test_a_failing_run_stops_its_branch_only_and_keeps_its_notebook(home):
    "A judge whose folder holds a foreign state fails; the parser, another branch, is still made"
    run, = experiments.run_names('smoke', 1, experiments.DEMO[:1])
    judge = next(n for n in experiments.job(run)['needs'] if 'classifier' in n)
    parser = next(n for n in experiments.job(run)['needs'] if 'parser' in n)
    bad = home/f'data/runs/{judge}'
    bad.mkdir(parents=True)
    (bad/'state.safetensors').write_bytes(b'not a state')
    out = snake(home, ok=False)
    assert (home/f'data/results/{parser}.json').exists()
    assert not (home/f'data/results/{run}.json').exists()
    assert f'{judge} failed with' in out
    assert str(bad/f'{judge}.ipynb') in out
    kept = nbformat.read(bad/f'{judge}.ipynb', 4)
    assert any(o.output_type == 'error' for c in kept.cells if c.cell_type == 'code' for o in c.outputs)


def test_a_run_starts_from_committed_weights_where_no_run_is_here(home):
    "What ran here comes first, then weights of the repository; without either the path stays as it was"
    from facegen.study.weights import keep_weights
    def want(): return runner.from_weights(experiments.job('pixels-laptop-s0'))['params']
    assert want()['classifier'] == 'data/runs/classifier32-laptop-s0/judge'
    judge = home/'data/runs/classifier32-laptop-s0/judge'
    judge.mkdir(parents=True)
    (judge/'config.json').write_text('{}')
    save_result('classifier32-laptop-s0', dict(faces='toy', n_faces=64, trained_on=38), [RECORD])
    assert keep_weights('classifier32-laptop-s0') == home/'data/weights/classifier32-laptop-s0'
    assert want()['classifier'] == 'data/runs/classifier32-laptop-s0/judge'
    shutil.rmtree(home/'data/runs')
    assert want()['classifier'] == 'data/weights/classifier32-laptop-s0/judge'
    assert want()['parser'] == 'data/runs/parser32-laptop-s0/judge'
    with pytest.raises(FileNotFoundError, match='facegen launch parser32-laptop-s0'):
        keep_weights('parser32-laptop-s0')
    big = home/'data/runs/parser32-laptop-s0/judge'
    big.mkdir(parents=True)
    (big/'config.json').write_bytes(b'x'*3_100_000)
    save_result('parser32-laptop-s0', dict(faces='toy', n_faces=64, trained_on=38), [RECORD])
    with pytest.raises(ValueError, match='3.1 MB'):
        keep_weights('parser32-laptop-s0')


def test_committed_weights_are_small_and_load():
    "data/weights holds what `from_weights` may take: small networks that open (sizes: `weights.MOST`)"
    from facegen.evaluation.judges import load_classifier, load_parser
    from facegen.study.weights import MOST
    for folder in (REPO/'data'/'weights').iterdir():
        if folder.is_dir():
            most = MOST[bool(list(folder.glob('pipeline')))]
            assert sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) < most, folder
    c, name = load_classifier(str(REPO/'data/weights/classifier32-laptop-s0/judge'))
    assert name == 'classifier32-laptop-s0' and c.config.size == 32
    p, name = load_parser(str(REPO/'data/weights/parser32-laptop-s0/judge'))
    assert name == 'parser32-laptop-s0' and p.config.size == 32


def test_a_demonstration_writes_into_its_own_folder_and_goes_on(home):
    "Results in git stay as they are, one line a run is shown, and the second call has nothing to do"
    save_result('attrs-laptop-s0', dict(steps=3), [RECORD])
    committed = (home/'data/results/attrs-laptop-s0.json').read_bytes()

    def demo():
        command = [sys.executable, '-c', 'from facegen.study.commands import main; main()', 'demo', '--scale', 'smoke']
        p = subprocess.run([*command, '--jobs', '2'], capture_output=True, text=True, cwd=home)
        assert p.returncode == 0, p.stdout + p.stderr
        return p.stdout, p.stderr.splitlines()

    table, lines = demo()
    runs = experiments.run_names('smoke', 1, experiments.DEMO)
    ended = [line.split()[0] for line in lines if ' done in ' in line]
    assert set(ended) == with_needs(runs)  # there are no committed weights here
    assert len(lines) < 20 and 'rule' not in ' '.join(lines)
    assert {p.name for p in home.iterdir()} == {'data', 'demo'} and {p.name for p in (home/'data').iterdir()} <= {
        'faces', 'latents', 'results'}
    assert [p.read_bytes() for p in (home/'data/results').iterdir()] == [committed]
    assert {f'{n}.json' for n in ended} == {p.name for p in (home/'demo/data/results').glob('*.json')}
    assert [p.name for p in (home/'demo/figures').iterdir()] == ['_what-does-a-condition-bring-smoke.png']
    assert 'nothing to compare with' in table and f'facegen sample demo/data/runs/{runs[-1]}' in table
    made = {p: p.stat().st_mtime_ns for p in (home/'demo/data/results').iterdir()}
    assert demo()[1] == [] and made == {p: p.stat().st_mtime_ns for p in (home/'demo/data/results').iterdir()}


def test_a_folder_outside_of_the_study_is_refused(home, monkeypatch):
    monkeypatch.setenv('FACEGEN_OUT', 'demo')
    assert runner.figure_path('53_demo', 'demo') == home/'demo/figures/what-does-a-condition-bring-demo.png'
    monkeypatch.setenv('FACEGEN_OUT', '../elsewhere')
    with pytest.raises(ValueError, match='FACEGEN_OUT=.*lies outside of .*: name a folder inside'):
        runner.figure_path('53_demo', 'demo')


def test_a_lock_goes_only_when_nobody_can_hold_it(home):
    lock, note = home/'.snakemake/locks/0.output.lock', home/'.snakemake/batch-runs-on'
    assert not runner.unlock(home)
    lock.parent.mkdir(parents=True)
    lock.write_text('x')
    with pytest.raises(RuntimeError, match='perhaps from another machine.*snakemake --unlock'):
        runner.unlock(home)
    note.write_text('another machine')
    with pytest.raises(RuntimeError, match='another machine'):
        runner.unlock(home)
    note.write_text(platform.node())
    alive = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', 'snakemake'], cwd=home)
    try:
        until = time.time() + 20
        while alive.pid not in runner.snakemakes(home) and time.time() < until:
            time.sleep(.05)  # its words are seen a moment after it was started
        with pytest.raises(RuntimeError, match=f'at work in .* {alive.pid}.*: wait for it, or stop it'):
            runner.unlock(home)
    finally:
        alive.kill()
        alive.wait()
    assert lock.exists() and runner.unlock(home) and not lock.exists()


class Terminal(io.StringIO):
    def isatty(self): return True


def test_a_terminal_shows_one_line_a_run_in_place_and_a_file_few():
    "Escape sequences go up as many lines as were written; without a terminal there is a line every 30 s at most"
    screen, file = Terminal(), io.StringIO()
    for status in (runner.StatusLines(screen), runner.StatusLines(file)):
        for i in range(5):
            status.show({'a': f'{i} %', 'b': 'x'*500})
        status.say('a is done')
    assert screen.getvalue().count('\x1b[2F\x1b[J') == 5 and screen.getvalue().endswith('\x1b[Ja is done\n')
    assert max(map(len, screen.getvalue().replace('\x1b[2F\x1b[J', '').splitlines())) < 500
    assert file.getvalue() == 'a is done\n'
    often = runner.StatusLines(file, every=0)
    often.show({'a': '5 %', 'b': '6 %'})
    assert file.getvalue().endswith('a 5 %; b 6 %\n')


def test_of_announcements_that_begin_alike_the_first_is_repeated(home):
    path, file, said = home/'a-run.progress', io.StringIO(), set()
    status = runner.StatusLines(file, every=0)
    path.write_text('training: 0 %\r\x1b[A# preview after 1 step: p1\ntraining: 5 %, loss=0.2, 00:09 left\r')
    runner.show_files([path], status, said)
    with path.open('a') as f:
        f.write('# preview after 2 steps: p2\n# resumed\n\ntraining: 7 %\r')
    runner.show_files([path, home/'gone.progress'], status, said)
    assert [' '.join(line.split()) for line in file.getvalue().splitlines()] == [
        'a-run preview after 1 step: p1', 'a-run training: 5 %, loss=0.2, 00:09 left', 'a-run resumed',
        'a-run training: 7 %']


def test_samples_that_are_missing_are_made_in_the_order_of_the_table(home):
    from facegen.evaluation.samples import save_samples
    for run in ('spatial+guided-laptop-s0', 'attrs-laptop-s1', 'attrs-laptop-s0', 'classifier-laptop-s0'):
        save_result(run, {}, [RECORD])
    save_samples(torch.zeros(4, 3, 8, 8), 'attrs-laptop-s0')
    assert runner.without_samples('laptop') == ['attrs-laptop-s1', 'spatial+guided-laptop-s0']
    assert runner.without_samples('laptop', ['attrs']) == ['attrs-laptop-s1'] and runner.without_samples('gpu') == []
