"""Caches the results of functions that scan a whole file.

A cache entry is identified by the path, size and modification time of the file. Errors are also cached, because a damaged file
would otherwise be scanned again for each of its windows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TypeVar

from musicgen_eval.errors import AudioError

_R = TypeVar("_R")


def once_per_file(max_files: int) -> Callable[[Callable[[Path], _R]], Callable[[Path], _R]]:
    """Returns a decorator that caches, per file, the result of a function or the `AudioError` that the function raises.

    The cache keeps the results for the `max_files` most recently used files.
    """

    def decorate(function: Callable[[Path], _R]) -> Callable[[Path], _R]:
        @lru_cache(maxsize=max_files)
        def cached_outcome(path: Path, num_bytes: int, mtime_ns: int) -> tuple[_R | None, str | None]:
            try:
                return function(path), None
            except AudioError as error:
                return None, str(error)

        @wraps(function)
        def cached(path: Path) -> _R:
            status = path.stat()
            result, failure = cached_outcome(path, status.st_size, status.st_mtime_ns)
            if failure is not None:
                raise AudioError(failure)
            return result  # type: ignore[return-value]

        return cached

    return decorate
