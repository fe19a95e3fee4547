"""Compares a NumberTable with a list of dictionaries."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.results.number_table import NumberTable

NAMES = st.sampled_from(["ppl", "gain", "é"])
ROWS = st.lists(st.dictionaries(NAMES, st.dictionaries(NAMES, st.floats(width=64), max_size=3), max_size=3), max_size=8)


@given(ROWS)
def test_a_table_equals_a_list_of_dictionaries(rows):
    table = NumberTable()
    for number, row in enumerate(rows):
        table.append(row)
        assert len(table) == number + 1
    metrics = list(dict.fromkeys(metric for row in rows for metric in row))
    expected = [{metric: row.get(metric, {}) for metric in metrics} for row in rows]
    assert list(map(repr, table)) == list(map(sorted_like, expected, table))
    for metric in ("ppl", "gain", "é", "nowhere"):
        for key in ("ppl", "gain", "é", "nowhere"):
            there = [value == value if (value := row.get(metric, {}).get(key)) is not None else False for row in rows]
            assert table.is_number(metric, key).tolist() == there
        anything = [any(value == value for value in row.get(metric, {}).values()) for row in rows]
        assert table.has_numbers(metric).tolist() == anything
        assert table.has_numbers(metric).dtype == np.bool_


def sorted_like(expected: dict[str, dict[str, float]], found: dict[str, dict[str, float]]) -> str:
    """Returns the repr of the expected row, with keys in the order of the table's columns. The repr makes NaN equal to NaN."""
    assert {metric: values.keys() for metric, values in expected.items()} == {
        metric: values.keys() for metric, values in found.items()
    }
    return repr({metric: {key: expected[metric][key] for key in values} for metric, values in found.items()})


def test_rows_can_be_indexed_from_both_ends():
    table = NumberTable()
    table.append({"ppl": {"ppl": 1.0}})
    table.append({})
    assert (table[0], table[1], table[-1], table[-2]) == ({"ppl": {"ppl": 1.0}}, {"ppl": {}}, {"ppl": {}}, table[0])
    for row in (2, -3):
        with pytest.raises(IndexError):
            table[row]


def test_an_empty_table_has_no_rows():
    table = NumberTable()
    assert (len(table), list(table), table.has_numbers("ppl").tolist()) == (0, [], [])
