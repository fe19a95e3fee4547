"""Writes files atomically, so that each file is written either completely or not at all.

    write   .summary.json.3f9c01d2ab47.tmp      hidden file in the same folder
    fsync
    rename  summary.json                        replaces any existing file

If the process is killed before the rename, the temporary file remains until `remove_leftovers` removes it.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TextIO, overload

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.tmp", re.DOTALL)


@overload
def atomic_file(path: Path, mode: Literal["w"] = "w") -> AbstractContextManager[TextIO]: ...
@overload
def atomic_file(path: Path, mode: Literal["wb"]) -> AbstractContextManager[BinaryIO]: ...
def atomic_file(path: Path, mode: Literal["w", "wb"] = "w") -> AbstractContextManager[IO[Any]]:
    r"""Opens a temporary file that is synced to disk and renamed to `path` at the end of the `with` block.

    If the block or the sync raises an exception, the temporary file is removed and any existing file at `path` is kept. Several
    processes can write to the same path at the same time. The path then contains the file of the last process to finish.

    Args:
        path: Path of the file. An existing file is replaced.
        mode: `w` for UTF-8 text, or `wb` for bytes. In text mode, newlines are not translated, and characters that UTF-8 cannot
            encode are replaced with backslash escapes.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> with atomic_file(Path("summary.json")) as file:  # doctest: +SKIP
        ...     file.write("{}")
    """
    return _atomic_file(path, mode)


@contextmanager
def _atomic_file(path: Path, mode: Literal["w", "wb"]) -> Iterator[IO[Any]]:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    file: IO[Any] = (
        temporary.open("xb")
        if mode == "wb"
        else temporary.open("x", newline="", encoding="utf-8", errors="backslashreplace")
    )
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        temporary.replace(path)
    except BaseException:
        # An error during clean-up must not replace the original error.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def is_leftover(name: str) -> bool:
    """Returns whether a file name matches the pattern of `atomic_file`'s temporary files.

    >>> is_leftover(".summary.json.3f9c01d2ab47.tmp"), is_leftover("summary.json")
    (True, False)
    """
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that interrupted processes left in a folder. Subfolders are not searched.

    This function must not be called while another process is writing to the folder.
    """
    for path in folder.glob(".*.tmp"):
        if is_leftover(path.name):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flushes the directory entries of a folder to disk.

    Raises:
        OSError: The folder cannot be opened, or the file system cannot sync folders.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
