"""Explains the errors that occur when a worker process of a DataLoader dies."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_sharer

from musicgen_eval.errors import RunError


@contextmanager
def dead_workers_explained() -> Iterator[None]:
    """Raises a single `RunError` in place of the various errors that torch raises after a DataLoader worker has died.

    Raises:
        RunError: A worker has died.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if not comes_from_a_dead_worker(error):
            raise
        raise RunError(
            f"a DataLoader worker was killed or ran out of memory ({error}). Completed batches are kept; resume the run, with a "
            "smaller data.num_workers if memory ran out"
        ) from error


def comes_from_a_dead_worker(error: BaseException) -> bool:
    """Returns True if an error indicates that a DataLoader worker has died, or that the connection to the worker was lost."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename == resource_sharer.__file__ for frame, _ in frames)
