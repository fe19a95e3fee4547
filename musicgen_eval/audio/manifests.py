"""Manifests: csv, jsonl, jsonl.gz and parquet tables of `path` and, optionally, `id`, `text`, `start_s`, `end_s`.

audiocraft's manifests (jsonl with `path`, `duration`, `sample_rate`) are known by their keys; a track's text is then
the `description` of the json file beside it. Every error names the row. Nothing here opens audio.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from musicgen_eval.errors import SourceError

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".jsonl.gz", ".parquet")
COLUMNS = ("path", "id", "text", "start_s", "end_s")
AUDIOCRAFT_KEYS = frozenset({"path", "duration", "sample_rate"})
INSTALL_PARQUET = "pip install 'musicgen-eval[parquet]'"
# Names by which others call our columns: a column that is passed over for its name changes what is measured.
_MEANT = {
    "file": "path", "filename": "path", "file_name": "path", "file_path": "path", "filepath": "path", "audio": "path",
    "audio_path": "path", "audio_file": "path", "wav": "path", "caption": "text", "prompt": "text", "description":
    "text", "start": "start_s", "start_time": "start_s", "begin": "start_s", "offset": "start_s", "offset_s": "start_s",
    "onset": "start_s", "end": "end_s", "end_time": "end_s", "stop": "end_s", "offset_end": "end_s",
}  # fmt: skip
_DURATIONS = ("duration", "duration_s", "length", "length_s", "dur")


class ManifestRow(NamedTuple):
    """One row. `end_s` NaN: to the end of the file."""

    path: str
    id: str | None
    text: str | None
    start_s: float
    end_s: float


def is_manifest(path: Path) -> bool:
    """Whether a file's name says that it is a manifest."""
    return path.name.lower().endswith(MANIFEST_SUFFIXES)


def read_manifest(path: Path) -> Iterator[ManifestRow]:
    """The rows of a manifest, in order.

    Raises:
        SourceError: not readable as what its name says, a missing column, a column that is nearly one of ours, or a bad
            row.
    """
    name = path.name.lower()
    checked: set[frozenset[str]] = set()
    read_rows = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix.lower(), _json_rows)
    try:
        for where, row in read_rows(path):
            keys = frozenset(row)
            if keys not in checked:
                _check_columns(f"{path}: {where}" if name.endswith((".jsonl", ".gz")) else str(path), keys)
                checked.add(keys)
            yield _parse_row(path, where, row)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_columns(where: str, columns: frozenset[str]) -> None:
    missing = [column for column in COLUMNS if column not in columns]
    for column in sorted(columns - set(COLUMNS)):
        plain = column.strip().lower().replace(" ", "_")
        meant = plain if plain in COLUMNS else _MEANT.get(plain)
        if meant is None:
            # An id that is missed is a path instead, which harms nobody; so near names of it (idx, uid) may stand.
            meant = next(iter(get_close_matches(plain, [name for name in COLUMNS if name != "id"], 1, 0.8)), None)
        if meant in missing:
            raise SourceError(f"{where}: column {column!r} would be ignored; did you mean {meant!r}?")
        if "start_s" in columns and "end_s" in missing and plain in _DURATIONS:
            raise SourceError(f"{where}: column {column!r} beside 'start_s' would be ignored; give 'end_s' instead")
    if "path" in missing:
        raise SourceError(f"{where}: no column 'path'; columns: {', '.join(sorted(columns)) or 'none'}")


def _parse_row(path: Path, where: str, row: Mapping[str, Any]) -> ManifestRow:
    def fail(reason: str) -> SourceError:
        return SourceError(f"{path}: {where}: {reason}")

    file = row.get("path")
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        raise fail(f"path must be a file's name, got {file!r}")
    if "://" in file:
        raise fail(f"path must be a local file, got {file!r}")
    id = row.get("id")
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    if id is not None and not isinstance(id, str):
        raise fail(f"id must be text, got {id!r}")
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise fail(f"text must be text, got {text!r}")
    start_s, end_s = _seconds(row.get("start_s")), _seconds(row.get("end_s"))
    for name, value in (("start_s", start_s), ("end_s", end_s)):
        if isinstance(value, str) or (value is not None and not 0 <= value < math.inf):
            raise fail(f"{name} must be a number of seconds from 0, got {row[name]!r}")
    if text is None and row.keys() >= AUDIOCRAFT_KEYS:
        text = _side_car_text(path, where, file)
    begin = float(start_s or 0.0)
    if end_s is not None and not end_s > begin:  # type: ignore[operator]
        raise fail(f"end_s ({end_s:g}) must lie after start_s ({begin:g})")
    return ManifestRow(
        file, id or None, (text or "").strip() or None, begin, math.nan if end_s is None else float(end_s)
    )


def _seconds(value: Any) -> float | str | None:
    """A number; None where none is given; text where it is not a number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return repr(value)
    try:
        return value if isinstance(value, str) and "_" in value else float(value)
    except (ValueError, OverflowError):
        return str(value)


def _side_car_text(manifest: Path, where: str, file: str) -> str | None:
    """The description in the json file beside an audio file. Source: audiocraft 1.3.0, data/music_dataset.py."""
    side_car = (manifest.parent / file).with_suffix(".json")
    try:
        described = json.loads(side_car.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SourceError(f"{manifest}: {where}: {side_car} cannot be read: {error}") from error
    text = described.get("description") if isinstance(described, dict) else None
    return text.strip() or None if isinstance(text, str) and text != "None" else None


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        number = 0
        try:
            header = next(reader, None)
            if header is None:
                raise SourceError(f"{path}: empty")
            if len(set(header)) < len(header):
                raise SourceError(f"{path}: two columns are called {max(header, key=header.count)!r}")
            if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
                raise SourceError(f"{path}: columns must be separated by commas, the header is {header[0]!r}")
            _check_columns(str(path), frozenset(header))
            for fields in reader:
                if not fields:
                    continue
                number += 1
                where = f"row {number} (line {reader.line_num})"
                if len(fields) != len(header):
                    raise SourceError(f"{path}: {where}: {len(fields)} fields, the header has {len(header)}")
                yield where, dict(zip(header, fields, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: row {number + 1}: not a csv file in UTF-8: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    compressed = path.name.lower().endswith(".gz")
    lines: Iterable[bytes]
    with gzip.open(path) if compressed else path.open("rb") as lines:
        number = 0
        try:
            for line_number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                number += 1
                where = f"row {number} (line {line_number})"
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except ValueError as error:
                    raise SourceError(f"{path}: {where}: not a json object: {error}") from error
                if not isinstance(row, dict):
                    raise SourceError(f"{path}: {where}: expected a json object, got {str(row)[:40]!r}")
                yield where, row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SourceError(f"{path}: row {number + 1}: damaged gzip file: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SourceError(f"{path}: a parquet manifest needs pyarrow: {INSTALL_PARQUET}") from error
    try:
        with parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            _check_columns(str(path), frozenset(columns))
            number = 0
            for batch in table.iter_batches(batch_size=8192, columns=[name for name in COLUMNS if name in columns]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise SourceError(f"{path}: not a parquet file: {error}") from error
