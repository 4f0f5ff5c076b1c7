"""The patient garbage collector: what it sets while something large is made, and that it leaves all as it was."""

import gc

import pytest

from alpa_like.collector import patient


@pytest.fixture(autouse=True)
def as_before():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_full_collections_are_rare_inside_and_as_before_behind() -> None:
    gc.set_threshold(700, 10, 10)
    with patient():
        assert gc.get_threshold() == (700, 10, 1000)
        with patient():  # as a second thread would
            pass
        assert gc.get_threshold() == (700, 10, 1000)
    assert gc.get_threshold() == (700, 10, 10)


def test_an_error_leaves_it_as_before() -> None:
    gc.set_threshold(500, 5, 7)
    with pytest.raises(ValueError, match="inside"), patient():
        raise ValueError("inside")
    assert gc.get_threshold() == (500, 5, 7)


def test_a_collector_that_is_off_stays_off() -> None:
    gc.set_threshold(0, 10, 10)
    with patient():
        assert gc.get_threshold()[0] == 0
