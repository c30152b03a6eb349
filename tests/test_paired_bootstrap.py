"""Experiments compared face by face: the tables give back the metrics, and pairing is honest and worth it."""
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp

from facegen.core import generator
from facegen.data.faces import ATTRIBUTES
from facegen.evaluation.distances import kid
from facegen.evaluation.metrics import balanced_accuracy, confusion, iou
from facegen.evaluation.paired_bootstrap import (
    MEASURES, Difference, attributes_per_sample, kid_per_sample, load_per_sample, masks_per_sample, paired_bootstrap,
    save_per_sample, t_interval)
from facegen.study import comparisons
from facegen.synthetic.toyfaces import render_faces

FACES = render_faces(n=40, size=32, seed=4)
KEEP = [i for i, a in enumerate(ATTRIBUTES) if a != 'Attractive']


class Judge:
    "Says of a face what is true of the one beside it"
    prevalence = torch.full((40,), .5)
    def __init__(self, shift=1):
        self.shift, self.device = shift, 'cpu'
    def __call__(self, x): return (FACES.attrs.roll(self.shift, 0)*2 - 1)*5
    def predict(self, x): return FACES.mask.roll(self.shift, 0)


def gaussian(n, d, shift, seed): return torch.randn(n, d, generator=generator('crowd', seed)) + shift


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    return tmp_path


def test_tables_give_back_the_metrics():
    t = attributes_per_sample(Judge(), FACES.image, FACES.attrs)
    whole = balanced_accuracy(FACES.attrs.roll(1, 0) == 1, FACES.attrs)[KEEP].nanmean()
    assert torch.isclose(MEASURES['balanced_accuracy'][1](*t.values()), whole) and t['pred'].dtype == torch.uint8
    m = masks_per_sample(Judge(), FACES.image, FACES.mask)
    whole = iou(confusion(FACES.mask.roll(1, 0), FACES.mask)).nanmean()
    assert torch.isclose(MEASURES['miou'][1](*m.values()).double(), whole)


def test_what_was_not_requested_is_not_counted():
    a = FACES.attrs.clone()
    a[:, 3] = torch.nan
    t = attributes_per_sample(Judge(), FACES.image, a)
    whole = balanced_accuracy(FACES.attrs.roll(1, 0) == 1, a)[KEEP].nanmean()
    assert (t['requested'][:, 3] == 255).all()
    assert torch.isclose(MEASURES['balanced_accuracy'][1](*t.values()), whole)


@pytest.mark.parametrize('shift', [0., .5, 2.])
def test_shares_of_the_kid_add_up_to_it(shift):
    a, b = gaussian(50, 8, shift, 1), gaussian(70, 8, 0., 2)
    t = kid_per_sample(a, b)
    assert np.isclose(t['kid'].mean(), kid(a, b), rtol=1e-4, atol=1e-4) and abs(t['kid_real'].mean()) < 1e-3
    assert (len(t['kid']), len(t['kid_real'])) == (50, 70)


def test_a_share_says_what_leaving_a_face_out_does():
    a, b = gaussian(200, 8, .5, 1), gaussian(200, 8, 0., 2)
    t = kid_per_sample(a, b)['kid'].double()
    whole = float(kid(a, b))
    left_out = np.array([float(kid(torch.cat([a[:i], a[i + 1:]]), b)) - whole for i in range(0, 200, 10)])
    influence = -(t - t.mean())[::10].numpy()/199
    assert np.corrcoef(left_out, influence)[0, 1] > .999
    assert np.allclose(left_out, influence, atol=.05*np.abs(left_out).max())


def test_the_kid_difference_varies_about_as_new_samples_do():
    "The bootstrap of influences against the real thing: fresh samples and fresh references, many times"
    def one(seed, n_resamples=2):
        real = gaussian(150, 6, 0., 3*seed)
        a, b = (kid_per_sample(gaussian(150, 6, s, 3*seed + k), real) for k, s in ((1, .4), (2, .5)))
        return paired_bootstrap([a], [b], 'kid', n_resamples)
    truth = np.std([one(s).value for s in range(60)])
    intervals = [one(s, 200) for s in range(60, 68)]
    estimate = np.mean([(d.high - d.low)/3.92 for d in intervals])
    assert .7 < estimate/truth < 1.4


def test_an_experiment_differs_from_itself_by_nothing_and_exchange_turns_the_sign():
    real = gaussian(30, 4, 0., 9)
    a, b = ([kid_per_sample(gaussian(30, 4, s, k), real) for k in (1, 2)] for s in (.2, .6))
    d, e = paired_bootstrap(a, b, 'kid', 100), paired_bootstrap(b, a, 'kid', 100)
    assert paired_bootstrap(a, a, 'kid', 50)[:3] == (0, 0, 0)
    assert np.isclose(d.value, -e.value) and d.low < d.value < d.high and len(d.per_seed) == 2
    assert np.allclose([d.low, d.high], [-e.high, -e.low], atol=1e-5)


def test_what_cannot_be_paired_is_refused():
    t = attributes_per_sample(Judge(), FACES.image, FACES.attrs)
    other, fewer = t | dict(requested=1 - t['requested']), {k: v[:9] for k, v in t.items()}
    for a, b, metric, match in (([t], [other], 'balanced_accuracy', 'not given the same faces'),
                                ([t], [t, t], 'balanced_accuracy', '1 and 2 seeds'),
                                ([t], [t], 'miou', "no table 'intersection'"),
                                ([t], [t], 'frechet', 'no measure'),
                                ([], [], 'kid', '0 and 0 seeds'),
                                ([t], [fewer], 'balanced_accuracy', 'same faces')):
        with pytest.raises(ValueError, match=match):
            paired_bootstrap(a, b, metric)


def test_tables_come_back_and_a_run_without_them_says_so(home):
    t = masks_per_sample(Judge(), FACES.image, FACES.mask)
    save_per_sample('_x', t)
    back = load_per_sample('_x')
    assert all(torch.equal(v, back[k]) for k, v in t.items())
    with pytest.raises(FileNotFoundError, match='has no per-sample tables'):
        load_per_sample('_y')


def records(run, tables, seed=0, part=''):
    "What a run leaves: its tables, and the record that follows from them"
    if tables:
        save_per_sample(run, {part + k: v for k, v in tables.items()})
    v = float(MEASURES['miou'][1](tables['intersection'], tables['union'])) if tables else .5
    return dict(metric='miou', value=v, low=v - .1, high=v + .1, n=40, seed=seed, run=run)


def test_comparisons_use_the_tables_where_both_experiments_kept_them(home):
    near, far = (masks_per_sample(Judge(s), FACES.image, FACES.mask) for s in (0, 1))
    def frame(*x): return pd.DataFrame(x)
    a, b = frame(records('_a', far)), frame(records('_b', near))
    d = comparisons.difference(a, b, 'miou')
    assert d == paired_bootstrap([far], [near], 'miou') and d.high - d.low < .2
    loose = comparisons.difference(a, frame(records('_c', None)), 'miou')
    assert np.isclose(loose.high - loose.low, 2*np.hypot(.1, .1))
    with pytest.raises(ValueError, match='belong to different runs'):
        comparisons.difference(a, b.assign(value=b.value - .2, low=0.), 'miou')
    c = frame(records('_e', far, part='ema.'))
    e = frame(records('_f', near, part='ema.'))  # a run that was measured at several milestones
    assert comparisons.difference(c.assign(per_sample='ema.'), e.assign(per_sample='ema.'), 'miou') == d
    for prefix in ('no.', None):
        f = comparisons.difference(c.assign(per_sample=prefix), e.assign(per_sample=prefix), 'miou')
        assert np.isclose(f.high - f.value, np.hypot(.1, .1))


@pytest.mark.parametrize('each', [(.1, .2), (-.3, -.06, -.08), (1., 1., 1.), (.5, -.2, .4, .1)])
def test_seeds_alone_agree_with_a_t_test(each):
    d = Difference(float(np.mean(each)), 0., 0., each, 10)
    low, high = t_interval(d)
    if np.ptp(each) > 0:
        ours = ttest_1samp(each, 0.).confidence_interval(.95)
        assert np.allclose((low, high), (ours.low, ours.high))
    else:
        assert low == high == d.value
    assert t_interval(Difference(.1, 0., .2, (.1,), 10)) == (-np.inf, np.inf)
