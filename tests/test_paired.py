"""Rows compared face by face: the tables give back the scores, and pairing is honest and worth it."""
import numpy as np, pandas as pd, pytest, torch
from scipy.stats import ttest_1samp
from facegen import compare
from facegen.core import generator
from facegen.crowds import kernel
from facegen.faces import ATTRIBUTES
from facegen.paired import MEASURES, Difference, attribute_faces, by_seeds, kernel_faces, load_faces_of, mask_faces, paired, save_faces
from facegen.scores import balanced_accuracy, confusion, iou
from facegen.toyfaces import draw_faces

FACE = draw_faces(n=40, size=32, seed=4)


class Judge:
    "Says of a face what is true of the one beside it"
    prevalence = torch.full((40,), .5)
    def __init__(self, shift=1): self.shift, self.device = shift, 'cpu'
    def __call__(self, x): return (FACE.attrs.roll(self.shift, 0)*2 - 1)*5
    def answers(self, x): return FACE.mask.roll(self.shift, 0)


def crowd(n, d, shift, seed): return torch.randn(n, d, generator=generator('crowd', seed)) + shift


@pytest.fixture
def home(tmp_path, monkeypatch): monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path)); return tmp_path


def test_tables_give_back_the_scores():
    t = attribute_faces(Judge(), FACE.image, FACE.attrs); keep = [i for i, a in enumerate(ATTRIBUTES) if a != 'Attractive']
    whole = balanced_accuracy(FACE.attrs.roll(1, 0) == 1, FACE.attrs)[keep].nanmean()
    assert torch.isclose(MEASURES['balanced_accuracy'][1](*t.values()), whole) and t['said'].dtype == torch.uint8
    m = mask_faces(Judge(), FACE.image, FACE.mask); assert torch.isclose(MEASURES['miou'][1](*m.values()).double(), iou(confusion(FACE.mask.roll(1, 0), FACE.mask)).nanmean())


def test_what_was_not_asked_is_not_counted():
    a = FACE.attrs.clone(); a[:, 3] = torch.nan; t = attribute_faces(Judge(), FACE.image, a)
    assert (t['asked'][:, 3] == 255).all() and torch.isclose(MEASURES['balanced_accuracy'][1](*t.values()),
                                                             balanced_accuracy(FACE.attrs.roll(1, 0) == 1, a)[[i for i, n in enumerate(ATTRIBUTES) if n != 'Attractive']].nanmean())


@pytest.mark.parametrize('shift', [0., .5, 2.])
def test_shares_of_the_kernel_distance_add_up_to_it(shift):
    a, b = crowd(50, 8, shift, 1), crowd(70, 8, 0., 2); t = kernel_faces(a, b)
    assert np.isclose(t['kernel'].mean(), kernel(a, b), rtol=1e-4, atol=1e-4) and abs(t['kernel_real'].mean()) < 1e-3 and (len(t['kernel']), len(t['kernel_real'])) == (50, 70)


def test_a_share_says_what_leaving_a_face_out_does():
    a, b = crowd(200, 8, .5, 1), crowd(200, 8, 0., 2); t = kernel_faces(a, b)['kernel'].double(); whole = float(kernel(a, b))
    left_out = np.array([float(kernel(torch.cat([a[:i], a[i + 1:]]), b)) - whole for i in range(0, 200, 10)])
    said = -(t - t.mean())[::10].numpy()/199
    assert np.corrcoef(left_out, said)[0, 1] > .999 and np.allclose(left_out, said, atol=.05*np.abs(left_out).max())


def test_the_kernel_difference_has_about_the_spread_that_new_crowds_have():
    "The bootstrap of influences against the real thing: fresh samples and fresh references, many times"
    def one(seed, boots=0):
        real = crowd(150, 6, 0., 3*seed); a, b = (kernel_faces(crowd(150, 6, s, 3*seed + k), real) for k, s in ((1, .4), (2, .5)))
        return paired([a], [b], 'kernel', max(2, boots))
    truth = np.std([one(s).value for s in range(60)]); said = np.mean([(lambda d: (d.high - d.low)/3.92)(one(s, 200)) for s in range(60, 68)])
    assert .7 < said/truth < 1.4


def test_a_row_differs_from_itself_by_nothing_and_exchange_turns_the_sign():
    a, b = ([kernel_faces(crowd(30, 4, s, k), crowd(30, 4, 0., 9)) for k in (1, 2)] for s in (.2, .6))
    d, e = paired(a, b, 'kernel', 100), paired(b, a, 'kernel', 100)
    assert paired(a, a, 'kernel', 50)[:3] == (0, 0, 0) and np.isclose(d.value, -e.value) and d.low < d.value < d.high and len(d.each) == 2
    assert np.allclose([d.low, d.high], [-e.high, -e.low], atol=1e-5)


def test_what_cannot_be_paired_is_refused():
    t = attribute_faces(Judge(), FACE.image, FACE.attrs); other = t | dict(asked=1 - t['asked'])
    for a, b, metric, match in (([t], [other], 'balanced_accuracy', 'not asked for the same faces'), ([t], [t, t], 'balanced_accuracy', '1 and 2 seeds'), ([t], [t], 'miou', "no table 'shared'"),
                                ([t], [t], 'frechet', 'no measure'), ([], [], 'kernel', '0 and 0 seeds'), ([t], [{k: v[:9] for k, v in t.items()}], 'balanced_accuracy', 'same faces')):
        with pytest.raises(ValueError, match=match): paired(a, b, metric)


def test_tables_come_back_and_a_run_without_them_says_so(home):
    t = mask_faces(Judge(), FACE.image, FACE.mask); save_faces('_x', t); back = load_faces_of('_x'); assert all(torch.equal(v, back[k]) for k, v in t.items())
    with pytest.raises(FileNotFoundError, match='has kept no faces'): load_faces_of('_y')


def records(run, tables, seed=0, part=''):
    "What a run leaves: its tables, and the record that follows from them"
    if tables: save_faces(run, {part + k: v for k, v in tables.items()})
    v = float(MEASURES['miou'][1](tables['shared'], tables['either'])) if tables else .5
    return dict(metric='miou', value=v, low=v - .1, high=v + .1, n=40, seed=seed, run=run)


def test_compare_takes_the_faces_where_both_rows_kept_them(home):
    near, far = (mask_faces(Judge(s), FACE.image, FACE.mask) for s in (0, 1)); frame = lambda *x: pd.DataFrame(x)
    a, b = frame(records('_a', far)), frame(records('_b', near)); d = compare.difference(a, b, 'miou')
    assert d == paired([far], [near], 'miou') and d.high - d.low < .2
    loose = compare.difference(a, frame(records('_c', None)), 'miou'); assert np.isclose(loose.high - loose.low, 2*np.hypot(.1, .1))
    with pytest.raises(ValueError, match='belong to different runs'): compare.difference(a, b.assign(value=b.value - .2, low=0.), 'miou')
    c = frame(records('_e', far, part='ema.')); e = frame(records('_f', near, part='ema.'))  # a run that was measured at several moments
    assert compare.difference(c.assign(kept='ema.'), e.assign(kept='ema.'), 'miou') == d
    for kept in ('no.', None): assert np.isclose((f := compare.difference(c.assign(kept=kept), e.assign(kept=kept), 'miou')).high - f.value, np.hypot(.1, .1))


@pytest.mark.parametrize('each', [(.1, .2), (-.3, -.06, -.08), (1., 1., 1.), (.5, -.2, .4, .1)])
def test_seeds_alone_agree_with_a_t_test(each):
    d = Difference(float(np.mean(each)), 0., 0., each, 10); low, high = by_seeds(d)
    if np.ptp(each) > 0:
        ours = ttest_1samp(each, 0.).confidence_interval(.95); assert np.allclose((low, high), (ours.low, ours.high))
    else: assert low == high == d.value
    assert by_seeds(Difference(.1, 0., .2, (.1,), 10)) == (-np.inf, np.inf)
