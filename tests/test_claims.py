"""A verdict says what its interval allows, the claims name experiments that exist, and the page is made of results."""
import numpy as np, pandas as pd, pytest
from conftest import run_cells
from facegen.study import experiments
from facegen.study import runner
from facegen.core import save_result
from facegen.evaluation.paired_bootstrap import MEASURES
from facegen.study.claims import CLAIMS, ABLATION, Claim, judge, primary

BETTER = Claim('b is better', (('a', 'b'),), 'kid', 'lower')


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    return tmp_path.resolve()


def frame(row, values, half=.1, metric='kid', **tags):
    return pd.DataFrame([dict(row=row, metric=metric, value=v, low=v - half, high=v + half, n=64, seed=s, **tags)
                         for s, v in enumerate(values)])


def said(a, b, claim=BETTER): return judge(claim, pd.concat([frame('a', a), frame('b', b)]))


def test_claims_name_rows_and_measures_that_exist_and_can_be_paired():
    for c in CLAIMS:
        assert c.metric in MEASURES and c.wants in ('lower', 'higher')
        assert all(k in experiments.EXPERIMENTS for p in c.pairs for k in p)
        notebooks = {experiments.EXPERIMENTS[k].notebook for p in c.pairs[:1] for k in p}
        assert len(notebooks) == 1
    assert all(k in experiments.EXPERIMENTS for p in ABLATION.values() for k in p)


def test_steps_of_the_decomposition_differ_in_what_they_say():
    "Neighbours share everything that is not named; a shared argument that differs would be a second change"
    free = {'run', 'seed', 'conditioning', 'nce', 'lam', 'corruption', 'cond_dropout', 'attrs_scale', 'mask_scale'}
    for a, b in ABLATION.values():
        p, q = (experiments.job(experiments.run_name(k, 'laptop', 0))['params'] for k in (a, b))
        assert {k for k in p.keys() | q.keys() if p.get(k) != q.get(k)} <= free


@pytest.mark.parametrize('gap', np.linspace(-.5, .5, 21))
def test_a_verdict_needs_an_interval_on_one_side_of_zero(gap):
    v = said((1., 1.05, .95), (1. + gap, 1.05 + gap, .95 + gap))
    d, = v.differences
    assert v.word == ('supported' if d.high < 0 else 'not supported' if d.low > 0 else 'not decided') and v.seeds == 3


def test_one_seed_or_seeds_that_disagree_decide_nothing():
    assert said((1.,), (.2,)).word == 'not decided' and said((1., 1.), (.2, .2)).word == 'supported'
    assert said((1., 1., 1.), (.1, .1, 1.4)).word == 'not decided'
    v = judge(BETTER, frame('a', (1., 1.)))
    assert v.word == 'not decided' and v.differences == (None,) and v.seeds == 0


def test_a_claim_across_versions_needs_all_of_them():
    two = Claim('both', (('a', 'b'), ('a', 'c')), 'kid', 'lower')
    good = pd.concat([frame('a', (1., 1.)), frame('b', (.4, .4))])
    assert judge(two, pd.concat([good, frame('c', (.4, .4))])).word == 'supported'
    assert judge(two, pd.concat([good, frame('c', (1.02, .98))])).word == 'not decided'
    assert judge(two, good).word == 'not decided'
    assert judge(two, pd.concat([good, frame('c', (1.9, 1.9))])).word == 'not supported'


def test_one_milestone_of_a_run_counts():
    records = pd.concat([
        frame('a', (1.,), chosen=True, guidance=2.), frame('a', (9.,), chosen=False, guidance=1.),
        frame('b', (2.,), equal_steps=True, weights='ema'), frame('b', (3.,), equal_steps=True, weights='raw'),
        frame('b', (4.,), equal_steps=False, weights='ema'), frame('c', (5.,))])
    assert [primary(records, k, 'kid').value.tolist() for k in 'abc'] == [[1.], [2.], [5.]]


def results_of(row, kid, seeds=(0, 1), **more):
    notebook = experiments.EXPERIMENTS[row].notebook
    tags = {'37_lora': dict(chosen=True), '32_unconditional': dict(equal_steps=True, weights='ema')}.get(notebook, {})
    def record(metric, v, half):
        return dict(metric=metric, value=v, low=v - half, high=v + half, n=64, chance=None, reference=0.,
                    upper=None, network='a classifier', **tags)
    for s in seeds:
        metrics = [record('kid', kid, .05), *(record(k, v, .01) for k, v in more.items())]
        save_result(experiments.run_name(row, 'smoke', s), {}, metrics)


def test_the_page_gives_every_claim_its_verdict_and_the_same_bytes_again(home):
    with pytest.raises(ValueError, match='no claim can be held'):
        run_cells('50_findings', scale='smoke')
    for row, k in (('zero-shot', 4.), ('lora', .5), ('lora-uncond', .4), ('dit-s-few', 1.), ('dit-l-few', 1.02)):
        results_of(row, k)
    results_of('attrs', 1., balanced_accuracy=.6, miou=.3)
    results_of('described', .9, balanced_accuracy=.7, miou=.31)
    def draw():
        run_cells('50_findings', scale='smoke')
        name = runner.figure_name(experiments.FIGURES['50_findings'], 'smoke')
        return (home/'figures'/f'{name}.png').read_bytes(), (home/'figures'/'_findings-smoke.md').read_text()
    png, page = draw()
    assert (png, page) == draw() and len(png) > 20_000
    assert '| seeds alone |' in page and '| 2 | [' in page and 'not run | 0 |  | 0 |' in page
    words = [l.rsplit('**', 2)[1] for l in page.splitlines() if l.count('**') == 2]
    assert len(words) == len(CLAIMS)
    by = dict(zip((c.says for c in CLAIMS), words))
    assert by['LoRA fine-tuning improves quality'] == 'supported'
    assert by['and conditional LoRA more than unconditional'] == 'not supported'
    assert by['InfoNCE and SegFormer improve attribute alignment'] == 'supported'
    assert by['InfoNCE and SegFormer improve spatial control'] == 'not decided'
    assert by['DiT-Small improves with ten times the data'] == 'not decided' and 'not run' in page
