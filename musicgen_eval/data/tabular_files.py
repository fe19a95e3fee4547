"""Manifests as tables: csv, jsonl and parquet, cut into pieces of many rows, each with the place where every row stands.

What the columns mean is `manifests.py`'s business; this file knows how the three are written, and what breaks in them.
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
    """Parts of a manifest that were skipped.

    Attributes:
        num_empty_rows: rows of nothing but separators.
        num_unnamed_cells: rows with something in a column without a name, other than the first, which may number the rows.
        num_missing_words: texts such as `nan`, which say that there is no text.
    """

    num_empty_rows: int = 0
    num_unnamed_cells: int = 0
    num_missing_words: int = 0


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


def read_pieces(path: Path, wanted: Sequence[str], check_columns: CheckColumns, oddities: Oddities) -> Iterator[Piece]:
    """The rows of a manifest, in order, many at a time; the rows before a damaged one come before its error.

    Args:
        path: ends in .csv, .jsonl, .jsonl.gz or .parquet.
        wanted: the columns that are read where a format can leave the others out.
        check_columns: (where, names) -> raises where the columns cannot be meant.
        oddities: counts what is passed over.

    Raises:
        SourceError: not what its name says, or damaged.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_pieces(path, wanted, check_columns)
        elif path.suffix.lower() == ".csv":
            yield from _csv_pieces(path, check_columns, oddities)
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


def _csv_pieces(path: Path, check_columns: CheckColumns, oddities: Oddities) -> Iterator[Piece]:
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
            yield Piece(first_number, lines, columns)


def _encoding(path: Path) -> str:
    """UTF-8, or UTF-16 where the file begins with its mark, as Excel's "Unicode text" does."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


class _Header(NamedTuple):
    """The beginning of a csv file: its separator, its column names, and the number of lines before the rows."""

    separator: str
    names: list[str]
    num_lines: int


def _read_header(file: TextIO) -> _Header:
    """Excel separates columns by what the system's language takes for lists, and may say so in a line `sep=;`."""
    lines = [file.readline()]
    declared = re.fullmatch(r"sep=(.)\s*", lines[0])
    if declared:
        lines.append(file.readline())
    first = lines[-1]
    while first.count('"') % 2 and len(lines) < MAX_HEADER_LINES:  # a name may hold a line break
        lines.append(file.readline())
        first += lines[-1]
    separators = (declared[1],) if declared else SEPARATORS
    separator = max(separators, key=lambda one: _columns_found(first, one))
    return _Header(
        separator, next(csv.reader(io.StringIO(first, newline=""), strict=True, delimiter=separator), []), len(lines)
    )


def _columns_found(header: str, separator: str) -> tuple[bool, int]:
    """Returns whether a separator yields a column `path`, and the number of columns."""
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
                    raise SourceError(f"{path}: {where}: {len(fields)} fields, the header has {num_columns}")
                fields = (fields + [""] * num_columns)[:num_columns]
            if unnamed and any(fields[at] for at in unnamed):
                oddities.num_unnamed_cells += 1
            yield line, fields
    except (csv.Error, UnicodeError) as error:
        raise _no_csv(path, number + 1, error) from error


def _no_csv(path: Path, number: int, error: Exception) -> SourceError:
    return SourceError(f"{path}: row {number}: not a csv file in UTF-8: {error}; in Excel save it as `CSV UTF-8`")


def _check_header(path: Path, header: list[str]) -> None:
    named = [name for name in header if name]
    if not named:
        raise SourceError(f"{path}: empty")
    if len(set(named)) < len(named):
        raise SourceError(f"{path}: two columns are called {max(named, key=named.count)!r}")


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
