"""Tables of a run folder as columns, against Python's own csv reader."""

import csv
from math import isnan
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.errors import RunError
from musicgen_eval.results.table_reader import Table, TableRecords, read_table

NUMBERS = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**53), 2**53))
TEXTS = st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]), max_size=8)


def write(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def read(path: Path, **settings) -> Table:
    given = {"required": ("id", "index"), "texts": ("id", "text"), "numbers": ("index", "seconds"), **settings}
    return read_table(path, remedy="resume it", **given)


@given(st.lists(st.tuples(TEXTS, TEXTS, st.integers(0, 2**53), NUMBERS, NUMBERS), max_size=5))
def test_every_cell_is_read_back(tmp_path_factory, rows):
    heading = ["id", "foreign", "index", "text", "seconds", "a/b/c"]
    path = tmp_path_factory.mktemp("table") / "t.csv"
    write(path, [heading, *[[name, "x", index, text, seconds, number] for name, text, index, seconds, number in rows]])
    table = read(path, metrics=[("a/b", "c"), ("a", "missing")])
    assert table.num_rows == len(rows)
    for number, (name, text, index, seconds, value) in enumerate(rows):
        row = table.row(number)
        assert (row.texts, row.numbers) == ({"id": name, "text": text}, {"index": index, "seconds": seconds})
        assert row.metrics == {"a/b": {"c": value}}


def test_columns_take_eight_bytes_per_number(tmp_path):
    path = write(tmp_path / "t.csv", [["id", "index", "seconds"], ["a", 0, 1.5], ["b", 1, ""]])
    table = read(path)
    assert (table.numbers["seconds"].itemsize, table.numbers["seconds"][0]) == (8, 1.5)
    assert isnan(table.numbers["seconds"][1])
    assert table.row(1).numbers == {"index": 1, "seconds": None}


def test_records_are_made_when_they_are_asked_for(tmp_path):
    made = []
    path = write(tmp_path / "t.csv", [["id", "index"], ["a", 0], ["b", 1], ["c", 2]])
    records = TableRecords(read(path), lambda row: made.append(row.texts["id"]) or row.texts["id"])
    assert (len(records), made) == (3, [])
    assert (records[-1], records[:2], made) == ("c", ["a", "b"], ["c", "a", "b"])
    assert list(records) == ["a", "b", "c"]


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "t.csv").write_text("id,index\na,0\n\n")
    assert read(tmp_path / "t.csv").num_rows == 1


def test_an_incomplete_row_is_an_error_unless_it_is_skipped(tmp_path):
    (tmp_path / "t.csv").write_text("id,index\na,0\nb")
    with pytest.raises(RunError, match=r"t\.csv is damaged: row 2 has 1 cells, expected 2; resume it"):
        read(tmp_path / "t.csv")
    assert read(tmp_path / "t.csv", skip_incomplete=True).num_rows == 1


def test_an_unreadable_table_is_named(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"id,index\n\xff,0\n")
    with pytest.raises(RunError, match=r"t\.csv cannot be read \(.*\); resume it"):
        read(tmp_path / "t.csv")
