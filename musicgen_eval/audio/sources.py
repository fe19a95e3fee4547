"""Sources: a file, a folder, a glob or a manifest becomes a list of tracks.

Columns, not records: a million tracks are a few lists and arrays. Errors in the source itself are raised at once; audio
files are not opened here, so that one bad file is one track's failure later.
"""

from __future__ import annotations

import glob
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from musicgen_eval.audio.manifests import is_manifest, read_manifest
from musicgen_eval.errors import SourceError, near_matches
from musicgen_eval.records import Track

AUDIO_SUFFIXES = frozenset({
    ".wav", ".wave", ".bwf", ".rf64", ".w64", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".flac",
    ".mp3", ".mp2", ".mpga", ".ogg", ".oga", ".opus", ".voc", ".sph", ".nist", ".ircam", ".paf", ".pvf",
    ".m4a", ".m4b", ".mp4", ".aac", ".wma", ".asf", ".webm", ".mka", ".wv", ".ape", ".tta", ".mpc", ".ac3", ".amr",
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class TrackList:
    """Tracks as columns; a row is a `Track`.

    Attributes:
        ids: unique names.
        paths: files, as text: a million Path objects would take five times the memory.
        start_s: (tracks,) float64, where each begins in its file.
        duration_s: (tracks,) float64; NaN: to the end of the file.
        texts: what the music is said to be; None: nothing is.
        ignored: files of a folder or glob that were passed over, not having an audio file's ending.
    """

    ids: list[str]
    paths: list[str]
    start_s: np.ndarray
    duration_s: np.ndarray
    texts: list[str | None]
    ignored: int = 0

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

    def __iter__(self) -> Iterator[Track]:
        return (self[row] for row in range(len(self)))


def read_source(source: str | Path, *, text: str | None = None) -> TrackList:
    """The tracks of a file, a folder (with all below it), a glob, or a manifest.

    A manifest ends in .csv, .jsonl, .jsonl.gz or .parquet. Any other file is one track, whatever its name; in folders
    and globs the ending decides, and hidden files are no files. Ids are a manifest's own, else paths relative to the
    folder, the manifest or the fixed part of the glob. Folders and globs are in the order of their relative paths,
    manifests in their own.

    Args:
        source: where the tracks are.
        text: for the tracks that have no text of their own.

    Raises:
        SourceError: nothing there, no audio in it, a manifest with a missing column or a bad row, or two tracks of one
            id.
    """
    name = os.fspath(source)
    if not name.strip():
        raise SourceError("an empty source; name a file, a folder, a glob or a manifest")
    path = Path(name).expanduser()
    text = (text or "").strip() or None
    if path.is_dir():
        return _from_files(path, _walk(path), text, what=f"{name}: a folder")
    if path.exists() or path.is_symlink():
        if is_manifest(path):
            return _from_manifest(path, text)
        return _tracks([_printable(path.name)], [str(path)], [text or None])
    if glob.has_magic(name):
        return _from_glob(name, text)
    raise SourceError(f"{name}: no such file or folder{_nearby(path)}")


def _from_glob(pattern: str, text: str | None) -> TrackList:
    parts = Path(pattern).expanduser().parts
    first_magic = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:first_magic])
    # Not Path.glob, which takes hidden files too.
    names = glob.iglob(str(Path(*parts[first_magic:])), root_dir=root, recursive=True)  # noqa: PTH207
    files = sorted(Path(name).as_posix() for name in names if not (root / name).is_dir())
    return _from_files(root, files, text, what=f"{pattern}: a glob")


def _from_files(root: Path, relative_paths: list[str], text: str | None, *, what: str) -> TrackList:
    audio = [path for path in relative_paths if PurePosixPath(path).suffix.lower() in AUDIO_SUFFIXES]
    ignored = len(relative_paths) - len(audio)
    if not relative_paths:
        raise SourceError(f"{what} without files")
    if not audio:
        raise SourceError(
            f"{what} without audio: {ignored} files ignored, none of which has an audio file's ending; "
            "a file named outright is opened whatever its ending"
        )
    ids = [_printable(path) for path in audio]
    return _tracks(ids, [str(root / path) for path in audio], [text or None] * len(audio), ignored=ignored)


def _walk(root: Path) -> list[str]:
    """Relative paths of all files below a folder, sorted; every folder once, by whatever links it is reached."""
    files: list[str] = []
    visited: set[tuple[int, int]] = set()
    # Folders reached by a link wait until all others are done, so that a link never takes the place of the folder
    # itself.
    folders, linked = [""], list[str]()
    while folders or linked:
        relative = folders.pop() if folders else linked.pop(0)
        try:
            status = (root / relative).stat()
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(root / relative) as scan:
                entries = [(entry.name, entry.is_symlink(), _is_folder(entry)) for entry in scan]
        except OSError as error:
            raise SourceError(f"{root / relative}: this folder cannot be read: {error.strerror or error}") from error
        for name, is_link, is_folder in entries:
            path = f"{relative}/{name}" if relative else name
            if not name.startswith("."):
                (files if not is_folder else linked if is_link else folders).append(path)
    return sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that will fail by its name
        return False


def _from_manifest(path: Path, text: str | None) -> TrackList:
    ids: list[str] = []
    paths: list[str] = []
    texts: list[str | None] = []
    start_s, duration_s = array("d"), array("d")
    folder = str(path.parent)
    # Text, not Path objects: a million rows in seconds.
    for row in read_manifest(path):
        ids.append(row.id if row.id is not None else _printable(_manifest_id(row.path, path.parent)))
        paths.append(os.path.join(folder, row.path))  # noqa: PTH118
        texts.append(row.text or text or None)
        start_s.append(row.start_s)
        duration_s.append(row.end_s - row.start_s)
    if not ids:
        raise SourceError(f"{path}: a manifest without rows")
    _check_unique(path, ids)
    return TrackList(ids, paths, np.array(start_s), np.array(duration_s), texts)


def _check_unique(manifest: Path, ids: list[str]) -> None:
    if len(set(ids)) == len(ids):
        return
    rows: dict[str, int] = {}
    for row, id in enumerate(ids, start=1):
        if id in rows:
            raise SourceError(
                f"{manifest}: rows {rows[id]} and {row} are both the track {id!r}; "
                "give each an id of its own (two parts of one file need them too)"
            )
        rows[id] = row


def _tracks(ids: list[str], paths: list[str], texts: list[str | None], *, ignored: int = 0) -> TrackList:
    """Whole files. Their ids can only meet where unprintable names do."""
    if len(set(ids)) < len(ids):
        raise SourceError(
            f"two files are called {next(id for id in ids if ids.count(id) > 1)!r} once they can be printed"
        )
    return TrackList(ids, paths, np.zeros(len(ids)), np.full(len(ids), np.nan), texts, ignored)


def _manifest_id(row_path: str, folder: Path) -> str:
    """A row's path below its manifest's folder, with forward slashes; as it is, where it lies elsewhere.

    >>> _manifest_id("rock/./a.wav", Path("/data")), _manifest_id("/data/rock/a.wav", Path("/data"))
    ('rock/a.wav', 'rock/a.wav')
    """
    path = os.path.normpath(row_path)
    if os.path.isabs(path):  # noqa: PTH117
        base = os.path.join(folder.absolute(), "")  # noqa: PTH118
        path = path.removeprefix(base)
    return path.replace(os.sep, "/")


def _printable(name: str) -> str:
    """A file name that is not UTF-8 cannot be written into results."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _nearby(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" ({parent} is none either)"
    near = near_matches(path.name, [entry.name for entry in parent.iterdir() if entry.name[0] != "."])
    return f"; {near}" if near.startswith("did you mean") else ""
