"""A plan adds up what was measured, guesses the rest from its like, and says how much is a guess."""
import json

import pytest, torch

from facegen.core import load_result, result_path, save_result, step_seconds
from facegen.study import runtime

RECORD = dict(metric='x', value=1., n=4, low=None, high=None, chance=None, reference=None, upper=None)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    return tmp_path


def measure(run, seconds, step=None):
    "Leave a result that took `seconds`, with or without the length of a step"
    save_result(run, {}, [RECORD], seconds)
    path = result_path(run)
    r = json.loads(path.read_text())
    path.write_text(json.dumps(r | dict(env=r['env'] | dict(step_seconds=step))))


def plan(*todo, here=1., **siblings):
    "Experiments are called by a notebook and a number; they differ in as many arguments as their numbers do"
    def nearest(e): return {k: abs(int(k[1:]) - int(e[1:])) for k in siblings if k[0] == e[0] and k != e}
    return runtime.expected_seconds(list(todo), siblings, {e: nearest(e) for e in siblings}, here)


def test_what_was_measured_is_added_and_the_rest_counts_as_its_like():
    measure('a', 100, 1.)
    measure('b', 300, 1.)
    measure('e', 7, 1.)
    assert plan('a', 'b', x1=['a'], x2=['b']) == (400, 0, 0)
    assert plan('a', 'b', 'c', x1=['a'], x3=['b'], x2=['c']) == (600, 1, 0)
    assert plan('a', 'z', x1=['a'], y1=['z']) == (100, 1, 1)
    assert plan('d', x1=['d', 'e', 'f']) == (7, 0, 0)  # another seed of the same experiment knows best
    assert plan('c', x1=['a'], x4=['b'], x2=['c']) == (100, 1, 0)  # the nearest
    assert plan('c', x1=['a'], x4=['b'], x3=['c']) == (300, 1, 0)
    assert plan(x1=['a']) == (0, 0, 0)


def test_every_result_is_stretched_by_its_own_machine():
    measure('fast', 10, .1)
    measure('slow', 40, .4)
    measure('stopped', 900, .1)  # and went on an hour later
    assert plan('new', here=.2, x1=['fast', 'stopped', 'new'])[0] == pytest.approx(20)
    assert plan('new', here=.2, x1=['fast', 'slow', 'new'])[0] == pytest.approx(20)
    assert plan('slow', here=.8, x1=['slow'])[0] == pytest.approx(80)


def test_results_without_a_step_learn_it_from_experiments_that_ran_both_ways():
    measure('old', 30)
    measure('both', 10)
    measure('again', 40, .4)
    assert plan('old', here=.3, x1=['old'])[0] == pytest.approx(30)  # nobody knows: as measured here
    # a quarter of the other's time, so a quarter of its step
    assert plan('old', here=.3, x1=['old'], x2=['both', 'again'])[0] == pytest.approx(30*.3/.1)
    measure('odd', 1)
    # a result that says its step counts, another one does not
    assert plan('new', here=.3, x1=['odd', 'again', 'new'])[0] == pytest.approx(30)


def test_a_step_takes_time_and_changes_no_random_number():
    torch.manual_seed(0)
    a = torch.rand(3)
    torch.manual_seed(0)
    assert 0 < step_seconds(1) < 60 and torch.equal(torch.rand(3), a)
    assert runtime.time_step(2, 3) > 0
    save_result('r', {}, [RECORD], 1)
    assert load_result('r')['env']['step_seconds'] > 0
