"""Tests columns of text against lists of strings."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.data.columns import Paths, Strings, Texts, packed, unpacked

ROWS = st.lists(st.text(st.characters(), max_size=8), max_size=12)  # with lone surrogates, which file names can contain


@given(ROWS, st.integers(-14, 14), st.slices(12))
def test_a_column_behaves_like_the_list_it_is_built_from(rows, at, cut):
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


def test_columns_are_equal_only_if_all_rows_are():
    assert Strings.of(["a", "b"]) != ["a", "c"]
    assert Strings.of(["a", "b"]) != ["a"]
    assert Strings.of(["ab", ""]) != Strings.of(["a", "b"])
    assert repr(Strings.of("abcdefg")) == "['a', 'b', 'c', 'd', 'e', ...]"


def test_relative_paths_are_below_the_folder_and_absolute_paths_are_kept():
    paths = Paths("/data", Strings.of(["a.wav", "/music/b.wav", "c/d.wav"]))
    assert paths == ["/data/a.wav", "/music/b.wav", "/data/c/d.wav"]
    assert paths[:2] == ["/data/a.wav", "/music/b.wav"]


@given(st.lists(st.sampled_from([0.0, float("nan"), 1.5]), max_size=5))
def test_unpacking_restores_a_packed_column_bit_for_bit(values):
    import numpy as np

    column = np.array(values)
    small = packed(column)
    assert len(small) == (1 if len(values) and len({str(value) for value in values}) == 1 else len(values))
    assert unpacked(small, len(values)).tobytes() == column.tobytes()
