"""Resolves file:// URLs, and file names that contain `~`, backslashes, percent-encoded characters or accents.

The literal file name is tried first. Alternative spellings are tried only if no file has that name, so most file names in a
manifest require only one lookup.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote

_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def expanded(name: str) -> str:
    """Replaces a leading `~` or `~user` with the home directory. If the directory is unknown, the name is returned unchanged."""
    return os.path.expanduser(name)  # noqa: PTH111 - Path.expanduser raises for a file called ~x


def of_file_address(address: str) -> str | None:
    """Returns the path that a file:// URL refers to, or None if the URL refers to a different machine.

    >>> of_file_address("file:///music/a%20song.wav"), of_file_address("file://server/a.wav")
    ('/music/a song.wav', None)
    """
    machine, slash, path = address[len("file://") :].partition("/")
    return unquote(slash + path, errors="surrogateescape") if machine in ("", "localhost") else None


def locate(folder: str, name: str) -> Path:
    """Returns the path of a file that is listed in a manifest.

    The literal name is tried first, followed by alternative spellings of the name. If no spelling matches an existing file, the
    path with the literal name is returned.

    Args:
        folder: Folder of the manifest.
        name: File name, absolute or relative to the folder.
    """
    plain = Path(folder, name)
    if os.path.lexists(plain):
        return plain
    return next((path for path in (Path(folder, other) for other in spellings(name)) if os.path.lexists(path)), plain)


def spellings(name: str) -> Iterator[str]:
    r"""Yields alternative spellings of a file name that the file may have on this system.

    >>> list(spellings(r"rock\a%20b.wav"))
    ['rock/a%20b.wav', 'rock\\a b.wav', 'rock/a b.wav']
    """
    tried = {name}
    for decoded in (name, unquote(name, errors="surrogateescape")):
        for slashed in (decoded, decoded.replace("\\", "/")):
            for other in (slashed, normalize("NFC", slashed), normalize("NFD", slashed)):
                if other not in tried:
                    tried.add(other)
                    yield other


def missing_file_hint(name: str) -> str:
    """Returns a hint to append to the error message for a missing file, or an empty string if there is no hint."""
    if _WINDOWS_DRIVE.search(name):
        return " (the path has a Windows drive letter; use a path relative to the manifest)"
    return ""
