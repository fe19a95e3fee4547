"""A lock that allows only one run at a time to use a run folder."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

LOCK = ".musicgen_eval.lock"
"""Name of the lock file. If a process is killed, its lock file remains, and shows that the folder belongs to this package."""
_locked_here: set[Path] = set()
"""Folders that this process has locked."""


class FolderLock:
    """A POSIX lock on a folder.

    The operating system releases the lock when the process ends, for whatever reason. Forked workers do not inherit the lock.

    A POSIX lock does not prevent its own process from locking the same file again. In addition, the lock would be released if the
    process opened the lock file again and then closed it. Therefore, `_locked_here` records the folders that this process has
    locked.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._file: IO[bytes] | None = None

    @property
    def is_taken(self) -> bool:
        """True if this object holds the lock, which is the case between `take` and `release`."""
        return self._file is not None

    def take(self, folder: Path) -> None:
        """Locks a folder.

        Raises:
            BlockingIOError: A run in this or another process has locked the folder.
            OSError: The file system does not support locks, or the lock file cannot be written.
        """
        folder = folder.resolve()
        if folder in _locked_here:
            raise BlockingIOError
        file = (folder / LOCK).open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError:  # on some file systems, this error means that the file is locked
            file.close()
            raise BlockingIOError from None
        except OSError:
            file.close()
            raise
        if not _is_same_file(file, folder / LOCK):  # another process held the lock until now, and has removed the file
            file.close()
            self.take(folder)
            return
        self._folder, self._file = folder, file
        _locked_here.add(folder)

    def release(self, *, keep_file: bool = False) -> None:
        """Releases the lock.

        Args:
            keep_file: Whether to keep the lock file, which shows that the folder belongs to this package.
        """
        assert self._folder is not None
        assert self._file is not None
        if not keep_file:
            with suppress(OSError):  # the folder may have become read-only; the lock is released anyway
                (self._folder / LOCK).unlink()
        self._file.close()
        _locked_here.discard(self._folder)
        self._folder = self._file = None


def _is_same_file(opened: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False
