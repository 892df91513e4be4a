"""Numbers out of their range are refused in a line that says the range."""

import math

import pytest

from megatron_pdmd.limits import check_range, shown


@pytest.mark.parametrize("value", [1, 7, 10])
def test_a_number_in_its_range_passes(value):
    check_range("--steps", value, 1, 10)


@pytest.mark.parametrize("value", [0, 11, math.nan, math.inf, -math.inf, 10**40])
def test_a_number_out_of_its_range_is_refused(value):
    with pytest.raises(ValueError) as refused:
        check_range("--steps", value, 1, 10)
    assert str(refused.value) == f"--steps {value}: must lie in [1, 10]"


def test_an_open_end_is_refused():
    check_range("--lr", 1e-9, 0, 1, open_below=True)
    with pytest.raises(ValueError, match=r"--lr 0: must lie in \(0, 1\]"):
        check_range("--lr", 0, 0, 1, open_below=True)
    with pytest.raises(ValueError, match=r"--ema-decay 1: must lie in \[0, 1\)"):
        check_range("--ema-decay", 1, 0, 1, open_above=True)


def test_a_long_value_is_cut():
    assert shown(3) == "3" and len(shown(10**4000)) == 80
