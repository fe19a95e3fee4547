"""Manifests as tables: csv, jsonl and parquet, cut into pieces of many rows, each with the place where every row stands.

What the columns mean is `manifests.py`'s business; this file knows how the three are written, and what breaks in them.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from musicgen_eval.errors import SourceError

CheckColumns = Callable[[str, frozenset[str]], None]
Row = TypeVar("Row")
ROWS_AT_ONCE = 1024
INSTALL_PARQUET = "pip install 'musicgen-eval[parquet]'"


@dataclass(frozen=True)
class Piece:
    """Some rows of a table, one after the other.

    Attributes:
        first_number: of the first row, counted from 1.
        lines: in which line of the file each row ends; None where there are no lines.
        columns: name -> (rows,) cells; None: every row has keys of its own, which `rows` holds.
        rows: the rows as they came, where `columns` is None.
    """

    first_number: int
    lines: Sequence[int] | None
    columns: Mapping[str, Sequence[Any]] | None
    rows: Sequence[Mapping[str, Any]] = ()

    def __len__(self) -> int:
        return len(self.rows) if self.columns is None else len(next(iter(self.columns.values()), ()))

    def where(self, at: int) -> str:
        """Where a row stands, for a reader of the file."""
        number = f"row {self.first_number + at}"
        return number if self.lines is None else f"{number} (line {self.lines[at]})"

    def row(self, at: int) -> Mapping[str, Any]:
        """One row, with all of its cells."""
        return self.rows[at] if self.columns is None else {name: cells[at] for name, cells in self.columns.items()}

    def has_row_with(self, names: frozenset[str]) -> bool:
        """Whether some row has all of these columns."""
        if self.columns is not None:
            return self.columns.keys() >= names
        return any(row.keys() >= names for row in self.rows)

    def cells(self, name: str) -> Sequence[Any] | None:
        """A column; None where no row has it."""
        if self.columns is not None:
            return self.columns.get(name)
        cells = [row.get(name) for row in self.rows]
        return None if cells.count(None) == len(cells) else cells


def read_pieces(path: Path, wanted: Sequence[str], check_columns: CheckColumns) -> Iterator[Piece]:
    """The rows of a manifest, in order, many at a time; the rows before a damaged one come before its error.

    Args:
        path: ends in .csv, .jsonl, .jsonl.gz or .parquet.
        wanted: the columns that are read where a format can leave the others out.
        check_columns: (where, names) -> raises where the columns cannot be meant.

    Raises:
        SourceError: not what its name says, or damaged.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_pieces(path, wanted, check_columns)
        elif path.suffix.lower() == ".csv":
            yield from _csv_pieces(path, check_columns)
        else:
            for first_number, lines, rows in _batched(_json_rows(path, check_columns)):
                yield Piece(first_number, lines, None, rows)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def _batched(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, list[int], list[Row]]]:
    """(number of the first, lines, rows) of many rows at a time."""
    number, lines, batch = 1, list[int](), list[Row]()
    try:
        for line, row in rows:
            lines.append(line)
            batch.append(row)
            if len(batch) == ROWS_AT_ONCE:
                yield number, lines, batch
                number, lines, batch = number + len(batch), [], []
    except SourceError:
        if batch:
            yield number, lines, batch
        raise
    if batch:
        yield number, lines, batch


def _csv_pieces(path: Path, check_columns: CheckColumns) -> Iterator[Piece]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: row 1: not a csv file in UTF-8: {error}") from error
        _check_header(path, header)
        check_columns(str(path), frozenset(header))
        for first_number, lines, rows in _batched(_csv_rows(path, reader, len(header))):
            yield Piece(first_number, lines, dict(zip(header, zip(*rows, strict=True), strict=True)))


def _csv_rows(path: Path, reader: Any, num_columns: int) -> Iterator[tuple[int, list[str]]]:
    number = 0
    try:
        for fields in reader:
            if not fields:
                continue
            number += 1
            if len(fields) != num_columns:
                where = f"row {number} (line {reader.line_num})"
                raise SourceError(f"{path}: {where}: {len(fields)} fields, the header has {num_columns}")
            yield reader.line_num, fields
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: row {number + 1}: not a csv file in UTF-8: {error}") from error


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise SourceError(f"{path}: empty")
    if len(set(header)) < len(header):
        raise SourceError(f"{path}: two columns are called {max(header, key=header.count)!r}")
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise SourceError(f"{path}: columns must be separated by commas, the header is {header[0]!r}")


def _json_rows(path: Path, check_columns: CheckColumns) -> Iterator[tuple[int, dict[str, Any]]]:
    compressed = path.name.lower().endswith(".gz")
    checked: set[frozenset[str]] = set()
    number = 0
    lines: Iterable[bytes]
    with gzip.open(path) if compressed else path.open("rb") as lines:
        try:
            for line_number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                number += 1
                where = f"{path}: row {number} (line {line_number})"
                row = _json_row(where, line)
                keys = frozenset(row)
                if keys not in checked:
                    check_columns(where, keys)
                    checked.add(keys)
                yield line_number, row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SourceError(f"{path}: row {number + 1}: damaged gzip file: {error}") from error


def _json_row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not a json object: {error}") from error
    if not isinstance(row, dict):
        raise SourceError(f"{where}: expected a json object, got {str(row)[:40]!r}")
    return row


def _parquet_pieces(path: Path, wanted: Sequence[str], check_columns: CheckColumns) -> Iterator[Piece]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SourceError(f"{path}: a parquet manifest needs pyarrow: {INSTALL_PARQUET}") from error
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
            columns = table.schema_arrow.names
            if len(set(columns)) < len(columns):
                raise SourceError(f"{path}: two columns are called {max(columns, key=columns.count)!r}")
            check_columns(str(path), frozenset(columns))
            number = 1
            found = [name for name in wanted if name in columns]
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=found):
                yield Piece(number, None, {name: batch.column(name).to_pylist() for name in found})
                number += batch.num_rows
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: not a parquet file: {error}") from error
