"""Networks from outside compute what their packages compute, and one that is not here is never replaced."""
import base64, io, json, tarfile, zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from facegen.core import checksum, generator, root
from facegen.data.faces import resize
from facegen.evaluation import outside_networks as outside
from facegen.evaluation.distances import features
from facegen.evaluation.outside_networks import FaceRecognition
from facegen.study import commands
from facegen.synthetic.toyfaces import render_faces

torch.set_num_threads(1)
THEIRS = json.loads((Path(__file__).parent/'outside_networks.json').read_text())
KEPT = root()/'data'/'eyes'/'face-recognition.safetensors'


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    return tmp_path.resolve()


def drawn_faces():
    "Three drawn faces as the package was given them, (3,3,150,150)"
    px = np.frombuffer(zlib.decompress(base64.b64decode(THEIRS['faces'])), np.uint8).reshape(3, 50, 50, 3)
    return torch.from_numpy(px.repeat(3, 1).repeat(3, 2)).movedim(-1, 1)/127.5 - 1


def made_up_shapes():
    "Name -> shape of each tensor, as the package lays it out"
    found = {}
    for name, p in FaceRecognition().named_parameters():
        layer, kind = name.rsplit('.', 1)
        layer = 'conv32_down' if layer == 'stem' else layer.removeprefix('blocks.').replace('.', '/')
        if layer == 'head':
            found['fc'] = 256, 128
        elif kind == 'weight':
            cout, cin, h, w = p.shape
            found[f'{layer}/conv/filters'] = h, w, cin, cout
        else:
            found |= {f'{layer}/{k}': tuple(p.shape) for k in ('conv/bias', 'scale/weights', 'scale/biases')}
    return found


def made_up_bytes(first, n):
    i = np.arange(first, first + n, dtype=np.uint64)
    mixed = i*np.uint64(2654435761) + (i*i % np.uint64(65521))*np.uint64(40503)
    return ((mixed >> np.uint64(9)) & np.uint64(255)).astype(np.uint8)


def made_up_package():
    "Manifest and weights in the package's format, by a formula; one tensor is not quantized, as some of the package"
    manifest, parts, first = [], [], 0
    for name, shape in made_up_shapes().items():
        n = int(np.prod(shape))
        b, first = made_up_bytes(first, n), first + n
        wide = 2.4/np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else .5
        middle = float(name.endswith('scale/weights'))
        manifest.append(dict(name=name, shape=list(shape), dtype='float32'))
        if name == 'conv64_2/conv1/conv/filters':
            parts.append(((b.astype(np.float32) - 127)/127*wide).astype('<f4').tobytes())
        else:
            manifest[-1] |= dict(quantization=dict(dtype='uint8', scale=wide/127.5, min=middle - wide))
            parts.append(b.tobytes())
    return manifest, b''.join(parts)


def made_up_state(): return outside.fold_scales(outside.read_quantized(*made_up_package()))


def archive(**files):
    "A tarball as npm packs it"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f'package/model/face_recognition_model{name}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def made_up_archive(monkeypatch):
    "The made-up package, with its hashes in place of the true ones"
    manifest, data = made_up_package()
    made = archive(**{'-weights_manifest.json': json.dumps([dict(weights=manifest)]).encode(), '.bin': data})
    monkeypatch.setattr(outside, 'FACE_API_SHA256', outside.hashlib.sha256(made).hexdigest())
    monkeypatch.setattr(outside, 'FACE_WEIGHTS', checksum(made_up_state()))
    return made


def describe(net, x):
    with torch.no_grad(): return net.describe(x)


# The same numbers as the package

def test_descriptors_of_made_up_weights_are_those_of_the_package():
    "The architecture, wherever the true weights are not at hand"
    net, theirs = FaceRecognition().eval(), torch.tensor(THEIRS['made_up'])
    net.load_state_dict(made_up_state())
    error = (describe(net, drawn_faces()) - theirs).abs().max()
    assert error < 2e-5*theirs.abs().max() and error < .002*theirs.std(0).mean()


@pytest.mark.skipif(not KEPT.exists(), reason='`facegen eyes` has not been run here')
def test_descriptors_are_those_of_the_package():
    ours, theirs = describe(outside.face_recognition(), drawn_faces()), torch.tensor(THEIRS['package'])
    assert (ours - theirs).abs().max() < 2e-5 and theirs.std(0).mean() > .03


def test_weights_in_8_bits_are_read_to_the_last_byte():
    g = generator('8 bits')
    x = torch.randn(5, 4, generator=g)
    low, step = x.min().item(), (x.max() - x.min()).item()/255
    b = ((x - low)/step).round().to(torch.uint8)
    manifest = [dict(name='x', shape=[5, 4], dtype='float32', quantization=dict(dtype='uint8', scale=step, min=low)),
                dict(name='y', shape=[20], dtype='float32')]
    data = b.numpy().tobytes() + x.numpy().astype('<f4').tobytes()
    found = outside.read_quantized(manifest, data)
    assert (found['x'] - x).abs().max() <= step/2 + 1e-6 and torch.equal(found['y'], x.flatten())
    with pytest.raises(ValueError, match='the weights end before y'):
        outside.read_quantized(manifest, data[:-1])
    with pytest.raises(ValueError, match='3 bytes of weights belong to no name'):
        outside.read_quantized(manifest, data + b'abc')


# What it sees

def test_the_window_is_the_same_at_every_size():
    net, face = FaceRecognition(), render_faces(n=1, size=128, seed=3).image
    window = net.crop(face)
    assert window.shape == (1, 3, 150, 150)
    assert (net.crop(resize(face, 64)) - window).abs().mean() < .05
    above, below = face.clone(), face.clone()
    above[:, :, :128*61//220 - 3] = 1.
    below[:, :, 128*211//220 + 3:] = 1.
    assert all(torch.allclose(net.crop(x), window, atol=.02) for x in (above, below)), 'it sees more than its window'
    centre = face.clone()
    centre[:, :, 70:80, 60:70] = 1.
    assert (net.crop(centre) - window).abs().max() > .3


@pytest.mark.skipif(not KEPT.exists(), reason='`facegen eyes` has not been run here')
def test_a_face_is_nearer_to_itself_than_to_others():
    "Whether it is moved by a pixel, lit otherwise or shrunk"
    net, _ = outside.load_feature_network('face-recognition')
    faces = render_faces(n=24, seed=5).image
    with torch.no_grad():
        d = net(faces)
        for changed in (faces.roll(1, 3), .9*faces, resize(resize(faces, 40), 64)):
            far = torch.cdist(net(changed), d)
            assert (far.argmin(1) == torch.arange(24)).float().mean() > .9


# By name, and never another

def test_by_name_beside_the_others(home, made_up_archive):
    (home/'package.tgz').write_bytes(made_up_archive)
    assert outside.fetch_face_recognition(str(home/'package.tgz')) == outside.face_weights()
    found = outside.feature_networks(face='face-recognition', outside='')
    assert list(found) == ['face'] and found['face'][1] == 'face-recognition'
    net = found['face'][0]
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert features(drawn_faces(), net).shape == (3, 128)
    assert [p.name for p in (home/'data'/'eyes').iterdir()] == ['face-recognition.safetensors']


def test_without_its_file_one_sentence_names_the_command(home):
    with pytest.raises(FileNotFoundError, match='network is not at .*data/eyes/.*: run `facegen eyes`'):
        outside.load_feature_network('face-recognition')


@pytest.mark.parametrize('damage', ['cut', 'other weights', 'no tensors'])
def test_a_damaged_file_is_refused(home, made_up_archive, damage):
    (home/'package.tgz').write_bytes(made_up_archive)
    path = outside.fetch_face_recognition(str(home/'package.tgz'))
    outside.face_recognition()
    if damage == 'cut':
        path.write_bytes(path.read_bytes()[:-9])
    else:
        state = FaceRecognition().state_dict() if damage == 'other weights' else {}
        path.write_bytes(outside.save(state))
    with pytest.raises(ValueError, match='is damaged, or another network: run `facegen eyes` again'):
        outside.load_feature_network('face-recognition')


def test_another_archive_is_refused_and_nothing_is_written(home, made_up_archive):
    (home/'other.tgz').write_bytes(made_up_archive + b'more')
    with pytest.raises(ValueError, match='what came is not @vladmandic/face-api@1.7.15: its sha256 is'):
        outside.fetch_face_recognition(str(home/'other.tgz'))
    with pytest.raises(FileNotFoundError, match='there is no archive nowhere.tgz'):
        outside.fetch_face_recognition('nowhere.tgz')
    assert not outside.face_weights().exists()


def fails(reason):
    def fetch(folder): raise OSError(reason)
    return fetch


def test_where_npm_fails_the_registry_is_asked(home, made_up_archive, monkeypatch):
    monkeypatch.setattr(outside, 'archive_by_npm', fails('no npm'))
    monkeypatch.setattr(outside, 'archive_by_url', lambda folder: made_up_archive)
    assert outside.fetch_face_recognition().exists()


def test_offline_the_command_says_what_failed(home, monkeypatch, capsys):
    monkeypatch.setattr(outside, 'archive_by_npm', fails('npm has no registry'))
    monkeypatch.setattr(outside, 'archive_by_url', fails('no route to host'))
    with pytest.raises(SystemExit) as end:
        commands.main(['eyes'])
    said = str(end.value)
    assert all(part in said for part in ('npm has no registry', 'no route to host', '--archive', outside.FACE_API_URL))
    assert not outside.face_weights().exists()


def test_npm_is_called_in_a_folder_of_its_own_and_its_reason_is_kept(tmp_path, monkeypatch):
    npm = tmp_path/'npm'
    npm.write_text('#!/bin/sh\necho "$@" > words; echo packed > vladmandic.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setattr(outside.shutil, 'which', lambda name: str(npm))
    (tmp_path/'here').mkdir()
    assert outside.archive_by_npm(tmp_path/'here') == b'packed\n'
    assert (tmp_path/'here'/'words').read_text().startswith(f'pack {outside.FACE_API} ')
    npm.write_text('#!/bin/sh\necho "npm ERR! code E404" >&2; exit 1\n')
    with pytest.raises(OSError, match='code E404'):
        outside.archive_by_npm(tmp_path/'here')


def test_what_is_fetched_stays_out_of_git():
    ignored = (root()/'.gitignore').read_text().splitlines()
    assert '/data/eyes/' in ignored and 'face-api' in (root()/'data'/'README.md').read_text()
