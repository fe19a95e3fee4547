"""Reads csv, jsonl and parquet tables in batches of rows.

The position of each row is available for error messages. `manifest.py` interprets the columns.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from musicgen_eval.errors import SourceError

CheckColumns = Callable[[str, frozenset[str]], None]
Row = TypeVar("Row")
ROWS_AT_ONCE = 1024
SEPARATORS = (",", ";", "\t")
MAX_HEADER_LINES = 100
INSTALL_PARQUET = "pip install 'musicgen-eval[parquet]'"


@dataclass
class Oddities:
    """Counters of the ignored rows and values of a manifest.

    Attributes:
        num_empty_rows: Number of rows that contain only separators.
        num_unnamed_cells: Number of rows that contain a value in a column without a name. The first column is not considered,
            because it may contain row numbers.
        num_missing_words: Number of cells in the column `text` that denote a missing value, such as `nan`.
    """

    num_empty_rows: int = 0
    num_unnamed_cells: int = 0
    num_missing_words: int = 0


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of a table.

    Attributes:
        first_number: Number of the first row, counted from 1.
        lines: Number of the last line of each row. None means that the format has no lines.
        columns: Mapping from column name to (rows,) cells. None means that each row has its own keys and is stored in `rows`.
        rows: Rows as dictionaries. Empty if `columns` is not None.
    """

    first_number: int
    lines: Sequence[int] | None
    columns: Mapping[str, Sequence[Any]] | None
    rows: Sequence[Mapping[str, Any]] = ()

    def __len__(self) -> int:
        return len(self.rows) if self.columns is None else len(next(iter(self.columns.values()), ()))

    def where(self, at: int) -> str:
        """Returns a description of a row's position in the file, for error messages."""
        number = f"row {self.first_number + at}"
        return number if self.lines is None else f"{number} (line {self.lines[at]})"

    def row(self, at: int) -> Mapping[str, Any]:
        """Returns one row as a mapping from column name to cell."""
        return self.rows[at] if self.columns is None else {name: cells[at] for name, cells in self.columns.items()}

    def has_row_with(self, names: frozenset[str]) -> bool:
        """Returns whether at least one row has all of the given columns."""
        if self.columns is not None:
            return self.columns.keys() >= names
        return any(row.keys() >= names for row in self.rows)

    def column(self, name: str) -> Sequence[Any] | None:
        """Returns the cells of a column, or None if the column is missing or all of its cells are None."""
        if self.columns is not None:
            return self.columns.get(name)
        cells = [row.get(name) for row in self.rows]
        return None if cells.count(None) == len(cells) else cells


def read_row_batches(
    path: Path, wanted: Sequence[str], check_columns: CheckColumns, oddities: Oddities
) -> Iterator[RowBatch]:
    """Yields the rows of a manifest in order, in batches.

    If a row is damaged, all rows before it are yielded before the error is raised.

    Args:
        path: Path of a file with the extension .csv, .jsonl, .jsonl.gz or .parquet.
        wanted: Names of the columns to read from a parquet file. For other formats, all columns are read.
        check_columns: Function that takes the position in the file and the names of the columns, and raises `SourceError` if the
            names are invalid.
        oddities: Counters of skipped rows and values, which this function increments.

    Raises:
        SourceError: The file cannot be read, is damaged, or does not have the format that its extension indicates.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_row_batches(path, wanted, check_columns)
        elif path.suffix.lower() == ".csv":
            yield from _csv_row_batches(path, check_columns, oddities)
        else:
            for first_number, lines, rows in _batched(_json_rows(path, check_columns)):
                yield RowBatch(first_number, lines, None, rows)
    except OSError as error:
        raise SourceError(f"{path}: cannot read the file: {error.strerror or error}") from error


def _batched(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, list[int], list[Row]]]:
    """Groups rows into batches.

    Yields:
        For each batch, the number of its first row, its line numbers and its rows.
    """
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


def _csv_row_batches(path: Path, check_columns: CheckColumns, oddities: Oddities) -> Iterator[RowBatch]:
    with path.open(newline="", encoding=_encoding(path)) as file:
        try:
            header = _read_header(file)
        except (csv.Error, UnicodeError) as error:
            raise _no_csv(path, 1, error) from error
        _check_header(path, header.names)
        check_columns(str(path), frozenset(filter(None, header.names)))
        reader = csv.reader(file, strict=True, delimiter=header.separator)
        for first_number, lines, rows in _batched(_csv_rows(path, reader, header, oddities)):
            columns = dict(zip(header.names, zip(*rows, strict=True), strict=True))
            columns.pop("", None)
            yield RowBatch(first_number, lines, columns)


def _encoding(path: Path) -> str:
    """Returns the encoding of a text file: UTF-16 if the file begins with a UTF-16 byte order mark, or UTF-8 otherwise.

    Excel writes "Unicode Text" files in UTF-16.
    """
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


class _Header(NamedTuple):
    """Header of a csv file: the separator, the column names, and the number of lines before the first row."""

    separator: str
    names: list[str]
    num_lines: int


def _read_header(file: TextIO) -> _Header:
    """Reads the header of a csv file and detects the separator.

    Excel's separator depends on the locale. A first line such as `sep=;` can declare the separator.
    """
    lines = [file.readline()]
    declared = re.fullmatch(r"sep=(.)\s*", lines[0])
    if declared:
        lines.append(file.readline())
    first = lines[-1]
    while first.count('"') % 2 and len(lines) < MAX_HEADER_LINES:  # a name may contain a line break
        lines.append(file.readline())
        first += lines[-1]
    separators = (declared[1],) if declared else SEPARATORS
    separator = max(separators, key=lambda one: _columns_found(first, one))
    return _Header(
        separator, next(csv.reader(io.StringIO(first, newline=""), strict=True, delimiter=separator), []), len(lines)
    )


def _columns_found(header: str, separator: str) -> tuple[bool, int]:
    """Splits a csv header at a separator. Returns whether there is a column `path`, and the number of columns."""
    try:
        names = next(csv.reader(io.StringIO(header, newline=""), strict=True, delimiter=separator), [])
    except csv.Error:
        return False, 0
    return "path" in names, len(names)


def _csv_rows(path: Path, reader: Any, header: _Header, oddities: Oddities) -> Iterator[tuple[int, list[str]]]:
    number, num_columns = 0, len(header.names)
    unnamed = [at for at, name in enumerate(header.names) if not name and at > 0]
    num_needed = 1 + max(at for at, name in enumerate(header.names) if name)
    try:
        for fields in reader:
            if not any(map(str.strip, fields)):
                oddities.num_empty_rows += bool(fields)
                continue
            number += 1
            line = header.num_lines + reader.line_num
            if len(fields) != num_columns:
                if len(fields) < num_needed or any(fields[num_columns:]):
                    where = f"row {number} (line {line})"
                    raise SourceError(
                        f"{path}: {where}: expected {num_columns} fields as in the header, got {len(fields)}"
                    )
                fields = (fields + [""] * num_columns)[:num_columns]
            if unnamed and any(fields[at] for at in unnamed):
                oddities.num_unnamed_cells += 1
            yield line, fields
    except (csv.Error, UnicodeError) as error:
        raise _no_csv(path, number + 1, error) from error


def _no_csv(path: Path, number: int, error: Exception) -> SourceError:
    return SourceError(
        f"{path}: row {number}: the file is not a CSV file in UTF-8: {error}; in Excel, save it as `CSV UTF-8`"
    )


def _check_header(path: Path, header: list[str]) -> None:
    named = [name for name in header if name]
    if not named:
        raise SourceError(f"{path}: the file has no header; the first line must name the columns")
    if len(set(named)) < len(named):
        raise SourceError(f"{path}: two columns are named {max(named, key=named.count)!r}")


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
            raise SourceError(f"{path}: row {number + 1}: the gzip file is damaged: {error}") from error


def _json_row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: the line is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise SourceError(f"{where}: expected a JSON object, got {str(row)[:40]!r}")
    return row


def _parquet_row_batches(path: Path, wanted: Sequence[str], check_columns: CheckColumns) -> Iterator[RowBatch]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SourceError(f"{path}: a Parquet manifest requires pyarrow; install it with {INSTALL_PARQUET}") from error
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
            columns = table.schema_arrow.names
            if len(set(columns)) < len(columns):
                raise SourceError(f"{path}: two columns are named {max(columns, key=columns.count)!r}")
            check_columns(str(path), frozenset(columns))
            number = 1
            found = [name for name in wanted if name in columns]
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=found):
                yield RowBatch(number, None, {name: batch.column(name).to_pylist() for name in found})
                number += batch.num_rows
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: the file is not a valid Parquet file: {error}") from error
