"""A study on faces of one's own, from a folder to a figure; what is known before it trains is said before."""
import json
import shutil

import pytest
import torch
from test_own_faces import folder_of, home  # noqa: F401

from facegen.core import load_result, save_result
from facegen.data.face_sets import FaceSet, find_set, keep_set
from facegen.study import commands, own_faces, runner
from facegen.study.experiments import job, parse_name, run_names

torch.set_num_threads(1)


def said_by(capsys, *words):
    "Run a command; what it printed, and what it said"
    commands.main(list(words))
    return capsys.readouterr()


# From a folder to a figure

@pytest.mark.parametrize('kind, options', [
    ('bare', []), ('masks', []), ('attributes', []), ('celeba', []), ('synthetics', ['--classes', 'celebamask']),
    ('bare', ['--parser', 'none', '--classifier', 'none'])], ids=lambda x: ' '.join(x) if isinstance(x, list) else x)
def test_a_study_on_a_folder_runs_to_its_figure(home, kind, options, capsys):  # noqa: F811
    "Every experiment that these faces allow leaves a result, and what they do not allow is said in a line"
    folder_of(kind, home/'own')
    commands.main(['inspect', str(home/'own'), '--name', 'mine', *options])
    capsys.readouterr()
    said = said_by(capsys, 'study', 'smoke', '--faces', 'mine')
    unknown = find_set('mine').unknown
    assert unknown == (('attributes', 'masks') if 'none' in options else ())
    runs, lines = own_faces.runs_on(find_set('mine'), 'smoke', 1)
    assert f'{len(runs)} runs on mine at scale smoke' in said.out and all(line in said.out for line in lines)
    assert (len(runs), len(lines)) == ((4, 2) if unknown else (24, 0))
    results = {run: load_result(run) for run in runs}
    assert all(r['metrics'] and r['params'].get('faces') == 'mine' for r in results.values())
    found = {m['metric'] for r in results.values() for m in r['metrics']}
    assert ('balanced_accuracy' in found) == ('attributes' not in unknown)
    assert ('miou' in found) == ('masks' not in unknown)
    assert 'figure: ' in said.out and (home/'figures/_what-does-mine-say-smoke.png').stat().st_size > 10_000
    assert 'kid' in (home/'figures/_what-does-mine-say-smoke.md').read_text().lower()


def test_every_experiment_runs_on_celebamask_hq(home, real_faces, capsys):  # noqa: F811
    "The official layout, as it stands; what a photo lacks is left out by its own argument"
    commands.main(['inspect', str(real_faces/'CelebAMask-HQ'), '--skip-bad'])
    said = capsys.readouterr().out
    assert 'layout      official' in said and "'CelebAMask-HQ' is its name from now on" in said
    said = said_by(capsys, 'study', 'smoke', '--faces', 'CelebAMask-HQ').out
    runs = run_names('smoke', 1, faces='CelebAMask-HQ')
    assert all(load_result(run)['metrics'] for run in runs) and f'{len(runs)} runs on CelebAMask-HQ' in said
    for run in runs:
        assert run in said, 'all rows are named in the table'


# Before the first step

@pytest.fixture
def mine(home):  # noqa: F811
    "A set that is known without a picture being opened"
    (home/'own').mkdir()
    found = FaceSet('mine', str(home/'own'), counts=dict(train=36, small=4, judge=15, test=9))
    keep_set(found)
    return found


def problems(*runs): return own_faces.batch_problems(own_faces.with_needs(list(runs)))


def keep_unknown(found, *unknown):
    keep_set(FaceSet(found.name, found.folder, counts=found.counts, unknown=unknown))


def test_a_whole_study_has_no_problem(mine):
    assert problems(*run_names('smoke', 1, faces='mine')) == []


def test_enough_faces_for_what_is_asked(mine):
    assert problems('spatial@mine,samples=10-laptop-s0') == [
        'spatial@mine,samples=10-laptop-s0: samples=10 asks for 10 faces, and the test split of mine has 9']
    assert problems('lora@mine,n_train=37-laptop-s0')[0].endswith(
        'n_train=37 asks for 37 faces, and the train split of mine has 36')


@pytest.mark.parametrize('run, label, network', [
    ('attrs@mine-laptop-s0', 'attributes', 'classifier'), ('mask-only@mine-laptop-s0', 'masks', 'parser'),
    ('parser@mine-laptop-s0', 'masks', 'parser'), ('lora@mine-laptop-s0', 'attributes', 'classifier')])
def test_labels_that_nobody_knows(mine, run, label, network):
    keep_unknown(mine, label)
    assert problems(run) == [
        f'{run} needs {label}, and no face of mine has any: name a {network} with `facegen inspect`']
    assert problems('uncond@mine-laptop-s0') == [], 'an unconditional run asks for none'


def test_no_attribute_to_flip_is_no_reason_to_fail(mine):
    "Faces that know none of the attributes are left out of that test: see test_counterfactuals"
    keep_unknown(mine, 'attributes')
    this = job('mask-only@mine-laptop-s0')
    assert 'classifier@mine-laptop-s0' not in this['needs'] and problems('mask-only@mine-laptop-s0') == []


def test_a_judge_that_is_not_there(mine):
    run = 'spatial@mine,parser=nowhere-laptop-s0-laptop-s0'
    judge = 'data/runs/nowhere-laptop-s0/judge'
    assert problems(run) == [f'{run}: there is no {judge}: launch nowhere-laptop-s0 first, or name another parser']


def test_a_picture_that_does_not_fit_its_network(mine):
    found = problems('spatial@mine,size=90-laptop-s0')
    assert len(found) == 1 and 'size' in found[0] and 'must be divisible by' in found[0]


def test_a_disk_that_is_too_small(mine, monkeypatch):
    usage = shutil.disk_usage('/')._replace(free=10_000_000)
    monkeypatch.setattr(own_faces.shutil, 'disk_usage', lambda path: usage)
    found, = problems('spatial@mine-laptop-s0')
    assert 'has 0.0 GB left, and these 5 runs write about 0.' in found and 'make room' in found
    small = own_faces.disk_needed({'spatial@mine-laptop-s0': 10})
    assert own_faces.disk_needed({'spatial@mine-laptop-s0': 1_000_010}) - small > 16_000_000


def test_an_outside_network_that_is_not_installed(mine, monkeypatch):
    def missing(): raise ModuleNotFoundError('the ImageNet network is not installed')
    monkeypatch.setitem(__import__('facegen.evaluation.outside_networks').evaluation.outside_networks.OUTSIDE,
                        'efficientnet-lite0', missing)
    assert all('the ImageNet network is not installed' in p for p in problems('spatial@mine-laptop-s0'))


def test_all_problems_are_said_at_once(mine, monkeypatch):
    runs = 'spatial@mine,samples=10-laptop-s0', 'spatial@mine,size=90-laptop-s0'
    with pytest.raises(ValueError) as e:
        own_faces.check_batch(list(runs))
    assert str(e.value).startswith('2 problems:\n') and all(run in str(e.value) for run in runs)
    monkeypatch.setattr(runner, 'run_batch', lambda *a: pytest.fail('nothing may be trained'))
    monkeypatch.setattr(own_faces, 'ready_set', lambda faces, scale: find_set(faces))
    for words in (['launch', 'spatial', '--faces', 'mine', '-p', 'samples', '10'], ['launch', runs[1].split('@')[0],
                  '--faces', 'mine', '-p', 'size', '90']):
        with pytest.raises(SystemExit, match='^facegen: '):
            commands.main(words)


def test_one_run_says_which_judges_it_lacks_before_it_trains(home, monkeypatch):  # noqa: F811
    "As it is called by name, outside of a batch"
    monkeypatch.setattr(runner, 'execute', lambda *a: pytest.fail('nothing may be trained'))
    with pytest.raises(SystemExit) as e:
        commands.main(['launch', 'lora-laptop-s0'])
    for run in ('classifier-mixed-laptop-s0', 'stable-laptop-s0'):
        assert f'there is no data/runs/{run}/' in str(e.value) and f'launch {run} first' in str(e.value)


def test_a_set_is_too_small_before_it_trains(home):  # noqa: F811
    folder_of('bare', home/'own', 20)
    with pytest.raises(ValueError, match='own is too small: its splits have 12 for train.*at least 8 for test'):
        own_faces.ready_set(str(home/'own'), 'smoke')


def test_kept_results_of_a_set_are_found(home):  # noqa: F811
    for run in ('spatial@mine-laptop-s0', 'attrs@other.set-laptop-s1', 'classifier@third-laptop-s0'):
        save_result(run, {}, [])
    assert runner.sets_with_results('laptop') == ['other.set', 'mine'] and runner.sets_with_results('gpu') == []
    assert parse_name('attrs@other.set-laptop-s1')[0].base == 'attrs'
    assert json.loads((home/'data/results/spatial@mine-laptop-s0.json').read_text())['run'] == 'spatial@mine-laptop-s0'
