"""What is found by going through a whole file is found once, and so is what is wrong with it.

A file is known by its path, size and time of change. Without its failure being kept, each window of a damaged file would
go through all of it again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TypeVar

from musicgen_eval.errors import AudioError

_R = TypeVar("_R")


def once_per_file(max_files: int) -> Callable[[Callable[[Path], _R]], Callable[[Path], _R]]:
    """Keep a function's result, or the `AudioError` that it raised, for the last files."""

    def decorate(function: Callable[[Path], _R]) -> Callable[[Path], _R]:
        @lru_cache(maxsize=max_files)
        def outcome_of(path: Path, num_bytes: int, mtime_ns: int) -> tuple[_R | None, str | None]:
            try:
                return function(path), None
            except AudioError as error:
                return None, str(error)

        @wraps(function)
        def with_memory(path: Path) -> _R:
            status = path.stat()
            result, failure = outcome_of(path, status.st_size, status.st_mtime_ns)
            if failure is not None:
                raise AudioError(failure)
            return result  # type: ignore[return-value]

        return with_memory

    return decorate
