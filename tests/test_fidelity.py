"""Records of distances: intervals that cover, reference and reconstructions at the same n, names that are earned."""
import hashlib
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from facegen.core import generator, load_result, save_result
from facegen.evaluation import fidelity
from facegen.evaluation.distances import RandomNetwork, features, frechet_svd, kid
from facegen.evaluation.fidelity import Inception, distances, inception, interval


def gaussian(n, d, *key):
    "Features whose variances fall as one over their number"
    scale = torch.arange(1, d + 1).double().rsqrt()
    return torch.randn(n, d, dtype=torch.float64, generator=generator('crowd', n, d, *key))*scale


def images(n, key=0):
    return torch.rand(n, 3, 16, 16, generator=generator('images', key))*2 - 1


# Intervals

@pytest.mark.parametrize('distance', [frechet_svd, kid])
@pytest.mark.parametrize('n,d,shift', [(80, 24, .3), (40, 60, .3), (80, 24, 0.)])
def test_interval_covers(distance, n, d, shift):
    "The truth is what the distance gives on average at this n"
    def sets(i): return gaussian(n, d, i, 'a') + shift*torch.arange(1, d + 1).rsqrt(), gaussian(n, d, i, 'b')
    truth = torch.stack([distance(*sets(i)) for i in range(300)])
    ranges = [interval(distance, *sets(1000 + i), n_resamples=40, seed=i) for i in range(60)]
    hits = sum(low <= truth.mean() <= high for low, high in ranges)
    width = sum(high - low for low, high in ranges)/60/3.92/truth.std()
    assert hits >= 53  # 88 % or more of 60
    assert .8 < width < (1.4 if shift else 2.)


def test_percentile_bootstrap_misses():
    "Why halves: with duplicates the whole histogram lies above the value"
    a, b, g = gaussian(80, 24, 'a'), gaussian(80, 24, 'b'), generator('resample')
    def resample(x): return x[torch.randint(80, (80,), generator=g)]
    values = torch.stack([frechet_svd(resample(a), resample(b)) for _ in range(100)])
    assert values.min() > frechet_svd(a, b)


def test_interval_is_seeded_symmetric_and_shrinks():
    a, b = gaussian(400, 8, 'a') + .3, gaussian(400, 8, 'b')
    low, high = interval(frechet_svd, a, b, seed=1)
    assert interval(frechet_svd, a, b, seed=1) == (low, high) != interval(frechet_svd, a, b, seed=2)
    assert abs((low + high)/2 - frechet_svd(a, b)) < 1e-9
    narrow = interval(frechet_svd, gaussian(3600, 8, 'a') + .3, gaussian(3600, 8, 'b'), seed=1)
    assert 2 < (high - low)/(narrow[1] - narrow[0]) < 4.5  # nine times the images, a third of the width
    with pytest.raises(ValueError, match='needs 4 images a set'):
        interval(frechet_svd, a[:3], b)


# Records

def test_distances_is_a_result(tmp_path):
    real, other, fake = (images(60, k) for k in range(3))
    sets = dict(fake=fake*.4, real=real, other=other, recon=other*.9)
    records = distances(**sets, net=RandomNetwork(), name='random network', n_resamples=20)
    assert [r['metric'] for r in records] == ['frechet', 'kid']
    path = save_result(str(tmp_path/'r.json'), {}, records)
    for kept, r in zip(load_result(path)['metrics'], records, strict=True):
        # six digits are kept
        assert kept == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in r.items()}
    of = {k: features(v, RandomNetwork()) for k, v in sets.items()}
    for r, distance in zip(records, (frechet_svd, kid)):
        for key, who in dict(value='fake', reference='other', recon='recon').items():
            assert abs(r[key] - distance(of[who], of['real'])) < 1e-6
        assert r['low'] < r['value'] < r['high'] and r['recon_low'] < r['recon_high']
        assert r['reference_low'] < r['reference'] < r['reference_high']
        assert r['n'] == r['n_real'] == r['distinct'] == 60 and r['network'] == 'random network'
        assert max(r['reference'], r['recon']) < r['value']


def test_reference_and_reconstructions_are_taken_at_the_samples_n():
    fake, real, other = gaussian(30, 16, 'f'), gaussian(90, 16, 'r'), gaussian(50, 16, 'o')
    (r, _), (again, _), (moved, _) = (distances(fake, real, other, None, 'x', n_resamples=5, seed=s) for s in (0, 0, 1))
    assert r == again and r['reference'] != moved['reference'] and r['n'] == 30 and r['n_real'] == 90
    def thirty_of(i): return other[torch.randperm(50, generator=generator('t', i))[:30]]
    thirty = [float(frechet_svd(thirty_of(i), real)) for i in range(20)]
    assert min(thirty)*.8 < r['reference'] < max(thirty)*1.2
    assert frechet_svd(other, real) < min(thirty)  # at n = 50 the reference would be another one
    with pytest.raises(ValueError, match='the reference needs 30 images, as many as there are samples, got 20'):
        distances(fake, real, other[:20], None, 'x', n_resamples=5)
    with pytest.raises(ValueError, match='the recon needs 30 images'):
        distances(fake, real, other, None, 'x', n_resamples=5, recon=other[:9])


def test_reference_may_be_left_out_but_not_be_faked():
    fake, real = gaussian(30, 16, 'f'), gaussian(60, 16, 'r')
    for r in distances(fake, real, None, None, 'x', n_resamples=5):
        assert r['reference'] is r['recon'] is r['reference_low'] is None
    with pytest.raises(ValueError, match='30 of the images behind the reference are in the reference'):
        distances(fake, real, real[:30], None, 'x', n_resamples=5)


@pytest.mark.parametrize('n', [10, 100])
def test_degenerate_crowds_still_give_a_result(tmp_path, n):
    "One sample n times, and features that nobody shows"
    real = torch.cat([gaussian(n, 24, 'r'), torch.zeros(n, 8)], 1)
    for fake in (real[:1].repeat(n, 1), torch.zeros(n, 32), real):
        save_result(str(tmp_path/'r.json'), {}, distances(fake, real, None, None, 'x', n_resamples=5))


def test_repeated_samples_show():
    fake, real = gaussian(4, 8).repeat(10, 1), gaussian(40, 8, 'r')
    assert distances(fake, real, None, None, 'x', n_resamples=5)[0]['distinct'] == 4


def test_a_perfect_generator_is_at_its_reference():
    fake, real, other = (gaussian(200, 32, key) for key in 'fro')
    r, k = distances(fake, real, other, None, 'x', n_resamples=50)
    assert r['low'] < r['reference'] < r['high'] and k['low'] < 0 < k['high']


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
    with pytest.raises(ModuleNotFoundError, match=r'run `make inception`, or pass a judge'):
        inception()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    "A torch_fidelity on disk, whose import fails as one beside an unfitting torchvision does"
    package = tmp_path/'torch_fidelity'
    package.mkdir()
    (package/'__init__.py').write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (package/'helpers.py').write_text('WIDTH = 2048')
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [m for m in sys.modules if m.split('.')[0] == 'torch_fidelity']:
        del sys.modules[name]


def test_torchvision_is_not_needed(installed, weights):
    (installed/'feature_extractor_inceptionv3.py').write_text('''
import torch
from torch_fidelity.helpers import WIDTH
URL_INCEPTION_V3 = 'https://example.org/weights-inception-2015-12-05-6726825d.pth'
class FeatureExtractorInceptionV3(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(WIDTH))
        self.load_state_dict(torch.load(feature_extractor_weights_path))
    def forward(self, x): return (self.w.expand(len(x), -1),)''')
    for _ in range(2):
        assert features(torch.zeros(3, 3, 4, 4), inception(weights)).shape == (3, 2048)
        assert 'torch_fidelity' not in sys.modules  # who imports the package itself gets all of it


def test_what_else_is_missing_is_named(installed):
    (installed/'feature_extractor_inceptionv3.py').write_text('import no_such_library')
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'no_such_library'.*make inception"):
        inception()


def test_missing_damaged_and_unsafe_weights(monkeypatch, tmp_path, weights):
    fake_package(monkeypatch, Extractor)
    words = 'no Inception weights at nowhere.pth: pass the path of weights-inception'
    with pytest.raises(FileNotFoundError, match=words):
        inception('nowhere.pth')
    (tmp_path/'cut.pth').write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match='cut.pth does not hold Inception weights'):
        inception(tmp_path/'cut.pth')
    torch.save({'other': torch.ones(3)}, tmp_path/'other.pth')
    with pytest.raises(ValueError, match='other.pth does not hold Inception weights'):
        inception(tmp_path/'other.pth')
    torch.save([1, 2], tmp_path/'list.pth')
    with pytest.raises(ValueError, match='list.pth does not hold Inception weights'):
        inception(tmp_path/'list.pth')
    torch.save({'w': torch.ones(2048), 'code': os.system}, tmp_path/'code.pth')
    with pytest.raises(ValueError, match='code.pth does not hold Inception weights'):
        inception(tmp_path/'code.pth')


def test_no_network_says_what_to_fetch(monkeypatch, tmp_path):
    fake_package(monkeypatch, Extractor)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    def offline(*args, **kw): raise OSError('Network is unreachable')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    words = (r'cannot be downloaded \(Network is unreachable\): '
             r'fetch https.*6726825d.pth elsewhere and pass inception\(weights=path\)')
    with pytest.raises(FileNotFoundError, match=words):
        inception()


def test_download_is_checked_and_kept(monkeypatch, tmp_path, weights):
    fake_package(monkeypatch, Extractor)
    calls = []
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    def fetch(url, path, hash_prefix, progress):
        calls.append(hash_prefix)
        Path(path).write_bytes(weights.read_bytes())
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    inception()
    inception()
    assert calls == ['6726825d']


def test_inception_gets_pixels_as_a_png_would_hold_them(monkeypatch, weights):
    fake_package(monkeypatch, Extractor)
    net = inception(str(weights))
    assert isinstance(net, Inception) and net.num_features == 2048
    x = (torch.tensor([-1., 0., 1.]) + torch.tensor([0., .001, -.002])).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    assert features(x, net).shape == (3, 2048)
    got, = net.net.got
    assert got[:, 0, 0, 0].tolist() == [0, 128, 255] and got.shape == (3, 3, 4, 4)  # not resized by us


def test_only_the_standard_weights_earn_the_name_fid(monkeypatch, weights):
    fake_package(monkeypatch, Extractor)
    def names(net):
        return [r['metric'] for r in distances(images(8), images(8, 1), None, net, 'inception', n_resamples=3)]
    assert names(inception(weights)) == names(RandomNetwork()) == ['frechet', 'kid']
    monkeypatch.setattr(fidelity, 'INCEPTION_SHA256', hashlib.sha256(weights.read_bytes()).hexdigest())
    assert names(inception(weights)) == ['fid', 'kid']


# Real faces

def test_real_faces_are_nearer_to_real_than_noise(real_faces):
    folder = real_faces/'celeba64'
    files = sorted((folder/'images').glob('*'))[:240] or sorted(folder.rglob('*.[jp]*g'))[:240]
    pixels = np.stack([np.array(Image.open(f).convert('RGB').resize((32, 32))) for f in files])
    real, other, fake = (torch.from_numpy(pixels).movedim(-1, 1)/127.5 - 1).split(80)
    noisy = (fake + .5*torch.randn(fake.shape, generator=generator('noise'))).clamp(-1, 1)
    network = RandomNetwork()
    records = (distances(x, real, other, network, 'random network', n_resamples=30) for x in (fake, noisy))
    for clean, bad in zip(*records):
        assert clean['low'] < clean['reference'] < clean['high'] < bad['low']
