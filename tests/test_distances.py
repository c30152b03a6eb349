"""Distances between sets: equal to the library, equal to theory, honest about what they are given."""
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from facegen.core import generator
from facegen.data.faces import Face
from facegen.evaluation.distances import RandomNetwork, features, frechet_svd, kid


def gaussian(n, d, *key, power=.5):
    "Features whose variances fall as a power of their number"
    scale = torch.arange(1, d + 1).double()**-power
    return torch.randn(n, d, dtype=torch.float64, generator=generator('crowd', n, d, *key))*scale


def identity(d):
    "Stands where torchmetrics wants a network, for features that are computed already"
    net = nn.Identity()
    net.num_features = d
    return net


def library(a, b):
    metric = FrechetInceptionDistance(feature=identity(a.shape[1]))
    metric.update(a, real=False)
    metric.update(b, real=True)
    return metric.compute()


def images(n, size=16, key=0):
    return torch.rand(n, 3, size, size, generator=generator('images', key))*2 - 1


# Frechet

@pytest.mark.parametrize('n,m,d', [(20, 30, 64), (30, 20, 64), (64, 64, 64), (65, 63, 64), (20, 300, 64), (300, 20, 64),
                                   (200, 300, 64), (2, 2, 64)])
def test_frechet_equals_torchmetrics(n, m, d):
    a, b = gaussian(n, d, 'a') + .2, gaussian(m, d, 'b')*1.3
    want = library(a, b)
    # torchmetrics loses digits where a covariance is singular: it takes roots of eigenvalues that are 0 up to rounding
    torch.testing.assert_close(frechet_svd(a, b), want, rtol=1e-9 if min(n, m) > d else 1e-5, atol=1e-9)


def test_frechet_equals_torchmetrics_on_images():
    net, a, b = RandomNetwork(), images(100), images(90, key=1)*.5
    metric = FrechetInceptionDistance(feature=net).eval()
    with torch.no_grad():
        metric.update(a, real=False)
        metric.update(b, real=True)
    ours = float(frechet_svd(features(a, net), features(b, net)))
    torch.testing.assert_close(ours, float(metric.compute()), rtol=1e-4, atol=1e-4)


def test_frechet_equals_scipy():
    a, b = gaussian(100, 12, 'a') + .5, gaussian(80, 12, 'b')
    sa, sb = a.T.cov().numpy(), b.T.cov().numpy()
    want = (a.mean(0) - b.mean(0)).square().sum() + sa.trace() + sb.trace() - 2*sqrtm(sa@sb).trace().real
    torch.testing.assert_close(frechet_svd(a, b), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('n', [30, 200])
def test_frechet_of_known_changes(n):
    a = gaussian(n, 64)
    variance = a.var(0).sum()
    assert frechet_svd(a, a).abs() < 1e-9*variance
    shift, wider = torch.tensor(4.*64, dtype=torch.float64), (a - a.mean(0))*3 + a.mean(0)
    torch.testing.assert_close(frechet_svd(a, a + 2.), shift)  # d times the squared shift
    torch.testing.assert_close(frechet_svd(a, wider), 4*variance)  # (3-1)^2 times the variance


def test_frechet_invariances():
    a, b = gaussian(40, 64, 'a'), gaussian(50, 64, 'b') + .1
    turn = torch.linalg.qr(gaussian(64, 64, 'turn', power=0))[0]
    want = frechet_svd(a, b)
    for x, y in ((b, a), (a[torch.randperm(40)], b), (a@turn, b@turn), (a + 5, b + 5), (a.flip(1), b.flip(1))):
        torch.testing.assert_close(frechet_svd(x, y), want)
    torch.testing.assert_close(frechet_svd(a*3, b*3), want*9)


@pytest.mark.parametrize('power,n,m,want', [
    (.8, 300, 300, .88), (1., 300, 300, .59), (1.2, 300, 300, .34), (1.5, 300, 300, .12),
    (1., 100, 288, .80), (1., 16, 288, 1.30)])
def test_bias_at_the_papers_sample_sizes(power, n, m, want):
    "Equal distributions, 2048 features, variance k^-power: the known bias as a share of the total variance"
    total = (torch.arange(1, 2049).double()**-power).sum()
    a, b = gaussian(n, 2048, 'a', power=power/2), gaussian(m, 2048, 'b', power=power/2)
    got = frechet_svd(a, b)/total
    assert abs(got - want) < .05


def test_bias_falls_with_n():
    values = [frechet_svd(gaussian(n, 128, 'a'), gaussian(n, 128, 'b')) for n in (20, 60, 200, 600, 2000)]
    assert all(x > 1.5*y for x, y in zip(values, values[1:]))


# KID

def kid_library(a, b, subsets, subset_size, seed=0):
    with pytest.warns(UserWarning, match='buffer'):
        metric = KernelInceptionDistance(feature=identity(a.shape[1]), subsets=subsets, subset_size=subset_size)
    metric.update(a, real=False)
    metric.update(b, real=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator('subsets', seed).initial_seed())
        return metric.compute()[0]


def test_kid_equals_torchmetrics():
    a, b = gaussian(60, 32, 'a') + .2, gaussian(60, 32, 'b')
    torch.testing.assert_close(kid(a, b), kid_library(a, b, subsets=1, subset_size=60))
    torch.testing.assert_close(kid(a, b, subsets=1), kid(a, b))


def test_kid_is_the_plain_definition():
    a, b = gaussian(7, 5, 'a') + .3, gaussian(9, 5, 'b')
    def k(x, y): return (x@y/5 + 1)**3
    def within(x): return sum(k(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j)/len(x)/(len(x) - 1)
    want = within(a) + within(b) - 2*sum(k(p, q) for p in a for q in b)/63
    torch.testing.assert_close(kid(a, b), want)


def test_kid_slices_do_not_matter():
    a, b = gaussian(2100, 8, 'a'), gaussian(1030, 8, 'b') + .1
    def k(x, y): return (x@y.T/8 + 1)**3
    def within(x): return k(x, x).fill_diagonal_(0).sum()/len(x)/(len(x) - 1)
    full = within(a) + within(b) - 2*k(a, b).mean()
    torch.testing.assert_close(kid(a, b), full)


def test_kid_is_unbiased_and_frechet_is_not():
    pairs = [(gaussian(30, 64, i, 'a'), gaussian(30, 64, i, 'b')) for i in range(300)]
    k, f = (torch.stack([how(a, b) for a, b in pairs]) for how in (kid, frechet_svd))
    assert k.mean().abs() < 3*k.std()/300**.5 and (k < 0).any()
    assert f.mean() > 8*f.std()


def test_subsets_average_to_all_pairs():
    a, b = gaussian(80, 16, 'a') + .3, gaussian(90, 16, 'b')
    many = kid(a, b, subsets=2000, subset_size=40)
    single = torch.stack([kid(a, b, subsets=1, subset_size=40, seed=i) for i in range(100)]).std()
    assert abs(many - kid(a, b)) < 4*single/2000**.5


@pytest.mark.parametrize('n,m,seed', [(50, 60, 0), (60, 50, 3)])
def test_subsets_are_those_of_torchmetrics(n, m, seed):
    a, b = gaussian(n, 16, 'a') + .3, gaussian(m, 16, 'b')
    torch.testing.assert_close(kid(a, b, subsets=7, subset_size=20, seed=seed), kid_library(a, b, 7, 20, seed))


def test_subsets_are_seeded_and_leave_the_global_stream_alone():
    a, b = gaussian(50, 16, 'a'), gaussian(50, 16, 'b')
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = kid(a, b, subsets=5, subset_size=20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert one == kid(a, b, subsets=5, subset_size=20, seed=3) != kid(a, b, subsets=5, subset_size=20, seed=4)


@pytest.mark.parametrize('size', [51, 1])
def test_subset_size_says_what_fits(size):
    words = rf'subset_size is {size}, the smaller set has 50 images: pass a subset_size in 2..50'
    with pytest.raises(ValueError, match=words):
        kid(gaussian(50, 8), gaussian(60, 8), subsets=3, subset_size=size)


# Features

class Norm(nn.Module):
    "Remembers how it was called; its answer depends on the batch when training"
    num_features = 3
    def __init__(self):
        super().__init__()
        self.norm, self.seen = nn.BatchNorm2d(3), []
    def forward(self, x):
        self.seen.append(len(x))
        return self.norm(x).mean((2, 3))


def test_features_come_in_batches_in_eval_mode_without_gradient():
    net, x = Norm().train(), images(10)
    got = features(x, net, batch=4)
    assert net.training and net.seen == [4, 4, 2]
    assert got.shape == (10, 3) and got.dtype == torch.float32 and not got.requires_grad
    assert torch.equal(net.norm.running_mean, torch.zeros(3))
    torch.testing.assert_close(got, features(x, net, batch=1))


def test_features_uses_the_method_of_a_judge_and_passes_matrices_through():
    class Judge(Norm):
        def features(self, x): return x.flatten(1)[:, :3]
    x, matrix = images(5), torch.randn(5, 7)
    assert torch.equal(features(x, Judge()), x.flatten(1)[:, :3])
    assert features(matrix, None) is matrix


def test_features_reads_a_set_of_faces():
    class Set:
        def __len__(self): return 6
        def __getitem__(self, i):
            n = len(x[i])
            return Face(x[i], torch.zeros(n, 40), torch.zeros(n, 16, 16, dtype=torch.int64))
    x = images(6)
    assert torch.equal(features(Set(), RandomNetwork(), batch=4), features(x, RandomNetwork(), batch=4))


def test_features_refuses_what_would_pass_in_silence():
    with pytest.raises(ValueError, match=r'floats in \[-1,1\], got torch.uint8 in 0..255: for 0..255 pass x/127.5 - 1'):
        features(torch.tensor([0, 255], dtype=torch.uint8).repeat(3*128).view(1, 3, 16, 16), RandomNetwork())
    with pytest.raises(ValueError, match=r'floats in \[-1,1\]'):
        features(images(2)*255, RandomNetwork())
    with pytest.raises(ValueError, match='not finite'):
        features(images(2)*torch.nan, RandomNetwork())
    with pytest.raises(ValueError, match=r'no images'):
        features(images(0), RandomNetwork())
    class Map(nn.Module):
        def forward(self, x): return x
    with pytest.raises(ValueError, match=r'must return \(B,d\), got \(2, 3, 16, 16\): pool its last map'):
        features(images(2), Map())
    class Wide(Norm):
        num_features = 5
    with pytest.raises(ValueError, match=r'must return \(B,5\), got \(2, 3\).*correct num_features'):
        features(images(2), Wide())
    class Broken(Norm):
        def forward(self, x): return x.mean((2, 3)).index_fill(0, torch.tensor(1), torch.inf)
    net = Broken().train()
    with pytest.raises(ValueError, match='features of 1 images are not finite, first image 1'):
        features(images(3), net)
    assert net.training


def test_sets_are_checked():
    a = gaussian(5, 4)
    for how in (frechet_svd, kid):
        with pytest.raises(ValueError, match='4 and 3 features: take both from the same network'):
            how(a, gaussian(5, 3))
        with pytest.raises(ValueError, match=r'second set must be a matrix \(n,d\) with n of 2 or more, got \(1, 4\)'):
            how(a, a[:1])
        with pytest.raises(ValueError, match='not finite, first image 2'):
            how(a.index_fill(0, torch.tensor(2), torch.nan), a)


def test_random_network_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(features(images(3), RandomNetwork(1)), features(images(3), RandomNetwork(1)))
    assert torch.equal(torch.get_rng_state(), state)
