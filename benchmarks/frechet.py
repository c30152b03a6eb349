"""How much work the singular values save: `OMP_NUM_THREADS=1 python benchmarks/frechet.py`

Both ways measure the same two sets of Gaussian features in one run, so the ratio does not depend on the load."""
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from facegen.core import generator
from facegen.evaluation.distances import frechet_svd


def library(a, b):
    identity = nn.Identity()  # stands where torchmetrics wants a network
    identity.num_features = a.shape[1]
    metric = FrechetInceptionDistance(feature=identity)
    metric.update(a, real=False)
    metric.update(b, real=True)
    return metric.compute()


def timed(f, *args, times=3):
    best = float('inf')
    for _ in range(times):
        start = time.perf_counter()
        value = f(*args)
        best = min(best, time.perf_counter() - start)
    return best, float(value)


if __name__ == '__main__':
    d = 2048
    scale = torch.arange(1, d + 1).double().rsqrt()
    print(f'{d} features, {torch.get_num_threads()} thread(s), best of 3 each')
    for n, m in ((256, 256), (256, 300), (300, 300)):
        a, b = (torch.randn(k, d, dtype=torch.float64, generator=generator(k, i))*scale for i, k in enumerate((n, m)))
        fast, ours = timed(frechet_svd, a, b)
        slow, theirs = timed(library, a, b)
        print(f'{n} against {m}: torchmetrics {slow:.2f} s, frechet_svd {fast*1000:.1f} ms, {slow/fast:.0f} x less; '
              f'values {theirs:.6f} and {ours:.6f}')
