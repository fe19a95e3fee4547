"""Reads the tables of a run folder (tracks.csv, windows.csv, continuations.csv) into columns.

Each text column is stored as a list of strings, and each number column as an array, so that tables with a hundred thousand rows
fit in memory. Records are created on access. Unknown columns are ignored. Optional columns may be missing from the file.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np

from musicgen_eval.errors import RunError

Record = TypeVar("Record")
Metrics = dict[str, dict[str, float | None]]
"""Numbers in the form `{metric: {key: number}}`. None means an empty cell."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        texts: Mapping from column name to the content of the cell. Columns that are missing from the table are left out.
        numbers: Mapping from column name to number. None means an empty cell. Columns that are missing from the table are left out.
        metrics: Metric values, in the form `{metric: {key: number}}`. None means an empty cell.
    """

    texts: Mapping[str, str]
    numbers: Mapping[str, float | None]
    metrics: Metrics


@dataclass
class Table:
    """The columns of a table.

    Attributes:
        num_rows: Number of rows.
        texts: Mapping from column name to cells.
        numbers: Mapping from column name to float64 numbers. NaN means an empty cell.
        metrics: Mapping from (metric name, key) to float64 numbers. NaN means an empty cell.
    """

    num_rows: int = 0
    texts: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, array[float]] = field(default_factory=dict)
    metrics: dict[tuple[str, str], array[float]] = field(default_factory=dict)

    def row(self, number: int) -> Row:
        """Returns the row with the given number, counted from 0."""
        metrics: Metrics = {}
        for (name, key), column in self.metrics.items():
            metrics.setdefault(name, {})[key] = _given(column[number])
        return Row(
            texts={name: column[number] for name, column in self.texts.items()},
            numbers={name: _given(column[number]) for name, column in self.numbers.items()},
            metrics=metrics,
        )


class TableRecords(Sequence[Record], Generic[Record]):
    """A sequence that contains one record per row of a table. Each record is created on access.

    Args:
        table: The table, stored as columns.
        make: Function that creates a record from a row.
    """

    def __init__(self, table: Table, make: Callable[[Row], Record]) -> None:
        self._table = table
        self._make = make

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, row: int) -> Record: ...

    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...

    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self._make(self._table.row(number)) for number in range(*row.indices(len(self)))]
        return self._make(self._table.row(range(len(self))[row]))

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self[:3]))}{', ...' * (len(self) > 3)}]"


def read_table(
    path: Path,
    *,
    required: Sequence[str],
    texts: Sequence[str],
    numbers: Sequence[str],
    metrics: Sequence[tuple[str, str]] = (),
    skip_incomplete: bool = False,
    remedy: str,
) -> Table:
    """Reads a table from a CSV file.

    Args:
        path: CSV file with a header.
        required: Columns that the file must have.
        texts: Columns to read as strings.
        numbers: Columns to read as numbers.
        metrics: Metric columns to read, as (metric name, key) pairs. A metric column has the heading `<name>/<key>`.
        skip_incomplete: Whether to skip rows with too few or too many cells, such as a last row left incomplete by a killed
            process.
        remedy: Advice to add to the error message if the table is missing or damaged.

    Raises:
        RunError: The file is missing, unreadable or damaged.
    """
    table = Table()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            heading = next(rows, [])
            missing = [name for name in required if name not in heading]
            if missing:
                raise RunError(f"{path} is damaged: column {missing[0]!r} is missing; {remedy}")
            place = {name: number for number, name in enumerate(heading)}
            table.texts = {name: [] for name in texts if name in place}
            table.numbers = {name: array("d") for name in numbers if name in place}
            table.metrics = {key: array("d") for key in metrics if "/".join(key) in place}
            columns = table.numbers | {"/".join(key): column for key, column in table.metrics.items()}
            text_places = [(place[name], column) for name, column in table.texts.items()]
            number_places = [(place[name], column) for name, column in columns.items()]
            for cells in _whole_rows(rows, len(heading), path, skip_incomplete=skip_incomplete, remedy=remedy):
                for at, text_column in text_places:
                    text_column.append(cells[at])
                try:
                    for at, column in number_places:
                        column.append(float(cells[at]) if cells[at] else nan)
                except ValueError:
                    raise _no_number(path, table.num_rows, heading[at], repr(cells[at]), remedy) from None
                table.num_rows += 1
        for name, column in columns.items():
            values = np.frombuffer(column)
            wrong = np.flatnonzero(~np.isfinite(values) if name in required else np.isinf(values))
            if len(wrong):
                found = "nothing" if isnan(values[wrong[0]]) else repr(float(values[wrong[0]]))
                raise _no_number(path, int(wrong[0]), name, found, remedy)
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist; {remedy}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error}); {remedy}") from error
    return table


def _whole_rows(
    rows: Iterator[list[str]], num_cells: int, path: Path, *, skip_incomplete: bool, remedy: str
) -> Iterator[list[str]]:
    for number, cells in enumerate(rows, start=1):
        if len(cells) == num_cells:
            yield cells
        elif cells and not skip_incomplete:
            raise RunError(f"{path} is damaged: row {number} has {len(cells)} cells, expected {num_cells}; {remedy}")


def _no_number(path: Path, row: int, column: str, found: str, remedy: str) -> RunError:
    return RunError(f"{path} is damaged: row {row + 1}, column {column} contains {found}, expected a number; {remedy}")


def _given(number: float) -> float | None:
    return None if isnan(number) else number
