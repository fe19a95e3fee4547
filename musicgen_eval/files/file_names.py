"""File names as other people and systems write them: `~`, file:// addresses, backslashes, percent signs, composed accents.

A name is taken as it is if there is such a file. Only then are other spellings tried, so that the files of a manifest cost one
look each. Knows names; opens nothing.
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
    """A name with `~` or `~user` as that home directory; as it is where there is no such user or directory."""
    return os.path.expanduser(name)  # noqa: PTH111 - Path.expanduser raises for a file called ~x


def of_file_address(address: str) -> str | None:
    """The path in a file:// address; None where it names another machine.

    >>> of_file_address("file:///music/a%20song.wav"), of_file_address("file://server/a.wav")
    ('/music/a song.wav', None)
    """
    machine, slash, path = address[len("file://") :].partition("/")
    return unquote(slash + path, errors="surrogateescape") if machine in ("", "localhost") else None


def locate(folder: str, name: str) -> Path:
    """The file of a row of a manifest, by the first spelling of its name that exists; the name itself where none does.

    Args:
        folder: the manifest's.
        name: absolute, or relative to the folder.
    """
    plain = Path(folder, name)
    if os.path.lexists(plain):
        return plain
    return next((path for path in (Path(folder, other) for other in spellings(name)) if os.path.lexists(path)), plain)


def spellings(name: str) -> Iterator[str]:
    r"""Other spellings that a name may have on this system.

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


def hint(name: str) -> str:
    """Returns a hint about the name of a file that does not exist; empty if there is none."""
    if _WINDOWS_DRIVE.search(name):
        return " (a path with a drive letter of Windows, which names nothing here; make it relative to the manifest)"
    return ""
