"""Means over the iterations between two log entries."""

import json
import math

import pytest

from megatron_pdmd.training.logs.interval import IntervalMeans, closes_interval


def test_means_are_over_what_came_since_the_last_ones():
    means = IntervalMeans()
    for loss in (1.0, 2.0, 6.0):
        means.add({"fake_loss": loss})
    assert means.take() == {"fake_loss": 3.0}
    means.add({"fake_loss": 5.0})
    assert means.take() == {"fake_loss": 5.0}
    assert means.take() == {}


def test_one_iteration_is_logged_as_it_is():
    means = IntervalMeans()
    means.add({"fake_loss": 0.1, "score_gap": 1 / 3})
    assert means.take() == {"fake_loss": 0.1, "score_gap": 1 / 3}


def test_what_is_not_finite_or_not_there_does_not_count():
    means = IntervalMeans()
    means.add({"fake_loss": 1.0, "dmd_gradient": math.nan})
    means.add({"fake_loss": math.inf, "dmd_gradient": math.nan, "rare": 7.0})
    means.add({"fake_loss": 2.0, "dmd_gradient": math.nan})
    taken = means.take()
    assert math.isnan(taken.pop("dmd_gradient"))
    assert taken == {"fake_loss": 1.5, "rare": 7.0}


def test_sums_that_went_through_a_checkpoint_go_on_to_the_bit():
    whole, values = IntervalMeans(), [math.exp(i) / 3 for i in range(10)]
    for value in values:
        whole.add({"fake_loss": value})
    first = IntervalMeans()
    for value in values[:4]:
        first.add({"fake_loss": value})
    second = IntervalMeans(json.loads(json.dumps(first.sums)))
    for value in values[4:]:
        second.add({"fake_loss": value})
    assert second.take() == whole.take()


def test_sums_that_were_handed_out_are_not_changed_later():
    means = IntervalMeans()
    means.add({"fake_loss": 1.0})
    saved = means.sums
    means.add({"fake_loss": 1.0})
    assert saved == {"fake_loss": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("interval", "logged"),
    [(1, list(range(1, 13))), (5, [1, 5, 7, 8, 10, 12]), (100, [1, 7, 8, 12])],
)
def test_entries_of_phases_of_7_and_5_iterations(interval, logged):
    places = [(k, 7) for k in range(1, 8)] + [(k, 5) for k in range(1, 6)]
    found = [i for i, (k, n) in enumerate(places, start=1) if closes_interval(i, k, n, interval)]
    assert found == logged
