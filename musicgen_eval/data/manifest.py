"""Reads manifests, which are csv, jsonl, jsonl.gz or parquet tables that list tracks.

The column `path` is required. The columns `id`, `text`, `start_s`, `end_s` and `duration_s` are optional. `duration_s` is the
length of the whole file, even if the row refers to an excerpt. A file whose duration is declared is not opened until it is first
read.

An audiocraft manifest is a jsonl file with the keys `path`, `duration` and `sample_rate`. The text of a track in such a manifest is
the `description` in the json file next to the audio file. `duration` is ignored, because it is computed by ffmpeg and includes the
padding of mp3 and m4a files.

If the text or a time in a row is one of `MISSING_WORDS`, such as `nan` or `None`, the value is treated as missing. Programs such as
pandas and Excel write missing values in this way. Every error message names the row. Audio files are not opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.audio.reader import END_TOLERANCE_S
from musicgen_eval.data.tabular_files import Oddities, RowBatch, read_row_batches
from musicgen_eval.errors import SourceError
from musicgen_eval.files.file_names import expanded, locate, of_file_address

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".jsonl.gz", ".parquet")
COLUMNS = ("path", "id", "text", "start_s", "end_s", "duration_s")
SECONDS = ("start_s", "end_s", "duration_s")
MAX_DURATION_S = 1e6  # eleven days; a larger value is probably not in seconds
MISSING_WORDS = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN",
    "None", "n/a", "nan", "null",
})  # fmt: skip
"""Words that denote a missing value in every manifest format. They are the words that pandas reads as missing values."""
AUDIOCRAFT_KEYS = frozenset({"path", "duration", "sample_rate"})
# Names that other datasets use for these columns. A column with such a name must not be ignored, because it affects the results.
_SYNONYMS = {
    "file": "path", "filename": "path", "file_name": "path", "file_path": "path", "filepath": "path", "audio": "path",
    "audio_path": "path", "audio_file": "path", "wav": "path", "caption": "text", "prompt": "text", "description":
    "text", "start": "start_s", "start_time": "start_s", "begin": "start_s", "offset": "start_s", "offset_s": "start_s",
    "onset": "start_s", "end": "end_s", "end_time": "end_s", "stop": "end_s", "offset_end": "end_s",
}  # fmt: skip
_DURATIONS = ("duration", "length", "length_s", "dur")


class ManifestRows(NamedTuple):
    """Consecutive rows of a manifest, stored as columns of equal length.

    Attributes:
        paths: Paths of the files, as written in the manifest.
        ids: Ids of the tracks. The id of a track is None if the row has no id.
        texts: Texts of the tracks. The text of a track is None if the row has no text.
        start_s: (rows,) float64, time in the file at which each track starts.
        end_s: (rows,) float64, time in the file at which each track ends. NaN means the end of the file.
        file_duration_s: (rows,) float64, declared duration of each file. NaN means that the duration is not declared.
    """

    paths: Sequence[str]
    ids: Sequence[str | None]
    texts: Sequence[str | None]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    file_duration_s: NDArray[np.float64]


def is_manifest(path: Path) -> bool:
    """Returns whether a file name has the extension of a manifest."""
    return path.name.lower().endswith(MANIFEST_SUFFIXES)


def read_manifest(path: Path, oddities: Oddities) -> Iterator[ManifestRows]:
    """Reads a manifest and yields its rows in order, in batches.

    Args:
        path: Path of the manifest.
        oddities: Counters of skipped rows and values, which this function increments.

    Raises:
        SourceError: The file cannot be read, the column `path` is missing, a row is invalid, or the name of an unknown column is
            similar to one of `COLUMNS`.
    """
    for batch in read_row_batches(path, COLUMNS, _check_columns, oddities):
        rows = _plain_rows(batch) or _odd_rows(path, batch)
        if None in rows.texts:
            oddities.num_missing_words += _num_missing_words(batch)
        yield rows


def _plain_rows(batch: RowBatch) -> ManifestRows | None:
    """Parses all rows of a batch at once. Returns None if any row must be parsed individually."""
    num_rows = len(batch)
    paths, ids, texts = batch.column("path"), batch.column("id"), batch.column("text")
    if paths is None or (num_rows and batch.has_row_with(AUDIOCRAFT_KEYS)):
        return None
    for cells in (paths, ids, texts):
        if cells is not None and not set(map(type, cells)) <= {str, type(None)}:
            return None
    if None in paths or not all(map(str.strip, paths)):
        return None
    named = "\n".join(paths)
    if "\0" in named or "://" in named:
        return None
    if not (_is_file_name(named) and _is_unicode(filter(None, ids or ())) and _is_unicode(filter(None, texts or ()))):
        return None
    start_s, end_s, file_duration_s = (_plain_seconds(batch.column(name), num_rows) for name in SECONDS)
    if start_s is None or end_s is None or file_duration_s is None:
        return None
    begin_s = np.nan_to_num(start_s, nan=0.0)
    wrong = (end_s <= begin_s) | (file_duration_s <= begin_s) | (end_s > file_duration_s + END_TOLERANCE_S)
    if (wrong | (file_duration_s > MAX_DURATION_S)).any():
        return None
    missing = (None,) * num_rows
    own_ids = missing if ids is None else [id or None for id in ids]
    own_texts = missing if texts is None else [_own_text(text) if text else None for text in texts]
    return ManifestRows(paths, own_ids, own_texts, begin_s, end_s, file_duration_s)


def _plain_seconds(cells: Sequence[Any] | None, num_rows: int) -> NDArray[np.float64] | None:
    """Parses a column of times in seconds.

    Returns:
        (rows,) float64, NaN for empty cells. None if any cell must be parsed individually.
    """
    if cells is None:
        return np.full(num_rows, np.nan)
    kinds = set(map(type, cells))
    try:
        if kinds <= {int, float, type(None)}:
            values = np.array([math.nan if cell is None else float(cell) for cell in cells])
            num_missing = sum(cell is None for cell in cells)
        elif kinds == {str} and "_" not in "".join(cells):
            values = np.array([float(cell) if cell else math.nan for cell in cells])
            num_missing = cells.count("")
        else:
            return None
    except (ValueError, OverflowError):
        return None
    given = values[~np.isnan(values)]
    is_plain = len(given) == num_rows - num_missing and bool(((given >= 0) & (given < math.inf)).all())
    return values if is_plain else None


def _own_text(text: str) -> str | None:
    """Strips leading and trailing whitespace from the text of a track. Returns None if the text is empty or in `MISSING_WORDS`."""
    stripped = text.strip()
    return None if stripped in MISSING_WORDS else stripped


def _num_missing_words(batch: RowBatch) -> int:
    texts = batch.column("text") or ()
    words = (text.strip() for text in texts if isinstance(text, str))
    return sum(word in MISSING_WORDS for word in words if word)


def _odd_rows(path: Path, batch: RowBatch) -> ManifestRows:
    """Parses the rows of a batch one by one.

    Raises:
        SourceError: A row is invalid.
    """
    rows = [_parse_row(path, batch.where(at), batch.row(at)) for at in range(len(batch))]
    paths, ids, texts, start_s, end_s, file_duration_s = zip(*rows, strict=True)
    return ManifestRows(paths, ids, texts, np.array(start_s), np.array(end_s), np.array(file_duration_s))


def _check_columns(where: str, columns: frozenset[str]) -> None:
    missing = [column for column in COLUMNS if column not in columns]
    for column in sorted(columns - set(COLUMNS)):
        plain = column.strip().lower().replace(" ", "_")
        meant = plain if plain in COLUMNS else _SYNONYMS.get(plain)
        if meant is None:
            # Names similar to `id` and `duration_s` (such as idx and duration_ms) are allowed, because ignoring these columns does
            # not change the results.
            likely = [name for name in COLUMNS if name not in ("id", "duration_s")]
            meant = next(iter(get_close_matches(plain, likely, 1, 0.8)), None)
        if meant in missing:
            raise SourceError(f"{where}: column {column!r} would be ignored; did you mean {meant!r}?")
        if "start_s" in columns and "end_s" in missing and plain in _DURATIONS:
            raise SourceError(
                f"{where}: column {column!r} would be ignored because of column 'start_s'; use 'end_s' instead, "
                "or 'duration_s' if it is the duration of the whole file"
            )
    if "path" in missing:
        raise SourceError(
            f"{where}: the column 'path' is missing; columns found: {', '.join(sorted(columns)) or 'none'}"
        )


def _parse_row(
    path: Path, where: str, row: Mapping[str, Any]
) -> tuple[str, str | None, str | None, float, float, float]:
    """Parses and validates one row. Returns its values in the order of the fields of `ManifestRows`."""

    def fail(reason: str) -> SourceError:
        return SourceError(f"{path}: {where}: {reason}")

    file = row.get("path")
    if isinstance(file, str) and file.lower().startswith("file://"):
        file = of_file_address(file) or file
    if not isinstance(file, str) or not file.strip() or "\0" in file or not _is_file_name(file):
        raise fail(f"path must be a file name, got {file!r}")
    if "://" in file:
        raise fail(f"path must be a local file, got {file!r}")
    id: Any = row.get("id")
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    text: Any = row.get("text")
    id, text = (None if isinstance(cell, float) and math.isnan(cell) else cell for cell in (id, text))
    for name, value in (("id", id), ("text", text)):
        if value is not None and not (isinstance(value, str) and _is_unicode([value])):
            raise fail(f"{name} must be a string of valid Unicode, got {value!r}")
    start_s, end_s, duration_s = (_number_of_seconds(row, name, fail) for name in SECONDS)
    if text is None and row.keys() >= AUDIOCRAFT_KEYS:
        text = _sidecar_text(path, where, file)
    begin_s = start_s or 0.0
    if end_s is not None and not end_s > begin_s:
        raise fail(f"end_s ({end_s:g}) must be greater than start_s ({begin_s:g})")
    if duration_s is not None:
        if not 0 < duration_s <= MAX_DURATION_S:
            raise fail(f"duration_s must be above 0 and at most {MAX_DURATION_S:g}, got {row['duration_s']!r}")
        for name, at_s in (("start_s", begin_s), ("end_s", end_s)):
            if at_s is not None and (at_s >= duration_s if name == "start_s" else at_s > duration_s + END_TOLERANCE_S):
                raise fail(f"{name} ({at_s:g}) is past the end of the file; duration_s is {duration_s:g}")
    file_end_s = math.nan if duration_s is None else duration_s
    return file, id or None, _own_text(text or ""), begin_s, math.nan if end_s is None else end_s, file_end_s


def _number_of_seconds(row: Mapping[str, Any], name: str, fail: Callable[[str], SourceError]) -> float | None:
    seconds = _seconds(row.get(name))
    if isinstance(seconds, str) or (seconds is not None and not 0 <= seconds < math.inf):
        raise fail(f"{name} must be a non-negative number of seconds, got {row[name]!r}")
    return seconds


def _seconds(value: Any) -> float | str | None:
    """Parses a number of seconds.

    Returns:
        The number, None if the value is missing, or a string if the value is not a number.
    """
    if value is None or (isinstance(value, str) and value.strip() in MISSING_WORDS):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return repr(value)
    try:
        return value if isinstance(value, str) and "_" in value else float(value)
    except (ValueError, OverflowError):
        return str(value)


def _is_unicode(texts: Iterable[str]) -> bool:
    """Returns whether all strings can be encoded in UTF-8.

    Strings in json files may contain lone surrogates, which cannot be encoded.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_file_name(name: str) -> bool:
    """Returns whether a string can be a file name. File names that are not valid UTF-8 are accepted."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _sidecar_text(manifest: Path, where: str, file: str) -> str | None:
    """Returns the description in the json file next to an audio file, or None if there is no such file or no description.

    Source: audiocraft 1.3.0, data/music_dataset.py.
    """
    try:
        sidecar = locate(str(manifest.parent), expanded(file)).with_suffix(".json")
        described = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        text_path = (manifest.parent / file).parent / f"{Path(file).stem}.json"
        raise SourceError(f"{manifest}: {where}: cannot read {text_path}: {error}") from error
    text = described.get("description") if isinstance(described, dict) else None
    return _own_text(text) if isinstance(text, str) and _is_unicode([text]) else None
