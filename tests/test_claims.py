"""Claims name experiments that exist, a step is one change, a verdict says what its seeds allow."""
import dataclasses

import numpy as np, pandas as pd, pytest
from conftest import run_cells
from facegen.core import save_result
from facegen.evaluation.paired_bootstrap import MEASURES
from facegen.evaluation.seeds import WORDS
from facegen.study import claims, experiments, runner
from facegen.study.claims import CLAIMS, EFFECTS, STEPS, Claim, changes, check_steps, judge, primary, weigh

BETTER = Claim('b is better', (('a', 'b'),), ('kid',), 'lower')
SIX = (1., 1.1, .9, 1.05, .95, 1.)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    return tmp_path.resolve()


def frame(row, values, half=.1, metric='kid', **tags):
    return pd.DataFrame([dict(row=row, metric=metric, value=v, low=v - half, high=v + half, n=64, seed=s, **tags)
                         for s, v in enumerate(values)])


def verdict(a, b, claim=BETTER): return judge([claim], pd.concat([frame('a', a), frame('b', b)]))[claim]


def test_claims_name_rows_and_measures_that_exist_and_can_be_paired():
    for c in CLAIMS:
        assert set(c.metrics) <= MEASURES.keys() and set(c.metrics) <= EFFECTS.keys() and c.wants in ('lower', 'higher')
        assert all(k in experiments.EXPERIMENTS for p in c.pairs for k in p)
        for a, b in c.pairs:
            assert experiments.EXPERIMENTS[a].notebook == experiments.EXPERIMENTS[b].notebook
        assert len(c.metrics) > 1 or 'kid' not in c.metrics[0], 'one network decides nothing about quality'


@pytest.mark.parametrize('scale', ['smoke', 'laptop', 'gpu', 'paper'])
def test_each_step_is_the_one_change_that_it_names(scale):
    check_steps(scale=scale)
    assert len({(a, b) for a, b, _ in STEPS}) == len(STEPS)
    for a, b, fact in STEPS:
        (before, after), = changes(a, b, scale).values()
        assert changes(b, a, scale) == {fact: (after, before)} and before != after


@pytest.mark.parametrize('step', STEPS, ids=lambda s: f'{s[0]}->{s[1]}')
@pytest.mark.parametrize('argument,value', [('lr', 3.3e-3), ('weight', 'p2'), ('steps', 1201), ('samples', 255)])
def test_a_label_that_lies_is_found(step, argument, value, monkeypatch):
    "Any further argument that one of the two has otherwise makes the step fail"
    _, b, fact = step
    e = experiments.EXPERIMENTS[b]
    lying = dataclasses.replace(e, params=e.params | {argument: value})
    monkeypatch.setitem(experiments.EXPERIMENTS, b, lying)
    with pytest.raises(ValueError, match=r'what differs is .*, .*: compare experiments that differ in one thing'):
        check_steps([step])
    with pytest.raises(ValueError, match='is called'):
        check_steps([(step[0], b, 'something else')])


def test_how_many_views_there_are_of_faces_that_are_not_augmented_is_no_change(monkeypatch):
    for name, views in (('lora', 5), ('lora-augmented', 6)):
        e = experiments.EXPERIMENTS[name]
        monkeypatch.setitem(experiments.EXPERIMENTS, name, dataclasses.replace(e, params=e.params | dict(views=views)))
    assert changes('lora', 'lora-augmented') == {'augmentation': ('off', 'v1 6')}
    assert changes('lora', 'lora-x2') == {'alpha': (24., 16.)}


def test_what_a_loss_that_is_off_weighs_is_no_change(monkeypatch):
    e = experiments.EXPERIMENTS['attrs']
    monkeypatch.setitem(experiments.EXPERIMENTS, 'attrs', dataclasses.replace(e, params=e.params | dict(lam=7.)))
    assert list(changes('uncond', 'attrs')) == ['attribute encoder']


def test_experiments_that_need_other_networks_differ():
    assert changes('spatial+guided', 'vq-latents') == {'autoencoder': ('autoencoder', 'autoencoder-vq')}
    assert set(changes('spatial+guided', 'longer')) == {'recipe'}


@pytest.mark.parametrize('gap', np.linspace(-.5, .5, 21))
def test_a_verdict_needs_the_seeds_interval_on_one_side_of_zero(gap):
    v = verdict(SIX, [x + gap + e for x, e in zip(SIX, (.02, -.02, .03, -.03, .01, -.01))])
    t = v.tests[0][0]
    assert v.word == ('holds here' if t.high < 0 else 'does not hold' if t.low > 0 else 'not decided') and v.seeds == 6


def test_few_seeds_or_seeds_that_disagree_decide_nothing():
    for n in range(1, 5):
        assert verdict(SIX[:n], [x - .8 for x in SIX[:n]]).word == 'not decided'
    assert verdict(SIX, [x - .8 for x in SIX]).word == 'holds here'
    assert verdict(SIX, (.1, 1.6, .2, 1.4, .1, .9)).word == 'not decided'
    v = judge([BETTER], frame('a', SIX))[BETTER]
    assert v.word == 'not decided' and v.tests == ((None,),) and v.seeds == 0 and v.p == 1


def test_a_claim_across_versions_needs_all_of_them_and_falls_with_one():
    two = Claim('both', (('a', 'b'), ('a', 'c')), ('kid',), 'lower')
    good = pd.concat([frame('a', SIX), frame('b', [x - .5 for x in SIX])])
    def word(c): return judge([two], pd.concat([good, frame('c', c)]))[two].word
    assert word([x - .4 for x in SIX]) == 'holds here' and word([x + .9 for x in SIX]) == 'does not hold'
    assert word(SIX[::-1]) == 'not decided' and judge([two], good)[two].word == 'not decided'


def test_two_networks_must_agree():
    both = Claim('by two', (('a', 'b'),), ('kid_32px', 'kid_outside'), 'lower')
    def word(second):
        rows = [frame('a', SIX, metric=m) for m in both.metrics]
        rows += [frame('b', [x - .5 for x in SIX], metric='kid_32px'), frame('b', second, metric='kid_outside')]
        return judge([both], pd.concat(rows))[both].word
    assert word([x - .4 for x in SIX]) == 'holds here' and word([x + .4 for x in SIX]) == 'not decided'


def test_many_claims_make_each_harder():
    weak = [a - d for a, d in zip(SIX, (.2, .05, .25, .15, .05, .28))]
    others = [Claim(f'{i}', (('a', f'c{i}'),), ('kid',), 'lower') for i in range(7)]
    r = pd.concat([frame('a', SIX), frame('b', weak), *(frame(f'c{i}', SIX[::-1]) for i in range(7))])
    alone, among = judge([BETTER], r)[BETTER], judge([BETTER, *others], r)[BETTER]
    assert alone.word == 'holds here' and among.word == 'points that way'
    assert among.p == alone.p and among.adjusted == pytest.approx(8*alone.p)


def test_the_weakest_part_weighs():
    def test_of(value, p): return claims.seed_test(claims_difference(value))._replace(p=p, value=value)
    def claims_difference(value): return type('D', (), dict(value=value, per_seed=(value, value + 1)))
    down, up = test_of(-1., .01), test_of(1., .04)
    assert weigh(((down,), (test_of(-1., .03),)), 'lower') == (1, .03)
    assert weigh(((down,), (up,)), 'lower') == (-1, .08) and weigh(((down, up),), 'lower') == (0, 1.)
    assert weigh(((down,), (None,)), 'lower') == (0, 1.)


def test_one_milestone_of_a_run_counts():
    records = pd.concat([
        frame('a', (1.,), chosen=True, guidance=2.), frame('a', (9.,), chosen=False, guidance=1.),
        frame('b', (2.,), equal_steps=True, weights='ema'), frame('b', (3.,), equal_steps=True, weights='raw'),
        frame('b', (4.,), equal_steps=False, weights='ema'), frame('c', (5.,))])
    assert [primary(records, k, 'kid').value.tolist() for k in 'abc'] == [[1.], [2.], [5.]]


def results_of(row, seeds=range(6), **values):
    notebook = experiments.EXPERIMENTS[row].notebook
    tags = {'37_lora': dict(chosen=True), '32_unconditional': dict(equal_steps=True, weights='ema')}.get(notebook, {})
    def record(metric, v):
        return dict(metric=metric, value=v, low=v - .05, high=v + .05, n=64, chance=None, reference=0.,
                    upper=None, network='classifier32-laptop-s0', **tags)
    for s in seeds:
        jitter = .01*((7*s + len(row)) % 5 - 2)
        save_result(experiments.run_name(row, 'smoke', s), {}, [record(k, v + jitter) for k, v in values.items()])


def test_the_page_gives_every_claim_its_verdict_and_the_same_bytes_again(home):
    with pytest.raises(ValueError, match='no claim can be held'):
        run_cells('50_findings', scale='smoke')
    for row, k in (('zero-shot', 4.), ('lora', .5), ('lora-uncond', .3)):
        results_of(row, kid=k, kid_outside=k)
    results_of('attrs', kid_32px=1., kid_outside=1., balanced_accuracy=.6, miou=.3)
    results_of('described', kid_32px=.5, kid_outside=1.6, balanced_accuracy=.7, miou=.3)
    results_of('dit-s-few', range(3), kid_32px=1., kid_outside=1.)
    results_of('dit-l-few', range(3), kid_32px=.2, kid_outside=.2)
    def draw():
        run_cells('50_findings', scale='smoke')
        name = runner.figure_name(experiments.FIGURES['50_findings'], 'smoke')
        return (home/'figures'/f'{name}.png').read_bytes(), (home/'figures'/'_findings-smoke.md').read_text()
    png, page = draw()
    assert (png, page) == draw() and len(png) > 20_000
    assert 'not run' in page and '| seeds for 80 % power |' in page
    lines = [l for l in page.splitlines() if l.startswith('| ') and l.count('**') == 2]
    by = {c.says: l.rsplit('**', 2)[1] for c, l in zip(CLAIMS, lines)}
    assert len(lines) == len(CLAIMS) and set(by.values()) <= set(WORDS)
    assert by['LoRA fine-tuning improves quality'] == 'holds here'
    assert by['and conditional LoRA more than unconditional'] == 'does not hold'
    assert by['InfoNCE and SegFormer improve attribute alignment'] == 'holds here'
    assert by['InfoNCE and SegFormer improve spatial control'] == 'not decided'
    assert by['InfoNCE and SegFormer improve quality'] == 'not decided', 'the two networks disagree'
    assert by['DiT-Large beats DiT-Small on the small set'] == 'not decided', 'three seeds'
    assert by['DiT-Small improves with ten times the data'] == 'not decided'
