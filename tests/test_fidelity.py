"""Records of distances: intervals that cover, floors and ceilings at the same n, names that are earned."""
import hashlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from facegen import fidelity
from facegen.core import generator, load_result, save_result
from facegen.crowds import Eye, features
from facegen.fidelity import Inception, distances, frechet, inception, interval, kernel, lowrank


def crowd(n, d, *key):
    return torch.randn(n, d, dtype=torch.float64, generator=generator('crowd', n, d, *key))*torch.arange(1, d + 1).double().rsqrt()


def images(n, key=0):
    return torch.rand(n, 3, 16, 16, generator=generator('images', key))*2 - 1


# Intervals

@pytest.mark.parametrize('distance', [lowrank, kernel])
@pytest.mark.parametrize('n,d,shift', [(80, 24, .3), (40, 60, .3), (80, 24, 0.)])
def test_interval_covers(distance, n, d, shift):
    "The truth is what the distance gives on average at this n"
    def draw(i): return crowd(n, d, i, 'a') + shift*torch.arange(1, d + 1).rsqrt(), crowd(n, d, i, 'b')
    truth = torch.stack([distance(*draw(i)) for i in range(300)])
    ranges = [interval(distance, *draw(1000 + i), boots=40, seed=i) for i in range(60)]
    hits = sum(low <= truth.mean() <= high for low, high in ranges)
    width = sum(high - low for low, high in ranges)/60/3.92/truth.std()
    assert hits >= 53  # 88 % or more of 60
    assert .8 < width < (1.4 if shift else 2.)


def test_percentile_bootstrap_misses():
    "Why halves: with duplicates the whole histogram lies above the value"
    a, b, g = crowd(80, 24, 'a'), crowd(80, 24, 'b'), generator('resample')
    def again(x): return x[torch.randint(80, (80,), generator=g)]
    boots = torch.stack([lowrank(again(a), again(b)) for _ in range(100)])
    assert boots.min() > lowrank(a, b)


def test_interval_is_seeded_symmetric_and_shrinks():
    a, b = crowd(400, 8, 'a') + .3, crowd(400, 8, 'b')
    low, high = interval(lowrank, a, b, seed=1)
    assert interval(lowrank, a, b, seed=1) == (low, high) != interval(lowrank, a, b, seed=2)
    assert abs((low + high)/2 - lowrank(a, b)) < 1e-9
    narrow = interval(lowrank, crowd(3600, 8, 'a') + .3, crowd(3600, 8, 'b'), seed=1)
    assert 2 < (high - low)/(narrow[1] - narrow[0]) < 4.5  # nine times the images, a third of the width
    with pytest.raises(ValueError, match='needs 4 images a crowd'): interval(lowrank, a[:3], b)


# Records

def test_distances_is_a_result(tmp_path):
    real, other, fake = (images(60, k) for k in range(3))
    records = distances(fake*.4, real, other, Eye(), 'random eye', boots=20, recon=other*.9)
    assert [r['metric'] for r in records] == ['frechet', 'kernel']
    path = save_result(str(tmp_path/'r.json'), {}, records)
    for kept, r in zip(load_result(path)['metrics'], records, strict=True):
        assert kept == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in r.items()}  # six digits are kept
    look = {k: features(v, Eye()) for k, v in dict(fake=fake*.4, real=real, other=other, recon=other*.9).items()}
    for r, how in zip(records, (frechet, kernel)):
        for key, who in dict(value='fake', floor='other', ceiling='recon').items():
            assert abs(r[key] - how(look[who], look['real'])) < 1e-6
        assert r['low'] < r['value'] < r['high'] and r['floor_low'] < r['floor'] < r['floor_high'] and r['ceiling_low'] < r['ceiling_high']
        assert r['n'] == r['n_real'] == r['distinct'] == 60 and r['network'] == 'random eye'
        assert max(r['floor'], r['ceiling']) < r['value']


def test_floor_and_ceiling_are_taken_at_the_samples_n():
    fake, real, other = crowd(30, 16, 'f'), crowd(90, 16, 'r'), crowd(50, 16, 'o')
    (r, _), (again, _), (moved, _) = (distances(fake, real, other, None, 'x', boots=5, seed=s) for s in (0, 0, 1))
    assert r == again and r['floor'] != moved['floor'] and r['n'] == 30 and r['n_real'] == 90
    thirty = [float(frechet(other[torch.randperm(50, generator=generator('t', i))[:30]], real)) for i in range(20)]
    assert min(thirty)*.8 < r['floor'] < max(thirty)*1.2
    assert frechet(other, real) < min(thirty)  # at n = 50 the floor would be another one
    with pytest.raises(ValueError, match='the floor needs 30 images, as many as there are samples, got 20'):
        distances(fake, real, other[:20], None, 'x', boots=5)
    with pytest.raises(ValueError, match='the ceiling needs 30 images'): distances(fake, real, other, None, 'x', boots=5, recon=other[:9])


def test_floor_may_be_left_out_but_not_be_faked():
    fake, real = crowd(30, 16, 'f'), crowd(60, 16, 'r')
    for r in distances(fake, real, None, None, 'x', boots=5): assert r['floor'] is r['ceiling'] is r['floor_low'] is None
    with pytest.raises(ValueError, match='30 of the images behind the floor are in the reference'): distances(fake, real, real[:30], None, 'x', boots=5)


@pytest.mark.parametrize('n', [10, 100])
def test_degenerate_crowds_still_give_a_result(tmp_path, n):
    "One sample n times, and features that nobody shows"
    real = torch.cat([crowd(n, 24, 'r'), torch.zeros(n, 8)], 1)
    for fake in (real[:1].repeat(n, 1), torch.zeros(n, 32), real):
        save_result(str(tmp_path/'r.json'), {}, distances(fake, real, None, None, 'x', boots=5))


def test_repeated_samples_show():
    assert distances(crowd(4, 8).repeat(10, 1), crowd(40, 8, 'r'), None, None, 'x', boots=5)[0]['distinct'] == 4


def test_a_perfect_generator_is_at_its_floor():
    r, k = distances(crowd(200, 32, 'f'), crowd(200, 32, 'r'), crowd(200, 32, 'o'), None, 'x', boots=50)
    assert r['low'] < r['floor'] < r['high'] and k['low'] < 0 < k['high']


# Inception

def fake_package(monkeypatch, build):
    "A stand-in for torch_fidelity whose extractor is `build`"
    source = types.ModuleType('torch_fidelity.feature_extractor_inceptionv3')
    source.URL_INCEPTION_V3 = 'https://example.org/weights-inception-2015-12-05-6726825d.pth'
    source.FeatureExtractorInceptionV3 = build
    package = types.ModuleType('torch_fidelity')
    package.feature_extractor_inceptionv3 = source
    monkeypatch.setitem(sys.modules, 'torch_fidelity', package)
    monkeypatch.setitem(sys.modules, 'torch_fidelity.feature_extractor_inceptionv3', source)


class Extractor(nn.Module):
    "Has the package's signature; answers with the mean pixel, as uint8 images come in"
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert (name, features_list) == ('inception-v3-compat', ['2048'])
        self.w, self.got = nn.Parameter(torch.zeros(2048)), []
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        self.got.append(x)
        return (x.float().mean((2, 3)).repeat(1, 683)[:, :2048]*self.w,)


@pytest.fixture
def weights(tmp_path):
    torch.save({'w': torch.ones(2048)}, tmp_path/'w.pth')
    return tmp_path/'w.pth'


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'facegen\[inception\]', or pass a judge"): inception()


def test_missing_torchvision_says_what_to_install(monkeypatch, tmp_path):
    "The package itself is there, but cannot be imported"
    (tmp_path/'torch_fidelity').mkdir()
    (tmp_path/'torch_fidelity'/'__init__.py').write_text('raise ModuleNotFoundError("No module named \'torchvision\'")\n')
    monkeypatch.delitem(sys.modules, 'torch_fidelity', raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'torchvision'.*facegen\[inception\]"): inception()


def test_missing_damaged_and_unsafe_weights(monkeypatch, tmp_path, weights):
    fake_package(monkeypatch, Extractor)
    with pytest.raises(FileNotFoundError, match=r'no Inception weights at nowhere.pth: pass the path of weights-inception'): inception('nowhere.pth')
    (tmp_path/'cut.pth').write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match='cut.pth does not hold Inception weights'): inception(tmp_path/'cut.pth')
    torch.save({'other': torch.ones(3)}, tmp_path/'other.pth')
    with pytest.raises(ValueError, match='other.pth does not hold Inception weights'): inception(tmp_path/'other.pth')
    torch.save([1, 2], tmp_path/'list.pth')
    with pytest.raises(ValueError, match='list.pth does not hold Inception weights'): inception(tmp_path/'list.pth')
    torch.save({'w': torch.ones(2048), 'code': os.system}, tmp_path/'code.pth')
    with pytest.raises(ValueError, match='code.pth does not hold Inception weights'): inception(tmp_path/'code.pth')


def test_no_network_says_what_to_fetch(monkeypatch, tmp_path):
    fake_package(monkeypatch, Extractor)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    def offline(*args, **kw): raise OSError('Network is unreachable')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(FileNotFoundError, match=r'cannot be downloaded \(Network is unreachable\): fetch https.*6726825d.pth elsewhere and pass inception\(weights=path\)'): inception()


def test_download_is_checked_and_kept(monkeypatch, tmp_path, weights):
    fake_package(monkeypatch, Extractor)
    calls = []
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    def fetch(url, path, hash_prefix, progress): calls.append(hash_prefix); Path(path).write_bytes(weights.read_bytes())
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    inception(), inception()
    assert calls == ['6726825d']


def test_inception_gets_pixels_as_a_png_would_hold_them(monkeypatch, weights):
    fake_package(monkeypatch, Extractor)
    net = inception(str(weights))
    assert isinstance(net, Inception) and net.num_features == 2048
    x = torch.tensor([-1., 0., 1.])[:, None, None, None].expand(3, 3, 4, 4) + torch.tensor([0., .001, -.002])[:, None, None, None]
    assert features(x, net).shape == (3, 2048)
    assert net.net.got[0][:, 0, 0, 0].tolist() == [0, 128, 255] and net.net.got[0].shape == (3, 3, 4, 4)  # not resized by us


def test_only_the_standard_weights_earn_the_name_fid(monkeypatch, weights):
    fake_package(monkeypatch, Extractor)
    def names(net): return [r['metric'] for r in distances(images(8), images(8, 1), None, net, 'inception', boots=3)]
    assert names(inception(weights)) == names(Eye()) == ['frechet', 'kernel']
    monkeypatch.setattr(fidelity, 'STANDARD', hashlib.sha256(weights.read_bytes()).hexdigest())
    assert names(inception(weights)) == ['fid', 'kid']


# Real faces

def test_real_faces_are_nearer_to_real_than_noise(real_faces):
    import numpy as np
    from PIL import Image
    files = sorted((real_faces/'celeba64'/'images').glob('*'))[:240] or sorted((real_faces/'celeba64').rglob('*.[jp]*g'))[:240]
    x = torch.stack([torch.from_numpy(np.array(Image.open(f).convert('RGB').resize((32, 32)))) for f in files]).movedim(-1, 1)/127.5 - 1
    real, other, fake = x.split(80)
    noise = torch.randn(fake.shape, generator=generator('noise'))
    for clean, bad in zip(*(distances(f, real, other, Eye(), 'random eye', boots=30) for f in (fake, (fake + .5*noise).clamp(-1, 1)))):
        assert clean['low'] < clean['floor'] < clean['high'] < bad['low']
