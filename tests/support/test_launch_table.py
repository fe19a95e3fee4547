"""Tests of the figures and the format of the table of waits and launches."""

from collections import Counter
from pathlib import Path

import pytest

from tests.support.launch_table import BEGIN, END, Row, markdown, per_step, with_table


def row(waits: float, launches: float, places: dict | None = None) -> Row:
    return Row("a continuation", "32-true", waits, 0, launches, 0, Counter(places or {}))


def test_a_step_is_the_difference_between_two_lengths():
    long = row(14, 1030, {("item", "loop"): 10, ("h2d", "once"): 4})
    short = row(9, 530, {("item", "loop"): 5, ("h2d", "once"): 4})
    step = per_step(long, short, 5, "a step")
    assert (step.work, step.num_waits, step.num_launches) == ("a step", 1, 100)
    assert step.places == {("item", "loop"): 5}


def test_a_row_is_formatted_as_a_line_of_the_table():
    assert markdown([row(1.5, 300)]).splitlines()[-1] == "| a continuation | 32-true | 1.5 | 0 | 300 | 0 |"


def test_the_table_is_inserted_between_the_markers_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "accelerator.md").read_text()
    changed = with_table(page, "the table")
    assert f"{BEGIN}\nthe table\n{END}" in changed
    assert changed.partition(BEGIN)[0] == page.partition(BEGIN)[0]
    assert changed.partition(END)[2] == page.partition(END)[2]
    with pytest.raises(ValueError, match="has no lines"):
        with_table("no marks", "the table")
