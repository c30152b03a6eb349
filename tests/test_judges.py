"""The judges learn, take any size, and are saved and loaded like any pretrained model."""
from dataclasses import replace

import pytest
import torch
from oracle import find

from facegen.core import seed_all
from facegen.data.faces import ATTRIBUTES, PARTS, Face
from facegen.diffusion.losses import StepRandom
from facegen.evaluation import judges, metrics
from facegen.synthetic.toyfaces import render_faces
from facegen.training.config import InMemoryFaces, TrainConfig

CFG = TrainConfig(steps=160, batch=24, lr=3e-3, warmup=5, ema=0.)


@pytest.fixture(scope='module')
def faces(): return InMemoryFaces(render_faces(n=192, size=32, seed=0))


@pytest.fixture(scope='module')
def heldout(): return InMemoryFaces(render_faces(n=96, size=32, seed=1))


@pytest.fixture(scope='module')
def classifier(faces): return judges.fit_classifier(faces, CFG, size=32, width=16, num_features=32)


@pytest.fixture(scope='module')
def parser(faces): return judges.fit_parser(faces, replace(CFG, steps=300, lr=5e-3), size=32, width=16)


def test_the_classifier_learns_and_knows_chance(classifier, heldout):
    report = metrics.classifier_report(classifier, heldout, 32)
    m = find(report, 'balanced_accuracy')
    assert m['value'] > m['chance'] + .06 and abs(m['chance'] - .5) < .06
    assert m['low'] < m['value'] < m['high'] and m['n'] == len(heldout)
    assert {r['attribute'] for r in report if 'attribute' in r} <= set(ATTRIBUTES)


def test_the_parser_learns_and_knows_chance(parser, heldout):
    m = find(metrics.parser_report(parser, heldout, 32), 'miou')
    assert m['value'] > m['chance'] + .1 and m['low'] <= m['value'] <= m['high']


@pytest.mark.parametrize('side', [24, 32, 64])
def test_any_size_goes_in_and_the_same_size_comes_out(classifier, parser, side):
    x = torch.rand(2, 3, side, side)
    assert classifier(x).shape == (2, 40) and classifier.features(x).shape == (2, 32)
    assert parser(x).shape == (2, len(PARTS), side, side) and parser.predict(x).shape == (2, side, side)


def test_saved_and_loaded_they_predict_the_same(classifier, parser, tmp_path, faces):
    x = faces[:4].image
    for model, cls in ((classifier, judges.Classifier), (parser, judges.Parser)):
        model.save_pretrained(tmp_path/cls.__name__/'judge')
        again = cls.from_pretrained(tmp_path/cls.__name__/'judge').eval()
        assert torch.equal(again.predict(x), model.predict(x))
        assert not list((tmp_path/cls.__name__).rglob('*.bin'))
    again, name = judges.load_classifier(str(tmp_path/'Classifier'/'judge'))
    assert name == 'Classifier' and torch.equal(again.prevalence, faces.attrs.mean(0))


def test_without_a_folder_the_classifier_says_that_it_is_untrained():
    (a, name), (b, _) = judges.load_classifier(), judges.load_classifier()
    x = torch.rand(2, 3, 64, 64)
    assert 'untrained' in name and torch.equal(a.features(x), b.features(x))
    with pytest.raises(ValueError, match='no classifier in .*30_judges'):
        judges.load_classifier('nowhere')


def test_unknown_attributes_and_pixels_do_not_pull():
    seed_all(0)
    classifier = judges.Classifier(size=32, width=16).eval()
    parser = judges.Parser(size=32, width=16).eval()
    f, rng = render_faces(n=4, size=32), lambda: StepRandom(0, 0, 4, 0, 4, torch.device('cpu'))
    some = Face(f.image, torch.where(torch.arange(40) < 20, f.attrs, torch.nan),
                torch.where(torch.arange(32) < 16, f.mask, -1))
    none = Face(f.image, torch.full_like(f.attrs, torch.nan), torch.full_like(f.mask, -1))
    for model, loss in ((classifier, judges.attribute_loss), (parser, judges.mask_loss)):
        assert loss(model, some, rng()).isfinite().all()
        assert (loss(model, none, rng()) == 0).all()
    assert metrics.balanced_accuracy(torch.ones(4, 40, dtype=torch.bool), none.attrs).isnan().all()


def test_faces_without_labels_get_a_sentence():
    f = render_faces(n=4, size=32)
    with pytest.raises(ValueError, match='no attributes'):
        judges.fit_classifier(InMemoryFaces(f._replace(attrs=torch.full_like(f.attrs, torch.nan))), CFG)
    with pytest.raises(ValueError, match='no masks'):
        judges.fit_parser(InMemoryFaces(f._replace(mask=torch.full_like(f.mask, -1))), CFG)


def test_a_parser_is_loaded_like_a_classifier(parser, tmp_path, faces):
    parser.save_pretrained(tmp_path/'mine'/'judge')
    again, name = judges.load_parser(str(tmp_path/'mine'/'judge'))
    assert name == 'mine' and not again.training
    assert torch.equal(again.predict(faces[:2].image), parser.predict(faces[:2].image))
    (a, name), (b, _) = judges.load_parser(), judges.load_parser()
    assert name == 'untrained parser' and torch.equal(a.head[0].weight, b.head[0].weight)
    with pytest.raises(ValueError, match='no parser in nowhere .*30_judges'):
        judges.load_parser('nowhere')
