"""Manifests: csv, jsonl, jsonl.gz and parquet tables of `path` and, where known, `id`, `text`, `start_s`, `end_s`, `duration_s`.

`duration_s` is how long the whole file is, whatever part of it the row is of; a file whose duration is given is opened when it
is first read, and not before. audiocraft's manifests (jsonl with `path`, `duration`, `sample_rate`) are known by their keys; a
track's text is then the `description` of the json file beside it. Their `duration` is passed over: it is what ffmpeg says of
the container, with an mp3's or m4a's padding in it. Every error names the row. Nothing here opens audio.

A text or a number of seconds that is one of `MISSING_WORDS`, such as `nan` or `None`, is missing, whatever the kind of manifest:
this is how pandas, Excel and others write that there is none. A track that is really described by such a word needs a longer text.
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
from musicgen_eval.data.tabular_files import Oddities, Piece, read_pieces
from musicgen_eval.errors import SourceError
from musicgen_eval.files.file_names import expanded, locate, of_file_address

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".jsonl.gz", ".parquet")
COLUMNS = ("path", "id", "text", "start_s", "end_s", "duration_s")
SECONDS = ("start_s", "end_s", "duration_s")
MAX_DURATION_S = 1e6  # eleven days: what is above is no number of seconds
MISSING_WORDS = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN",
    "None", "n/a", "nan", "null",
})  # fmt: skip
"""What stands for a missing text, in every kind of manifest: the words that pandas reads as missing."""
AUDIOCRAFT_KEYS = frozenset({"path", "duration", "sample_rate"})
# Names by which others call our columns: a column that is passed over for its name changes what is measured.
_MEANT = {
    "file": "path", "filename": "path", "file_name": "path", "file_path": "path", "filepath": "path", "audio": "path",
    "audio_path": "path", "audio_file": "path", "wav": "path", "caption": "text", "prompt": "text", "description":
    "text", "start": "start_s", "start_time": "start_s", "begin": "start_s", "offset": "start_s", "offset_s": "start_s",
    "onset": "start_s", "end": "end_s", "end_time": "end_s", "stop": "end_s", "offset_end": "end_s",
}  # fmt: skip
_DURATIONS = ("duration", "length", "length_s", "dur")


class ManifestRows(NamedTuple):
    """Some rows of a manifest, one after the other, as columns of one length.

    Attributes:
        paths: files, as they stand in the manifest.
        ids: names of their own; None where a row has none.
        texts: None where a row has none.
        start_s: (rows,) float64, where each begins in its file.
        end_s: (rows,) float64, where it ends; NaN: with the file.
        file_duration_s: (rows,) float64, how long the file is said to be; NaN: nothing is said.
    """

    paths: Sequence[str]
    ids: Sequence[str | None]
    texts: Sequence[str | None]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    file_duration_s: NDArray[np.float64]


def is_manifest(path: Path) -> bool:
    """Whether a file's name says that it is a manifest."""
    return path.name.lower().endswith(MANIFEST_SUFFIXES)


def read_manifest(path: Path, oddities: Oddities) -> Iterator[ManifestRows]:
    """The rows of a manifest, in order, many at a time.

    Args:
        path: the manifest.
        oddities: counts what is passed over.

    Raises:
        SourceError: not readable as what its name says, a missing column, a column that is nearly one of ours, or a bad
            row.
    """
    for piece in read_pieces(path, COLUMNS, _check_columns, oddities):
        rows = _plain_rows(piece) or _odd_rows(path, piece)
        if None in rows.texts:
            oddities.num_missing_words += _num_missing_words(piece)
        yield rows


def _plain_rows(piece: Piece) -> ManifestRows | None:
    """Many rows at once, where each of them is as most are; None: some may not be, so they are gone through one by one."""
    num_rows = len(piece)
    paths, ids, texts = piece.cells("path"), piece.cells("id"), piece.cells("text")
    if paths is None or (num_rows and piece.has_row_with(AUDIOCRAFT_KEYS)):
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
    start_s, end_s, file_duration_s = (_plain_seconds(piece.cells(name), num_rows) for name in SECONDS)
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
    """(rows,) numbers, NaN where there are none; None where some may not be what they should."""
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
    """Returns a row's text; None if it is empty or a word that stands for a missing value."""
    stripped = text.strip()
    return None if stripped in MISSING_WORDS else stripped


def _num_missing_words(piece: Piece) -> int:
    texts = piece.cells("text") or ()
    words = (text.strip() for text in texts if isinstance(text, str))
    return sum(word in MISSING_WORDS for word in words if word)


def _odd_rows(path: Path, piece: Piece) -> ManifestRows:
    """Rows gone through one by one; the first bad one ends it."""
    rows = [_parse_row(path, piece.where(at), piece.row(at)) for at in range(len(piece))]
    paths, ids, texts, start_s, end_s, file_duration_s = zip(*rows, strict=True)
    return ManifestRows(paths, ids, texts, np.array(start_s), np.array(end_s), np.array(file_duration_s))


def _check_columns(where: str, columns: frozenset[str]) -> None:
    missing = [column for column in COLUMNS if column not in columns]
    for column in sorted(columns - set(COLUMNS)):
        plain = column.strip().lower().replace(" ", "_")
        meant = plain if plain in COLUMNS else _MEANT.get(plain)
        if meant is None:
            # An id that is missed is a path instead, a duration is the file's own: which harms nobody; so near names of them
            # (idx, duration_ms) may stand.
            likely = [name for name in COLUMNS if name not in ("id", "duration_s")]
            meant = next(iter(get_close_matches(plain, likely, 1, 0.8)), None)
        if meant in missing:
            raise SourceError(f"{where}: column {column!r} would be ignored; did you mean {meant!r}?")
        if "start_s" in columns and "end_s" in missing and plain in _DURATIONS:
            raise SourceError(
                f"{where}: column {column!r} beside 'start_s' would be ignored; give 'end_s' instead, "
                "or 'duration_s' where it is the whole file's"
            )
    if "path" in missing:
        raise SourceError(f"{where}: no column 'path'; columns: {', '.join(sorted(columns)) or 'none'}")


def _parse_row(
    path: Path, where: str, row: Mapping[str, Any]
) -> tuple[str, str | None, str | None, float, float, float]:
    """One row of `ManifestRows`."""

    def fail(reason: str) -> SourceError:
        return SourceError(f"{path}: {where}: {reason}")

    file = row.get("path")
    if isinstance(file, str) and file.lower().startswith("file://"):
        file = of_file_address(file) or file
    if not isinstance(file, str) or not file.strip() or "\0" in file or not _is_file_name(file):
        raise fail(f"path must be a file's name, got {file!r}")
    if "://" in file:
        raise fail(f"path must be a local file, got {file!r}")
    id: Any = row.get("id")
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    text: Any = row.get("text")
    id, text = (None if isinstance(cell, float) and math.isnan(cell) else cell for cell in (id, text))
    for name, value in (("id", id), ("text", text)):
        if value is not None and not (isinstance(value, str) and _is_unicode([value])):
            raise fail(f"{name} must be text, got {value!r}")
    start_s, end_s, duration_s = (_number_of_seconds(row, name, fail) for name in SECONDS)
    if text is None and row.keys() >= AUDIOCRAFT_KEYS:
        text = _side_car_text(path, where, file)
    begin_s = start_s or 0.0
    if end_s is not None and not end_s > begin_s:
        raise fail(f"end_s ({end_s:g}) must lie after start_s ({begin_s:g})")
    if duration_s is not None:
        if not 0 < duration_s <= MAX_DURATION_S:
            raise fail(f"duration_s must be above 0 and at most {MAX_DURATION_S:g}, got {row['duration_s']!r}")
        for name, at_s in (("start_s", begin_s), ("end_s", end_s)):
            if at_s is not None and (at_s >= duration_s if name == "start_s" else at_s > duration_s + END_TOLERANCE_S):
                raise fail(
                    f"{name} ({at_s:g}) lies behind the end of the file, which duration_s puts at {duration_s:g}"
                )
    file_end_s = math.nan if duration_s is None else duration_s
    return file, id or None, _own_text(text or ""), begin_s, math.nan if end_s is None else end_s, file_end_s


def _number_of_seconds(row: Mapping[str, Any], name: str, fail: Callable[[str], SourceError]) -> float | None:
    seconds = _seconds(row.get(name))
    if isinstance(seconds, str) or (seconds is not None and not 0 <= seconds < math.inf):
        raise fail(f"{name} must be a number of seconds from 0, got {row[name]!r}")
    return seconds


def _seconds(value: Any) -> float | str | None:
    """A number; None where none is given; text where it is not a number."""
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
    """Whether texts can be written down: half a character, as json can hold it, can not."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_file_name(name: str) -> bool:
    """Whether a name is one that the file system can give, in UTF-8 or not."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _side_car_text(manifest: Path, where: str, file: str) -> str | None:
    """The description in the json file beside an audio file. Source: audiocraft 1.3.0, data/music_dataset.py."""
    try:
        side_car = locate(str(manifest.parent), expanded(file)).with_suffix(".json")
        described = json.loads(side_car.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        beside = (manifest.parent / file).parent / f"{Path(file).stem}.json"
        raise SourceError(f"{manifest}: {where}: {beside} cannot be read: {error}") from error
    text = described.get("description") if isinstance(described, dict) else None
    return _own_text(text) if isinstance(text, str) and _is_unicode([text]) else None
