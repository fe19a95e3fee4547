"""Columns of text against lists of it."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.data.columns import Paths, Strings, Texts, packed, unpacked

ROWS = st.lists(st.text(st.characters(), max_size=8), max_size=12)  # half characters too, as file names can hold them


@given(ROWS, st.integers(-14, 14), st.slices(12))
def test_a_column_reads_like_the_list_that_it_was_made_of(rows, at, cut):
    column = Strings.of(rows)
    assert column == rows
    assert list(column) == rows
    assert len(column) == len(rows)
    assert column[cut] == rows[cut]
    assert list(Texts(column)) == [row or None for row in rows]
    if -len(rows) <= at < len(rows):
        assert column[at] == rows[at]
    else:
        with pytest.raises(IndexError):
            column[at]
    assert pickle.loads(pickle.dumps(column)) == rows


def test_columns_differ_where_a_row_does():
    assert Strings.of(["a", "b"]) != ["a", "c"]
    assert Strings.of(["a", "b"]) != ["a"]
    assert Strings.of(["ab", ""]) != Strings.of(["a", "b"])
    assert repr(Strings.of("abcdefg")) == "['a', 'b', 'c', 'd', 'e', ...]"


def test_files_lie_below_their_folder_unless_they_are_named_absolutely():
    paths = Paths("/data", Strings.of(["a.wav", "/music/b.wav", "c/d.wav"]))
    assert paths == ["/data/a.wav", "/music/b.wav", "/data/c/d.wav"]
    assert paths[:2] == ["/data/a.wav", "/music/b.wav"]


@given(st.lists(st.sampled_from([0.0, float("nan"), 1.5]), max_size=5))
def test_packed_columns_come_back_to_the_last_bit(values):
    import numpy as np

    column = np.array(values)
    small = packed(column)
    assert len(small) == (1 if len(values) and len({str(value) for value in values}) == 1 else len(values))
    assert unpacked(small, len(values)).tobytes() == column.tobytes()
