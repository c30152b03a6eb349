"""The judges learn, score as the libraries do, and say how right they are."""
from dataclasses import replace
import pytest, torch
from torchmetrics.classification import MulticlassJaccardIndex, MultilabelRecall, MultilabelSpecificity
from facegen import judges, scores
from facegen.core import seed_all
from facegen.faces import ATTRIBUTES, PARTS, Face
from facegen.loss import Draw
from facegen.plan import Held
from facegen.toyfaces import draw_faces
from facegen.training import TrainConfig


@pytest.fixture(scope='module')
def crowd(): return Held(draw_faces(n=192, size=32, seed=0))


@pytest.fixture(scope='module')
def other(): return Held(draw_faces(n=96, size=32, seed=1))


cfg = TrainConfig(steps=160, batch=24, lr=3e-3, warmup=5, ema=0.)
draw = lambda n: Draw(0, 0, n, 0, n, torch.device('cpu'))
value = lambda report, name: next(m for m in report if m['metric'] == name)


@pytest.fixture(scope='module')
def classifier(crowd): return judges.fit_classifier(crowd, cfg, size=32, width=16, num_features=32)


@pytest.fixture(scope='module')
def parser(crowd): return judges.fit_parser(crowd, replace(cfg, steps=300, lr=5e-3), size=32, width=16)


def test_the_classifier_learns_and_knows_its_floor(classifier, other):
    report = scores.classifier_report(classifier, other, 32); m = value(report, 'balanced_accuracy')
    assert m['value'] > m['floor'] + .06 and abs(m['floor'] - .5) < .06 and m['low'] < m['value'] < m['high'] and m['n'] == len(other)
    assert {r['attribute'] for r in report if 'attribute' in r} <= set(ATTRIBUTES)


def test_the_parser_learns_and_knows_its_floor(parser, other):
    m = value(scores.parser_report(parser, other, 32), 'miou')
    assert m['value'] > m['floor'] + .1 and m['low'] <= m['value'] <= m['high']


@pytest.mark.parametrize('side', [24, 32, 64])
def test_any_size_goes_in_and_the_same_size_comes_out(classifier, parser, side):
    x = torch.rand(2, 3, side, side)
    assert classifier(x).shape == (2, 40) and classifier.features(x).shape == (2, 32)
    assert parser(x).shape == (2, len(PARTS), side, side) and parser.answers(x).shape == (2, side, side)


def test_saved_and_loaded_they_say_the_same(classifier, parser, tmp_path, crowd):
    for model, cls in ((classifier, judges.Classifier), (parser, judges.Parser)):
        model.save_pretrained(tmp_path/cls.__name__/'judge'); again = cls.from_pretrained(tmp_path/cls.__name__/'judge').eval()
        assert torch.equal(again.answers(crowd[:4].image), model.answers(crowd[:4].image))
        assert not list((tmp_path/cls.__name__).rglob('*.bin'))
    again, name = judges.load_classifier(str(tmp_path/'Classifier'/'judge'))
    assert name == 'Classifier' and torch.equal(again.prevalence, crowd.attrs.mean(0))


def test_without_a_folder_the_classifier_says_that_it_is_untrained():
    (a, name), (b, _) = judges.load_classifier(), judges.load_classifier()
    x = torch.rand(2, 3, 64, 64)
    assert 'untrained' in name and torch.equal(a.features(x), b.features(x))
    with pytest.raises(ValueError, match='no classifier in .*30_run_judges'): judges.load_classifier('nowhere')


def test_scores_equal_torchmetrics():
    g = torch.Generator().manual_seed(0)
    said, true = (torch.rand(50, 40, generator=g) < .4 for _ in range(2))
    lib = sum(M(40, average=None)(said.int(), true.int()) for M in (MultilabelRecall, MultilabelSpecificity))/2
    assert torch.allclose(scores.balanced_accuracy(said, true.float()), lib)
    p, t = (torch.randint(19, (6, 16, 16), generator=g) for _ in range(2)); t[0, :4] = -1
    lib = MulticlassJaccardIndex(19, average=None, ignore_index=-1)(p, t)
    assert torch.allclose(scores.iou(scores.confusion(p, t)).float(), lib, atol=1e-6)


def test_unknown_attributes_and_pixels_do_not_pull():
    seed_all(0); clf, par, f = judges.Classifier(size=32, width=16).eval(), judges.Parser(size=32, width=16).eval(), draw_faces(n=4, size=32)
    holes = Face(f.image, torch.where(torch.arange(40) < 20, f.attrs, torch.nan), torch.where(torch.arange(32) < 16, f.mask, -1))
    for model, loss in ((clf, judges.attribute_loss), (par, judges.mask_loss)): assert loss(model, holes, draw(4)).isfinite().all()
    nothing = Face(f.image, torch.full_like(f.attrs, torch.nan), torch.full_like(f.mask, -1))
    assert (judges.attribute_loss(clf, nothing, draw(4)) == 0).all() and (judges.mask_loss(par, nothing, draw(4)) == 0).all()
    said = torch.ones(4, 40, dtype=torch.bool)
    assert scores.balanced_accuracy(said, nothing.attrs).isnan().all()


def test_faces_without_labels_get_a_sentence():
    f = draw_faces(n=4, size=32)
    with pytest.raises(ValueError, match='no attributes'): judges.fit_classifier(Held(f._replace(attrs=torch.full_like(f.attrs, torch.nan))), cfg)
    with pytest.raises(ValueError, match='no masks'): judges.fit_parser(Held(f._replace(mask=torch.full_like(f.mask, -1))), cfg)


def test_bootstrap_of_a_mean_is_about_the_textbook_interval():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    low, high = scores.bootstrap(lambda rows: x[rows].mean(), 400, boots=500)
    assert abs((high - low)/(2*1.96*x.std()/20) - 1) < .15 and low < x.mean() < high


def test_a_parser_is_loaded_like_a_classifier(parser, tmp_path, crowd):
    parser.save_pretrained(tmp_path/'mine'/'judge'); again, name = judges.load_parser(str(tmp_path/'mine'/'judge'))
    assert name == 'mine' and not again.training and torch.equal(again.answers(crowd[:2].image), parser.answers(crowd[:2].image))
    (a, name), (b, _) = judges.load_parser(), judges.load_parser()
    assert name == 'untrained parser' and torch.equal(a.head[0].weight, b.head[0].weight)
    with pytest.raises(ValueError, match='no parser in nowhere .*30_run_judges'): judges.load_parser('nowhere')
