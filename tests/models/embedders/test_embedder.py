from fractions import Fraction
from math import floor

from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.models.embedders.embedder import window_starts

LENGTHS = st.integers(1, 500)


@given(num_items=LENGTHS, window=LENGTHS, hop=LENGTHS)
def test_windows_follow_the_documented_rule(num_items, window, hop):
    starts = window_starts(num_items, window=window, hop=hop)
    if num_items <= window:
        assert starts == [0]
        return
    assert len(starts) == 1 + floor(Fraction(num_items - window, hop) + Fraction(1, 2))
    assert starts == sorted(set(starts))
    assert all(start + window <= num_items for start in starts)
    assert all(start == i * hop for i, start in enumerate(starts[:-1]))
    left_out = num_items - (starts[-1] + window)
    assert 0 <= left_out < (hop + 1) / 2
    assert starts[-1] == (len(starts) - 1) * hop or left_out == 0


def test_one_more_sample_does_not_add_a_window():
    assert window_starts(480_001, window=480_000, hop=480_000) == window_starts(479_999, window=480_000, hop=480_000)
