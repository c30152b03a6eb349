"""Every metric equals its library, and the bootstrap equals the textbook."""
import pytest
import torch
from oracle import rand
from torchmetrics.classification import MulticlassJaccardIndex, MultilabelRecall, MultilabelSpecificity
from torchmetrics.functional.classification import multilabel_average_precision

from facegen.evaluation import metrics
from facegen.evaluation.judges import Classifier
from facegen.synthetic.toyfaces import render_faces
from facegen.training.config import InMemoryFaces


def test_accuracy_and_overlap_equal_torchmetrics():
    g = torch.Generator().manual_seed(0)
    pred, target = (torch.rand(50, 40, generator=g) < .4 for _ in range(2))
    lib = sum(M(40, average=None)(pred.int(), target.int()) for M in (MultilabelRecall, MultilabelSpecificity))/2
    assert torch.allclose(metrics.balanced_accuracy(pred, target.float()), lib)
    p, t = (torch.randint(19, (6, 16, 16), generator=g) for _ in range(2))
    t[0, :4] = -1
    lib = MulticlassJaccardIndex(19, average=None, ignore_index=-1)(p, t)
    assert torch.allclose(metrics.iou(metrics.confusion(p, t)).float(), lib, atol=1e-6)


@pytest.mark.parametrize('ties', [False, True])
def test_average_precision_equals_torchmetrics_also_with_ties_and_unknowns(ties):
    s = (rand(200, 12)*4).floor()/4 if ties else rand(200, 12)
    t = (rand(200, 12, seed=1) < .3).float()
    t[rand(200, 12, seed=2) < .2] = torch.nan
    lib = multilabel_average_precision(s, t.nan_to_num(-1).long(), 12, average=None, ignore_index=-1)
    assert torch.allclose(metrics.average_precision(s, t), lib, atol=1e-5)
    assert metrics.average_precision(s, torch.zeros(200, 12)).isnan().all()


def test_a_report_has_the_average_precision_of_torchmetrics():
    "The mean over the attributes that somebody has, `Attractive` left out, unknown ones ignored"
    torch.manual_seed(0)
    model, faces = Classifier(size=32, width=8, num_features=16).eval(), render_faces(n=40, size=32, seed=2)
    attrs = torch.where(rand(40, 40) < .2, torch.nan, faces.attrs)
    report = metrics.classifier_report(model, InMemoryFaces(faces._replace(attrs=attrs)), 32)
    some = [i for i, a in enumerate(metrics.ATTRIBUTES) if a != 'Attractive' and (attrs[:, i] == 1).any()]
    logits, target = model(faces.image).detach()[:, some], attrs[:, some].nan_to_num(-1).long()
    lib = multilabel_average_precision(logits, target, len(some), ignore_index=-1)
    ours = next(m for m in report if m['metric'] == 'average_precision')
    assert ours['value'] == pytest.approx(float(lib), abs=1e-5) and len(some) < 39


def test_bootstrap_of_a_mean_is_about_the_textbook_interval():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    low, high = metrics.bootstrap(lambda rows: x[rows].mean(), 400, n_resamples=500)
    assert abs((high - low)/(2*1.96*x.std()/20) - 1) < .15 and low < x.mean() < high
