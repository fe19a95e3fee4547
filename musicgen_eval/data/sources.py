"""Reads a source (a file, folder, glob or manifest, or a list of these) into a list of tracks.

Tracks are stored as columns, so a million tracks take little memory. If the source itself is invalid, an error is raised
immediately. Audio files are not opened here. If a file cannot be read, only its track fails later.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.data.columns import Paths, Strings, StringsBuilder, Texts, packed, unpacked
from musicgen_eval.data.folders import is_audio_name, missing_source, skipped_files, walk
from musicgen_eval.data.manifest import is_manifest, read_manifest
from musicgen_eval.data.tabular_files import Oddities
from musicgen_eval.errors import SourceError
from musicgen_eval.files.file_names import expanded
from musicgen_eval.records import Track


@dataclass(frozen=True, eq=False)
class TrackList:
    """List of tracks, stored as columns. Indexing returns a `Track`.

    Attributes:
        ids: Unique ids of the tracks.
        paths: Paths of the files as strings, because a million `Path` objects would take five times as much memory.
        start_s: (tracks,) float64, time in the file at which each track starts.
        duration_s: (tracks,) float64, length of each track. NaN means up to the end of the file.
        texts: Texts that describe the music. The text of a track is None if the track has no text.
        ignored: Number of files that were skipped in folders and globs because they have no audio extension.
        file_duration_s: (tracks,) float64, declared duration of each file. NaN means that the duration of the file is not declared.
            None means that no durations are declared.
        notes: One-line notes about the source, such as the number of skipped files.
        from_manifest: Whether the ids come from a manifest.
    """

    ids: Sequence[str]
    paths: Sequence[str]
    start_s: NDArray[np.float64]
    duration_s: NDArray[np.float64]
    texts: Sequence[str | None]
    ignored: int = 0
    file_duration_s: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()
    from_manifest: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Track:
        duration_s = float(self.duration_s[row])
        return Track(
            id=self.ids[row],
            path=Path(self.paths[row]),
            start_s=float(self.start_s[row]),
            duration_s=None if np.isnan(duration_s) else duration_s,
            text=self.texts[row],
        )

    def file(self, row: int) -> Path:
        """Returns the path of a track's file, spelled as in the file system. The spelling in a manifest can differ."""
        return self.paths.file(row) if isinstance(self.paths, Paths) else Path(self.paths[row])

    def __iter__(self) -> Iterator[Track]:
        return (self[row] for row in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state to pickle. A column whose values are all equal is stored as a single value."""
        return vars(self) | {name: packed(getattr(self, name)) for name in ("start_s", "duration_s")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        num_tracks = len(state["ids"])
        vars(self).update(state | {name: unpacked(state[name], num_tracks) for name in ("start_s", "duration_s")})

    def first(self, num_tracks: int) -> TrackList:
        """Returns a list of the first `num_tracks` tracks."""
        columns = ("ids", "paths", "start_s", "duration_s", "texts", "file_duration_s")
        cut = {name: column[:num_tracks] for name in columns if (column := getattr(self, name)) is not None}
        return replace(self, **cut)


Source = str | list[str]
"""A file, a folder, a glob or a manifest, or a list of these."""


def absolute_source(source: Source) -> Source:
    """Makes the paths of a source absolute, so that the source can be read from a different working directory."""
    if isinstance(source, list):
        return [str(absolute_source(one)) for one in source]
    if source == "demo" or not source.strip():
        return source
    return os.path.abspath(expanded(source))  # noqa: PTH100 - without `..`, which pathlib keeps


def read_source(source: str | Path | Sequence[str | Path], *, text: str | None = None) -> TrackList:
    """Reads the tracks of a file, a folder (searched recursively), a glob or a manifest, or of a list of these.

    A file with the extension .csv, .jsonl, .jsonl.gz or .parquet is a manifest. Any other file is one track, regardless of its
    extension. In folders and globs, hidden files and files without an audio extension are skipped.

    A manifest can define the ids of its tracks. Otherwise, the id of a track is the path of its file, relative to the folder, to
    the manifest's folder or to the fixed part of the glob. If there are several sources, the ids of files that are not listed in a
    manifest are paths relative to the deepest folder that contains all of these files.

    The tracks of a folder or a glob are sorted by relative path. The rows of a manifest and the sources in a list keep their order.

    Args:
        source: File, folder, glob or manifest, or a list of these.
        text: Text for tracks that have no text of their own. None means no text.

    Raises:
        SourceError: A source does not exist or contains no audio files, a manifest lacks a column or contains an invalid row, or
            two tracks have the same id.
    """
    text = (text or "").strip() or None
    if isinstance(source, str | Path):
        return _read_one(os.fspath(source), text)
    names = [os.fspath(one) for one in source]
    if not names:
        raise SourceError("the list of sources is empty; add at least one file, folder, glob or manifest")
    lists = [_read_one(name, text) for name in names]
    return lists[0] if len(lists) == 1 else _joined(names, lists)


def _read_one(name: str, text: str | None) -> TrackList:
    if not name.strip():
        raise SourceError("the source is empty; set data.source to a file, folder, glob or manifest")
    path = Path(expanded(name))
    if path.is_dir():
        return _from_files(path, walk(path), text, what=name)
    if path.exists() or path.is_symlink():
        if is_manifest(path):
            return _from_manifest(path, text)
        return _whole_files([_printable(path.name)], path.parent, [path.name], text)
    if glob.has_magic(name):
        return _from_glob(name, text)
    raise missing_source(name, path)


def _joined(names: Sequence[str], lists: Sequence[TrackList]) -> TrackList:
    """Concatenates the tracks of several sources.

    Raises:
        SourceError: Two tracks have the same id.
    """
    files = [path for tracks in lists if not tracks.from_manifest for path in tracks.paths]
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in files]) if files else ""  # noqa: PTH100, PTH120
    ids, sources = list[str](), dict[str, str]()
    for name, tracks in zip(names, lists, strict=True):
        own = tracks.ids if tracks.from_manifest else [_id_below(folder, path) for path in tracks.paths]
        for id in own:
            if id in sources:
                raise SourceError(
                    f"{name}: track {id!r} is already in {sources[id]}; list each file once, "
                    "and give each manifest row a unique id"
                )
        sources.update(dict.fromkeys(own, name))
        ids += own
    return TrackList(
        Strings.of(ids),
        Paths("", Strings.of(path for tracks in lists for path in tracks.paths)),
        np.concatenate([tracks.start_s for tracks in lists]),
        np.concatenate([tracks.duration_s for tracks in lists]),
        Texts(Strings.of(text or "" for tracks in lists for text in tracks.texts)),
        ignored=sum(tracks.ignored for tracks in lists),
        file_duration_s=_joined_durations(lists),
        notes=tuple(note for tracks in lists for note in tracks.notes),
    )


def _id_below(folder: str, path: str) -> str:
    return _printable(os.path.relpath(os.path.abspath(path), folder).replace(os.sep, "/"))  # noqa: PTH100


def _joined_durations(lists: Sequence[TrackList]) -> NDArray[np.float64] | None:
    columns = [tracks.file_duration_s for tracks in lists]
    if all(column is None for column in columns):
        return None
    return np.concatenate(
        [
            np.full(len(tracks), np.nan) if column is None else column
            for tracks, column in zip(lists, columns, strict=True)
        ]
    )


def _from_glob(pattern: str, text: str | None) -> TrackList:
    parts = Path(expanded(pattern)).parts
    first_magic = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:first_magic])
    # Path.glob would include hidden files.
    names = glob.iglob(str(Path(*parts[first_magic:])), root_dir=root, recursive=True)  # noqa: PTH207
    files = sorted(Path(name).as_posix() for name in names if not (root / name).is_dir())
    return _from_files(root, files, text, what=pattern)


def _from_files(root: Path, relative_paths: list[str], text: str | None, *, what: str) -> TrackList:
    audio = [path for path in relative_paths if is_audio_name(path)]
    ignored = len(relative_paths) - len(audio)
    if not relative_paths:
        raise SourceError(f"{what}: no files found")
    if not audio:
        raise SourceError(
            f"{what}: none of the {ignored} files found has an audio extension; rename the audio files, or list them "
            "in data.source, which accepts single files with any extension"
        )
    ids = [_printable(path) for path in audio]
    notes = (f"{what}: {skipped_files(relative_paths)}",) if ignored else ()
    return replace(_whole_files(ids, root, audio, text), ignored=ignored, notes=notes)


def _from_manifest(path: Path, text: str | None) -> TrackList:
    ids, names, texts = StringsBuilder(), StringsBuilder(), StringsBuilder()
    seconds: list[tuple[NDArray[np.float64], ...]] = []
    ids_are_names = True
    folder = os.path.join(path.parent.absolute(), "")  # noqa: PTH118
    oddities = Oddities()
    for rows in read_manifest(path, oddities):
        paths = [expanded(name) if name[0] == "~" else name for name in rows.paths]
        own = [
            _printable(_manifest_id(name, folder)) if id is None else id
            for id, name in zip(rows.ids, paths, strict=True)
        ]
        ids_are_names = ids_are_names and own == paths
        ids.extend(own)
        names.extend(paths)
        texts.extend([row_text or text or "" for row_text in rows.texts])
        seconds.append((rows.start_s, rows.end_s - rows.start_s, rows.file_duration_s))
    if not seconds:
        raise SourceError(f"{path}: the manifest has no rows")
    files = names.build()
    id_column = files if ids_are_names else ids.build()
    _check_unique(path, id_column)
    start_s, duration_s, file_duration_s = (np.concatenate(column) for column in zip(*seconds, strict=True))
    return TrackList(
        id_column,
        Paths(str(path.parent), files),
        start_s,
        duration_s,
        Texts(texts.build()),
        file_duration_s=None if np.isnan(file_duration_s).all() else file_duration_s,
        notes=_manifest_notes(path, oddities),
        from_manifest=True,
    )


def _manifest_notes(path: Path, oddities: Oddities) -> tuple[str, ...]:
    counts = {
        "empty rows, which are skipped": oddities.num_empty_rows,
        "rows with values in an unnamed column, which are ignored": oddities.num_unnamed_cells,
        "rows whose text is a word such as nan or None, which counts as no text": oddities.num_missing_words,
    }
    return tuple(f"{path}: {what}: {count}" for what, count in counts.items() if count)


def _check_unique(manifest: Path, ids: Strings) -> None:
    # If all hashes are different, all ids are different. A set of a million ids would take 100 MB.
    hashes = np.fromiter(map(hash, ids.all_encoded()), np.int64, len(ids))
    hashes.sort()
    if (hashes[1:] != hashes[:-1]).all():
        return
    rows: dict[str, int] = {}
    for row, id in enumerate(ids, start=1):
        if id in rows:
            raise SourceError(
                f"{manifest}: rows {rows[id]} and {row} have the same id {id!r}; "
                "give each row a unique id (two excerpts of one file need ids, too)"
            )
        rows[id] = row


def _whole_files(ids: list[str], folder: Path, names: list[str], text: str | None) -> TrackList:
    """Creates a list with one track per file.

    Raises:
        SourceError: Two ids are equal, which can happen if file names are not valid UTF-8.
    """
    if len(set(ids)) < len(ids):
        raise SourceError(
            f"two file names are both printed as {next(id for id in ids if ids.count(id) > 1)!r}; rename one of the files"
        )
    num_tracks = len(ids)
    return TrackList(
        Strings.of(ids),
        Paths(str(folder), Strings.of(names)),
        np.zeros(num_tracks),
        np.full(num_tracks, np.nan),
        Texts(Strings.of([text or ""] * num_tracks)),
    )


def _manifest_id(row_path: str, folder: str) -> str:
    """Returns the default id of a manifest row: its path relative to the manifest's folder, with forward slashes.

    An absolute path outside the folder remains absolute.

    >>> _manifest_id("rock/./a.wav", "/data/"), _manifest_id("/data/rock/a.wav", "/data/")
    ('rock/a.wav', 'rock/a.wav')
    """
    return os.path.normpath(row_path).removeprefix(folder).replace(os.sep, "/")


def _printable(name: str) -> str:
    """Escapes the bytes of a file name that are not valid UTF-8, because results are written in UTF-8."""
    if name.isascii():
        return name
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
