"""The paired t test is scipy's, Holm's correction is the closed test by Bonferroni, power is what studies find."""
from itertools import combinations

import numpy as np, pytest
from scipy import stats
from facegen.evaluation.paired_bootstrap import Difference
from facegen.evaluation.seeds import LEAST_SEEDS, WORDS, claim_word, holm, power, seed_test, seeds_needed


def difference(per_seed): return Difference(float(np.mean(per_seed)), 0., 0., tuple(per_seed), 9)


@pytest.mark.parametrize('n', [2, 3, 6, 20])
def test_the_test_is_scipys(n):
    x = np.random.default_rng(n).normal(.3, 1, n)
    mine, theirs = seed_test(difference(x)), stats.ttest_1samp(x, 0)
    interval = theirs.confidence_interval(.95)
    assert np.allclose(mine, (x.mean(), interval.low, interval.high, theirs.statistic, theirs.pvalue, n))
    assert (mine.p < .05) == (mine.low > 0 or mine.high < 0)


def test_one_seed_and_equal_seeds():
    one = seed_test(difference((.5,)))
    assert one.p == 1 and one.low == -np.inf and one.high == np.inf and one.seeds == 1
    assert seed_test(difference((.5, .5, .5))).p == 0 and seed_test(difference((0., 0.))).p == 1


@pytest.mark.parametrize('seed', range(20))
def test_holm_is_the_closed_test_by_bonferroni(seed):
    "A claim is rejected when every set of claims that it belongs to is, by its smallest p times the size of the set"
    rng = np.random.default_rng(seed)
    p = rng.beta(.3, 1, rng.integers(1, 7))
    sets = [s for k in range(1, len(p) + 1) for s in combinations(range(len(p)), k)]
    closed = [max(min(1, len(s)*min(p[list(s)])) for s in sets if i in s) for i in range(len(p))]
    assert np.allclose(holm(p), closed) and (holm(p) >= p - 1e-12).all()
    order = rng.permutation(len(p))
    assert np.allclose(holm(p[order]), holm(p)[order])


@pytest.mark.parametrize('effect,n', [(0., 4), (.5, 6), (1., 10), (3., 3)])
def test_power_is_what_made_up_studies_find(effect, n):
    draws = np.random.default_rng(0).normal(effect, 1, (20000, n))
    assert abs((stats.ttest_1samp(draws, 0, axis=1).pvalue < .05).mean() - power(effect, 1, n)) < .012
    assert power(-2*effect, 2, n) == pytest.approx(power(effect, 1, n))


def test_as_many_seeds_as_are_needed_and_no_more():
    for effect in (.4, 1., 2.5):
        n = seeds_needed(effect, 1.)
        assert power(effect, 1., n) >= .8 > (power(effect, 1., n - 1) if n > 2 else 0)
    assert seeds_needed(1e-6, 1., most=50) == 50


def test_words():
    for direction in (-1, 0, 1):
        for p, q in ((1e-4, 1e-3), (.02, .1), (.3, 1.)):
            for n in (1, LEAST_SEEDS - 1, LEAST_SEEDS, 9):
                word = claim_word(direction, p, q, n)
                assert word in WORDS and (n >= LEAST_SEEDS or word == 'not decided')
                assert (word == 'holds here') == (direction == 1 and q < .05 and n >= LEAST_SEEDS)
                assert (word == 'does not hold') == (direction == -1 and q < .05 and n >= LEAST_SEEDS)
                assert (word == 'points that way') == (direction == 1 and p < .05 <= q and n >= LEAST_SEEDS)
