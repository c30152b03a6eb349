"""A plan adds up what was measured, guesses the rest from its like, and says how much is a guess."""
import pytest
from facegen import pace
from facegen.core import save_result

RECORD = dict(metric='x', value=1., n=4, low=None, high=None, floor=None, ceiling=None)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch): monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path)); return tmp_path


def test_what_was_measured_is_added_and_the_rest_counts_as_its_like():
    save_result('a', {}, [RECORD], 100); save_result('b', {}, [RECORD], 300); save_result('e', {}, [RECORD], 7)
    assert pace.expected(dict(a='x', b='x')) == (400, 0, 0)
    assert pace.expected(dict(a='x', b='x', c='x')) == (600, 1, 0) and pace.expected(dict(a='x', z='y')) == (100, 1, 1)
    assert pace.expected(dict(d='x'), {'d': ['e', 'f']}) == (7, 0, 0)  # another seed of the same row knows best
    assert pace.expected({}) == (0, 0, 0)


def test_the_pace_is_a_ratio_of_steps_and_one_where_nothing_is_known():
    assert pace.pace('u') == 1.
    save_result('u', dict(network='smoke', size=16, batch=2, training_seconds=1e-6, trained_for=10), [RECORD], 1); slow = pace.pace('u', 2)
    save_result('u', dict(network='smoke', size=16, batch=2, training_seconds=1e6, trained_for=10), [RECORD], 1); assert slow > 1 > pace.pace('u', 2)
    save_result('u', dict(network='smoke'), [RECORD], 1); assert pace.pace('u') == 1.
