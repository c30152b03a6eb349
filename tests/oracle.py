"""What tests of the evaluation share: a judge that looks its answers up, and small helpers."""
import torch
from torch import nn


class LookupJudge(nn.Module):
    "Looks up what is known of an image"
    prevalence = torch.tensor(.5)

    def __init__(self, images, answers):
        super().__init__()
        self.known = {x.numpy().tobytes(): a for x, a in zip(images, answers)}

    def forward(self, x): return torch.stack([self.known[p.numpy().tobytes()] for p in x])
    predict = forward


def rand(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def find(report, metric): return next(m for m in report if m['metric'] == metric)
