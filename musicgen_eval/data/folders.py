"""Finds the audio files in a folder and its subfolders, and describes sources that do not exist.

Files are selected by their extensions and are not opened. The extension does not affect how a file is decoded later.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from musicgen_eval.errors import SourceError, near_matches
from musicgen_eval.files.file_names import expanded

AUDIO_SUFFIXES = frozenset({
    # read by soundfile
    ".wav", ".wave", ".bwf", ".rf64", ".w64", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".flac", ".mp3", ".mp2", ".mp1",
    ".mpa", ".mpga", ".ogg", ".oga", ".ogx", ".opus", ".voc", ".sph", ".nist", ".ircam", ".sf", ".paf", ".fap", ".pvf", ".svx",
    ".8svx", ".avr", ".htk", ".mpc2k", ".sds", ".wve", ".xi",
    # read by PyAV
    ".m4a", ".m4b", ".m4p", ".m4r", ".m4v", ".mp4", ".mov", ".3gp", ".3ga", ".3gpp", ".3g2", ".aac", ".adts", ".wma", ".wmv",
    ".asf", ".webm", ".weba", ".mka", ".mkv", ".wv", ".ape", ".tta", ".mpc", ".mpp", ".mp+", ".tak", ".dsf", ".dff", ".ra", ".rm",
    ".rmvb", ".amr", ".awb", ".ac3", ".eac3", ".ec3", ".flv", ".spx", ".ogv",
})  # fmt: skip
SHOWN_EXTENSIONS = 8


def is_audio_name(path: str) -> bool:
    """Returns whether a file name has the extension of an audio format."""
    return PurePosixPath(path).suffix.lower() in AUDIO_SUFFIXES


def walk(root: Path) -> list[str]:
    """Returns the sorted relative paths of all files in a folder and its subfolders.

    Hidden files and folders are omitted. Each folder is visited only once, even if symbolic links point to it.
    """
    files: list[str] = []
    visited: set[tuple[int, int]] = set()
    # Linked folders are visited last, so that a folder is listed under its own path instead of the path of a link to it.
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
            raise SourceError(f"{root / relative}: cannot read the folder: {error.strerror or error}") from error
        for name, is_link, is_folder in entries:
            path = f"{relative}/{name}" if relative else name
            if not name.startswith("."):
                (files if not is_folder else linked if is_link else folders).append(path)
    return sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is listed as a file and fails when it is opened
        return False


def skipped_files(relative_paths: Sequence[str]) -> str:
    """Returns a note that states how many files were skipped, and lists their extensions in order of frequency."""
    skipped = [PurePosixPath(path).suffix.lower() for path in relative_paths if not is_audio_name(path)]
    counts = Counter(suffix or "no extension" for suffix in skipped)
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{suffix} ({count})" for suffix, count in by_count[:SHOWN_EXTENSIONS]]
    shown += [f"{len(counts) - SHOWN_EXTENSIONS} other extensions"] if len(counts) > SHOWN_EXTENSIONS else []
    return f"skipped {counts.total()} of {len(relative_paths)} files because they have no audio extension: {', '.join(shown)}"


def missing_source(name: str, path: Path) -> SourceError:
    """Returns the error for a source that does not exist. The message suggests similar names in the same folder.

    Args:
        name: The source that the user specified.
        path: Path that the source refers to.
    """
    parent = path.parent
    if not parent.is_dir():
        return SourceError(f"{name}: no such file or folder (its parent folder {parent} does not exist either)")
    near = near_matches(path.name, [entry.name for entry in parent.iterdir() if entry.name[0] != "."])
    hint = f"; {near}" if near.startswith("did you mean") else ""
    return SourceError(f"{name}: no such file or folder{hint}")


def refuse_missing_source(name: str) -> None:
    """Raises an error if a source is neither `demo`, an existing file or folder, nor a glob. An empty name is not checked.

    Raises:
        SourceError: The source does not exist.
    """
    path = expanded(name)
    if name != "demo" and name.strip() and not os.path.lexists(path) and not glob.has_magic(name):
        raise missing_source(name, Path(path))
