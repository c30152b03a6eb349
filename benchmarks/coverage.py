"""How often an interval holds the truth: `OMP_NUM_THREADS=1 python benchmarks/coverage.py [repeats]` (five minutes)

Truth is what a distance gives on average at these sizes, from 600 fresh pairs of sets. Width is the standard error over
the true standard deviation."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from facegen.core import generator
from facegen.evaluation.distances import frechet_svd, kid
from facegen.evaluation.fidelity import interval

CASES = {'equal': (256, 256, 128), 'shifted': (256, 256, 128), 'wider': (256, 256, 128), 'heavy tails': (256, 256, 128),
         'equal, large reference': (256, 1000, 128), 'shifted, fewer than features': (128, 128, 512)}


def sample(case, i):
    n, m, d = CASES[case]
    scale = torch.arange(1, d + 1).double().rsqrt()
    scale *= (d/scale.square().sum()).sqrt()
    a, b = (torch.randn(k, d, dtype=torch.float64, generator=generator(case, i, j)) for j, k in enumerate((n, m)))
    if case == 'heavy tails':
        a, b = a.exp()/2.16 + .3, b.exp()/2.16
    if case.startswith('shifted'):
        a = a + .3
    if case == 'wider':
        a = a*1.3
    return a*scale, b*scale


def percentile(distance, a, b, n_resamples, seed):
    g = generator('percentile', seed)
    def resample(x): return x[torch.randint(len(x), (len(x),), generator=g)]
    values = torch.stack([distance(resample(a), resample(b)) for _ in range(n_resamples)])
    return values.quantile(.025).item(), values.quantile(.975).item()


if __name__ == '__main__':
    repeats, n_resamples = int(sys.argv[1]) if len(sys.argv) > 1 else 150, 60
    print(f'{repeats} repeats, {n_resamples} resamples each')
    for case in CASES:
        for distance in (frechet_svd, kid):
            values = torch.stack([distance(*sample(case, i)) for i in range(600)])
            truth, std = values.mean().item(), values.std().item()
            hits, width, missed = 0, 0., 0
            for i in range(repeats):
                a, b = sample(case, 1000 + i)
                low, high = interval(distance, a, b, n_resamples, i)
                hits += low <= truth <= high
                width += (high - low)/3.92/repeats
                low, high = percentile(distance, a, b, n_resamples, i)
                missed += not low <= truth <= high
            print(f'{case:28s} {distance.__name__:11s} halves {hits/repeats:4.0%}, width {width/std:.2f}; '
                  f'percentile bootstrap {1 - missed/repeats:4.0%}', flush=True)
