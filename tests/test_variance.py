"""Variance components: the design is orthogonal, each is found where it alone is there, holes are named."""
import itertools

import numpy as np
import pandas as pd
import pytest

from facegen.evaluation.seeds import seeds_needed
from facegen.evaluation.variance import SHARES, SOURCES, by_training, seeds_table, trainings, variance_components


def values(of, samplings=3):
    "A design whose value is of(weights, order, noise, sampling)"
    return pd.DataFrame([dict(zip(SOURCES, t)) | dict(sampling=s, value=of(*t, s))
                         for t in trainings() for s in range(samplings)])


def test_any_two_sources_meet_once():
    array = np.array(trainings())
    for i, j in itertools.combinations(range(3), 2):
        assert len({*map(tuple, array[:, [i, j]])}) == 9
    assert [t for t in trainings() if len({*t}) == 1] == [(0, 0, 0), (1, 1, 1), (2, 2, 2)], 'the usual seeds are in it'


@pytest.mark.parametrize('place, name', [*enumerate(SOURCES), (3, 'shared_sampling')])
def test_what_one_source_does_is_found_there_and_nowhere_else(place, name):
    levels = np.array([0., 1., 5.])
    found = variance_components(values(lambda *seeds: 7 + levels[seeds[place]]))
    expected = dict.fromkeys(found, 0.) | {name: np.var(levels, ddof=1)}
    assert found == pytest.approx(expected, abs=1e-12)


def test_components_are_right_on_average():
    truth, found = dict(weights=1., order=.3, noise=0., rest=.5, sampling=.4), []
    for seed in range(600):
        rng = np.random.default_rng(seed)
        effects = [rng.normal(0, truth[k]**.5, 3) for k in SOURCES]
        own = {t: rng.normal(0, truth['rest']**.5) for t in trainings()}
        found.append(variance_components(values(lambda a, b, c, s: sum(
            e[i] for e, i in zip(effects, (a, b, c))) + own[a, b, c] + rng.normal(0, truth['sampling']**.5))))
    mean = pd.DataFrame(found).mean()
    assert mean.sampling == pytest.approx(.4, rel=.05) and mean.weights == pytest.approx(1., rel=.25)
    assert mean.weights > mean.order > mean.noise, 'none is below 0, so a source that does nothing gets a little'
    assert mean.rest == pytest.approx(.5, rel=.25)


def test_one_sampling_says_nothing_of_sampling():
    found = variance_components(values(lambda a, b, c, s: float(a), samplings=1))
    assert np.isnan(found['sampling']) and np.isnan(found['shared_sampling']) and found['weights'] == 1


def test_a_design_with_holes_is_refused():
    whole = values(lambda *seeds: 0.)
    with pytest.raises(ValueError, match=r'2 of 27 values are missing, the first for .* \(0, 0, 0, 0\): run them'):
        by_training(whole.iloc[2:])
    with pytest.raises(ValueError, match='sampled twice with one seed'):
        by_training(pd.concat([whole, whole.iloc[:1]]))


def test_the_table_asks_for_the_seeds_of_an_unpaired_difference():
    table = seeds_table({'miou': (.02, .5), 'steady': (.001, .5)})
    for share in SHARES:
        assert table.loc['miou', f'seeds for {share:.0%}'] == seeds_needed(share*.5, 2**.5*.02)
    assert table.loc['miou', 'spread'] == .04 and (table.loc['steady'] <= table.loc['miou']).all()
