"""The table of rows fits its notebooks, and a batch skips, resumes, fails and recovers as it should."""
import json, os, shutil, subprocess, sys, time
from pathlib import Path
import nbformat, papermill, pytest
from facegen import rows, study
from facegen.core import load_result, save_result

REPO = Path(__file__).resolve().parents[1]
RECORD = dict(metric='frechet', value=1., n=64, low=.9, high=1.2, floor=.1, ceiling=None, headline=True, network='x')


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path)); monkeypatch.delenv('FACEGEN_FACES', raising=False); return tmp_path.resolve()


@pytest.mark.parametrize('scale', rows.SCALES)
@pytest.mark.parametrize('row', rows.RUNS)
def test_every_row_fits_its_notebook(row, scale):
    "Each argument of each row at each scale is declared by the notebook, with a value of the declared type"
    job = rows.job(rows.run_name(row, scale, 1)); known = papermill.inspect_notebook(str(rows.notebook_path(job['notebook'])))
    assert rows.unknown_params(job['notebook'], job['params']) == []
    for k, v in job['params'].items(): assert type(v).__name__ == known[k]['inferred_type_name'], (k, v)


@pytest.mark.parametrize('notebook', sorted({r.notebook for r in rows.RUNS.values()}))
def test_a_parameters_cell_is_its_own_help(notebook):
    "Every parameter has a type, a default of that type and a comment"
    for name, p in papermill.inspect_notebook(str(rows.notebook_path(notebook))).items():
        assert p['inferred_type_name'] != 'None' and p['help'], name
        assert type(rows.default_params(notebook)[name]).__name__ == p['inferred_type_name'], name


def test_names_go_there_and_back():
    for row in rows.RUNS:
        for scale in rows.SCALES: assert rows.parse_name(rows.run_name(row, scale, 3)) == (rows.RUNS[row], scale, 3)
    for bad in ('unet', 'unet-laptop', 'unet-desktop-s0', 'vnet-laptop-s0', '_unet-laptop-s0', 'unet-laptop-s01'):
        with pytest.raises(ValueError, match='names no run'): rows.parse_name(bad)


def test_judges_are_shared_by_all_seeds():
    assert rows.job('unet-laptop-s2')['needs'] == ['classifier32-laptop-s0']
    assert rows.names('laptop', 3, ['classifier', 'parser', 'unet']) == ['classifier-laptop-s0', 'parser-laptop-s0', 'unet-laptop-s0', 'unet-laptop-s1', 'unet-laptop-s2']


def test_rows_without_faces_are_left_out_and_named(home, capsys, monkeypatch):
    study.main(['plan', 'laptop', '1'])
    out = capsys.readouterr().out
    drawn = [r for r in rows.RUNS.values() if r.params.get('faces', 'toy').startswith('toy') and 'laptop' in r.scales]
    assert f'{len(drawn)} of {len(drawn)} runs' in out and 'left out' in out and 'unet-celeba64' in out
    study.main(['plan', 'laptop', '12', 'unet']); assert '12 of 12 runs' in capsys.readouterr().out
    (home/'celeba64').mkdir(); monkeypatch.setenv('FACEGEN_FACES', str(home))
    assert 'unet-celeba64-laptop-s0' in rows.names('laptop')
    with pytest.raises(FileNotFoundError, match='FACEGEN_FACES'): rows.find_faces('celeba65')


def test_a_stopped_command_says_how_to_go_on(monkeypatch):
    def stopped(*_): raise KeyboardInterrupt
    monkeypatch.setattr(study, 'launch', stopped)
    with pytest.raises(SystemExit, match='launch was stopped; the same command goes on'): study.main(['launch', 'unet-laptop-s0'])


def test_an_argument_that_no_notebook_knows_is_an_error(home):
    with pytest.raises(ValueError, match='30_run_judges has no parameter stepz'): study.execute('30_run_judges', home/'x.ipynb', dict(stepz=1), 'x')


def test_fingerprint_follows_arguments_and_code_but_not_prose(home, monkeypatch):
    a = rows.fingerprint('unet-laptop-s0')
    assert a != rows.fingerprint('unet-laptop-s1')
    nb = nbformat.read(rows.notebook_path('32_run_unconditional'), 4); monkeypatch.setattr(rows, 'notebook_path', lambda _: home/'n.ipynb')
    nb.cells[0].source += ' More prose.'; nbformat.write(nb, home/'n.ipynb'); assert rows.fingerprint('unet-laptop-s0') == a
    nb.cells[-1].source += '\n1 + 1'; nbformat.write(nb, home/'n.ipynb'); assert rows.fingerprint('unet-laptop-s0') != a


def test_results_and_table(home):
    save_result('unet-laptop-s0', dict(steps=3), [RECORD, RECORD | dict(headline=False)], 5); save_result('stray', {}, [RECORD])
    save_result('_unet-smoke-s0', {}, [RECORD])
    assert len(study.results()) == 3 and len(study.results('laptop')) == 2 and len(study.table('laptop')) == 1
    with pytest.raises(ValueError, match='no results at scale gpu'): study.table('gpu')


def snake(home, *more, ok=True):
    "Run the Snakefile at smoke in `home`"
    p = subprocess.run(['snakemake', '--snakefile', str(REPO/'Snakefile'), '--directory', str(home), '--cores', '2', '--keep-going', '--rerun-incomplete',
                        '--config', 'scale=smoke', 'seeds=2', 'demo=1', '--', *(more or ['demo'])],
                       capture_output=True, text=True, env={**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'MPLBACKEND': 'agg'})
    assert (p.returncode == 0) == ok, p.stdout + p.stderr
    return p.stdout + p.stderr


def test_a_batch_runs_skips_and_reruns_only_what_changed(home):
    "Everything runs once, judges first since no weights lie here; then nothing; then only the row whose result is gone"
    snake(home)
    made = {p.name: p.stat().st_mtime_ns for p in (home/'data/results').glob('*.json')}
    assert set(made) == {f'{n}.json' for n in [*rows.names('smoke', 2, rows.DEMO), *rows.names('smoke', 1, ['classifier32', 'parser32'])]}
    assert {p.name for p in (home/'figures').glob('*.png')} == {f"{study.figure_name(rows.FIGURES[f], 'smoke')}.png" for f in study.drawable('smoke', rows.DEMO)}
    assert 'Nothing to be done' in snake(home)
    a, b = (load_result(home/f'data/results/_attrs-smoke-s{s}.json') for s in (0, 1))
    assert a['params']['seed'] == 0 and b['params']['seed'] == 1 and a['metrics'] != b['metrics']
    before = a['metrics']; (home/'data/results/_attrs-smoke-s0.json').unlink(); snake(home)
    now = {p.name: p.stat().st_mtime_ns for p in (home/'data/results').glob('*.json')}
    assert {n for n in made if now[n] != made[n]} == {'_attrs-smoke-s0.json'}
    assert load_result(home/'data/results/_attrs-smoke-s0.json')['metrics'] == before  # the same numbers, to the last bit


def test_a_failing_row_stops_its_branch_only_and_keeps_its_notebook(home):
    "A judge whose folder holds a foreign state fails; the parser, another branch, is still made"
    bad = home/'data/runs/_classifier32-smoke-s0'; bad.mkdir(parents=True); (bad/'state.safetensors').write_bytes(b'not a state')
    out = snake(home, ok=False)
    assert (home/'data/results/_parser32-smoke-s0.json').exists() and not (home/'data/results/_attrs-smoke-s0.json').exists()
    assert '_classifier32-smoke-s0 failed with' in out and str(bad/'_classifier32-smoke-s0.ipynb') in out
    kept = nbformat.read(bad/'_classifier32-smoke-s0.ipynb', 4)
    assert any(o.output_type == 'error' for c in kept.cells if c.cell_type == 'code' for o in c.outputs)


def test_a_row_starts_from_committed_weights_where_no_run_is_here(home):
    "What ran here comes first; weights of the repository serve where nothing did; neither means that the path stays as it was"
    want = lambda: study.from_weights(rows.job('attrs-laptop-s0'))['params']
    assert want()['classifier'] == 'data/runs/classifier32-laptop-s0/judge'
    judge = home/'data/runs/classifier32-laptop-s0/judge'; judge.mkdir(parents=True); (judge/'config.json').write_text('{}')
    assert study.keep('classifier32-laptop-s0') == home/'data/weights/classifier32-laptop-s0'
    assert want()['classifier'] == 'data/runs/classifier32-laptop-s0/judge'
    shutil.rmtree(home/'data/runs')
    assert want()['classifier'] == 'data/weights/classifier32-laptop-s0/judge' and want()['parser'] == 'data/runs/parser32-laptop-s0/judge'
    with pytest.raises(FileNotFoundError, match='facegen launch parser32-laptop-s0'): study.keep('parser32-laptop-s0')
    big = home/'data/runs/parser32-laptop-s0/judge'; big.mkdir(parents=True); (big/'config.json').write_bytes(b'x'*3_100_000)
    with pytest.raises(ValueError, match='3.1 MB'): study.keep('parser32-laptop-s0')


def test_committed_weights_are_small_and_load():
    "data/weights holds what `from_weights` may take: at most 3 MB each, and a network that opens"
    from facegen.judges import load_classifier, load_parser
    for folder in (REPO/'data'/'weights').iterdir():
        if folder.is_dir(): assert sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) < 3e6, folder
    c, name = load_classifier(str(REPO/'data/weights/classifier32-laptop-s0/judge')); assert name == 'classifier32-laptop-s0' and c.config.size == 32
    p, name = load_parser(str(REPO/'data/weights/parser32-laptop-s0/judge')); assert name == 'parser32-laptop-s0' and p.config.size == 32
