"""Faces of one's own: a folder gets a name, what it lacks is filled in and marked, any experiment can be run on it."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.core import ATTRIBUTES, root
from facegen.data.face_sets import FaceSet, describe, find_set, keep_set, kept_sets, lacks
from facegen.data.faces import load_faces
from facegen.data.layouts import Reading, read_raw
from facegen.plotting import to_uint8
from facegen.study import commands, experiments, own_faces, runner
from facegen.study.experiments import find_experiment, job, run_name, run_names, variant_name
from facegen.synthetic.toyfaces import render_faces

torch.set_num_threads(1)
WEIGHTS = root()/'data'/'weights'


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A root of its own, with the committed weights and results of judges"
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    (tmp_path/'data/results').mkdir(parents=True)
    (tmp_path/'data/weights').symlink_to(WEIGHTS)
    for run in ('classifier-laptop-s0', 'parser-laptop-s0'):
        (tmp_path/f'data/results/{run}.json').symlink_to(WEIGHTS.parent/f'results/{run}.json')
    return tmp_path


def folder_of(kind, folder, n=60, size=64):
    "A folder of drawn faces in some layout, and the faces"
    face = render_faces(n=n, size=size, seed=5)
    images = folder/{'celeba': 'img_align_celeba', 'bare': '.', 'synthetics': '.'}.get(kind, 'images')
    images.mkdir(parents=True)
    for i in range(n):
        name = f'{i:06d}'
        Image.fromarray(to_uint8(face.image[i])).save(images/f"{name}.{'png' if kind == 'synthetics' else 'jpg'}")
        mask = face.mask[i].numpy().astype(np.uint8)
        if kind == 'masks':
            (folder/'masks').mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder/'masks'/f'{name}.png')
        if kind == 'synthetics':
            Image.fromarray(mask).save(images/f'{name}_seg.png')
    rows = face.attrs.int().tolist()
    if kind == 'attributes':
        lines = [','.join(map(str, [f'{i:06d}.jpg', *row])) for i, row in enumerate(rows)]
        (folder/'attributes.csv').write_text('\n'.join([','.join(['file', *ATTRIBUTES]), *lines]))
    if kind == 'celeba':
        lines = [' '.join([f'{i:06d}.jpg', *(str(2*v - 1) for v in row)]) for i, row in enumerate(rows)]
        (folder/'list_attr_celeba.txt').write_text('\n'.join([str(n), ' '.join(ATTRIBUTES), *lines]))
    return face


# Names

def test_the_name_of_a_variant_says_all_of_it():
    name = variant_name('spatial', 'mine', [('lr', '1e-4'), ('steps', '7')])
    assert name == 'spatial@mine,lr=1e-4,steps=7'
    e, scale, seed = experiments.parse_name(f'{name}-gpu-s3')
    assert (e.name, e.base, scale, seed) == (name, 'spatial', 'gpu', 3)
    p, plain = job(f'{name}-gpu-s3')['params'], job('spatial-gpu-s3')['params']
    assert p['lr'] == 1e-4 and p['steps'] == 7 and p['faces'] == 'mine'
    changed = {k for k in p if p[k] != plain.get(k)} - set(find_experiment('spatial').needs)
    assert changed == {'lr', 'steps', 'faces', 'run'}, 'and nothing else differs'
    assert experiments.fingerprint(f'{name}-gpu-s3') != experiments.fingerprint('spatial@mine,lr=1e-4-gpu-s3')


def test_what_a_variant_needs_is_made_of_its_faces():
    needs = job('spatial+guided@mine-laptop-s1')['needs']
    assert needs == [f'{k}@mine-laptop-s{s}' for k, s in (
        ('classifier', 0), ('parser', 0), ('autoencoder', 0), ('classifier32', 0), ('spatial+dropout', 1))]
    assert find_experiment('lora@mine').needs == dict(
        classifier=('classifier@mine', 'judge'), feature_network=('classifier@mine', 'judge'),
        base=('stable', 'pipeline'))
    assert job('spatial,lr=1e-4-laptop-s0')['needs'] == job('spatial-laptop-s0')['needs']


def test_what_it_needs_may_be_taken_by_name():
    this = job('spatial@mine,parser=parser-laptop-s0-laptop-s0')
    assert this['params']['parser'] == 'data/runs/parser-laptop-s0/judge'
    assert 'parser@mine-laptop-s0' not in this['needs']
    assert runner.from_weights(this)['params']['parser'] == 'data/weights/parser-laptop-s0/judge'


def test_a_set_may_name_its_judges_and_none_judges_its_own_labels(home, capsys):
    folder_of('bare', home/'own', 3)
    commands.main(['inspect', str(home/'own'), '--judge-classifier', 'classifier32-laptop-s0'])
    assert "missing     attributes: filled in by classifier-laptop-s0" in capsys.readouterr().out
    this = job('spatial@own-laptop-s0')
    assert this['params']['classifier'] == 'data/runs/classifier32-laptop-s0/judge'
    assert {n for n in this['needs'] if 'classifier' in n} == {'classifier32@own-laptop-s0'}
    assert 'classifier@own-laptop-s0' not in run_names('laptop', faces='own')
    by_hand = job('spatial@own,classifier=classifier@own-gpu-s0-laptop-s0')['params']['classifier']
    assert by_hand == 'data/runs/classifier@own-gpu-s0/judge', 'what the command names comes first'
    own = '--judge-parser', 'parser-laptop-s0', '--parser', 'parser-laptop-s0'
    with pytest.raises(SystemExit, match='parser-laptop-s0 would judge its own labels: name another --parser'):
        commands.main(['inspect', str(home/'own'), *own])


@pytest.mark.parametrize('name, message', [
    ('spatail@mine', "there is no experiment 'spatail@mine' (did you mean 'spatial'?)"),
    ('spatial,lrr=1', "34_conditional has no argument 'lrr' (did you mean 'lr'?)"),
    ('spatial,seed=1', "34_conditional has no argument 'seed'"),
    ('spatial,steps=many', 'steps=many is no int: 34_conditional has 20'),
    ('unet,flip=maybe', 'flip=maybe is no bool'),
    ('parser-pairs128@mine', 'parser-pairs128 has faces of its own'),
    ('costs@mine', 'costs has faces of its own'),
    ('spatial@a/b', "there is no experiment 'spatial@a/b'")])
def test_a_wrong_variant_is_refused_in_one_sentence(name, message):
    with pytest.raises(ValueError) as e:
        find_experiment(name)
    assert message in str(e.value) and len(str(e.value).splitlines()) == 1


def test_a_study_on_other_faces_has_the_whole_chain():
    runs = run_names('gpu', 2, faces='mine')
    assert {run_name(variant_name(e, 'mine'), 'gpu', s) for e in experiments.CHAIN for s in (0, 1)} <= set(runs)
    assert all('@mine' in run for run in runs) and 'parser@mine-gpu-s1' not in runs


# Sets

def test_a_name_belongs_to_one_folder(home):
    folder_of('bare', home/'a', 3), folder_of('bare', home/'b', 3)
    keep_set(FaceSet('mine', str(home/'a'), Reading(zero='absent')))
    assert find_set('mine').reading.zero == 'absent' and find_set(str(home/'b')).name == 'b'
    with pytest.raises(ValueError, match="'mine' is .*/a already: say another --name"):
        keep_set(FaceSet('mine', str(home/'b')))
    for name in ('toy', 'my faces', '../x', ''):
        with pytest.raises(ValueError, match='--name'):
            keep_set(FaceSet(name, str(home/'b')))
    (home/'data/faces/sets.json').write_text('[{"name": 1')
    with pytest.raises(ValueError, match='sets.json is damaged'):
        kept_sets()


@pytest.mark.parametrize('kind, missing', [
    ('bare', (True, True)), ('masks', (True, False)), ('attributes', (False, True)), ('celeba', (False, True)),
    ('synthetics', (True, False))])
def test_what_a_folder_lacks_is_filled_in_and_marked(home, kind, missing, capsys):
    "And what it has stays"
    face = folder_of(kind, home/'own')
    assert lacks(read_raw(home/'own')) == missing
    options = ['--classes', 'celebamask'] if kind == 'synthetics' else []
    commands.main(['inspect', str(home/'own'), '--name', 'mine', *options])
    said = capsys.readouterr().out
    for what, run, gone in zip(('attributes', 'masks'), ('classifier-laptop-s0', 'parser-laptop-s0'), missing):
        assert (f'missing     {what}: filled in by {run} (held-out ' in said) == gone
    assert (home/'data/faces/mine-sheet.png').stat().st_size > 10_000 and '--faces mine' in said
    counts = own_faces.ready_set('mine', 'smoke').counts
    assert counts == dict(train=36, small=4, judge=15, test=9)
    faces = load_faces(runner.pack('mine', 0, 64))
    assert not faces.attrs.isnan().any() and (faces[:].mask >= 0).all()
    labels = faces.meta.get('labels', {})
    assert set(labels) == {k for k, gone in zip(('attributes', 'masks'), missing) if gone}
    agree = float((faces.attrs == face.attrs).float().mean())
    assert agree == 1 if not missing[0] else .85 < agree < 1
    overlap = float((faces[:].mask == face.mask).float().mean())
    assert overlap == 1 if not missing[1] else .9 < overlap < 1


def test_what_shall_not_be_filled_in_stays_unknown(home, capsys):
    folder_of('bare', home/'own', 60)
    commands.main(['inspect', str(home/'own'), '--parser', 'none', '--classifier', 'none'])
    said = capsys.readouterr().out
    assert said.count('left out, so conditions and measures that need them say nothing') == 2
    faces = load_faces(runner.pack('own', 0, 32))
    assert faces.attrs.isnan().all() and (faces[:].mask == -1).all()
    with pytest.raises(SystemExit, match='there is no judge at .*: name a run that trained one'):
        commands.main(['inspect', str(home/'own'), '--parser', 'parser-nowhere-s0'])


def test_options_are_written_as_people_write_them(capsys):
    for wrong in ('--help', '--nonsense'):
        with pytest.raises(SystemExit):
            commands.main(['inspect', 'x', wrong])
        said = capsys.readouterr()
        assert '--skip-bad' in said.out + said.err and 'skip_bad' not in said.out + said.err
    for option in ('--skip-bad', '--skip_bad'):
        assert commands.read_arguments('inspect', ['x', option])['skip_bad'] is True


def test_problems_are_listed_before_anything_is_kept(home, capsys):
    folder_of('attributes', home/'own', 8)
    (home/'own/attributes.csv').write_text('file,Smilling\n000000.jpg,1\n')
    with pytest.raises(SystemExit, match=r'mend these, or leave such faces out with --skip-bad \(8 in all\)'):
        commands.main(['inspect', str(home/'own')])
    said = capsys.readouterr().out
    assert "problem     attributes.csv: unknown attribute name 'Smilling' (did you mean 'Smiling'?)" in said
    assert 'and 3 more problems' in said and kept_sets() == {}
    assert any('people      unknown' in line for line in describe(read_raw(home/'own')))


def test_numbers_that_a_set_has_not_are_lowered_openly(home):
    folder_of('bare', home/'own')
    own_faces.ready_set(str(home/'own'), 'smoke')
    asked = {name: job(f'{name}@own-laptop-s0')['params'] for name in ('classifier', 'spatial', 'lora', 'blind')}
    assert asked['classifier']['n_test'] == asked['spatial']['samples'] == asked['blind']['samples'] == 9
    assert asked['lora']['samples'] == 4 and asked['lora']['n_train'] == 36
    assert job('spatial-laptop-s0')['params']['samples'] == 256, 'of drawn faces there are enough'
    entry, = json.loads((home/'data/faces/sets.json').read_text())
    assert entry['counts']['test'] == 9
