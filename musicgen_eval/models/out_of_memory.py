"""Converts an accelerator's out-of-memory error into a `RunError` that suggests a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from musicgen_eval.errors import RunError


@contextmanager
def out_of_memory_explained(batch_size: int, occasion: str) -> Iterator[None]:
    """Converts any `torch.OutOfMemoryError` in the `with` block into a `RunError`.

    Args:
        batch_size: Value of data.batch_size, for the error message.
        occasion: Activity that required the memory, such as `processing a batch`, for the error message.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(_message(error, batch_size, occasion)) from error


def _message(error: torch.OutOfMemoryError, batch_size: int, occasion: str) -> str:
    request = next((part for part in str(error).split(". ") if part.startswith("Tried to allocate")), "")
    remedy = (
        f"start a new run with data.batch_size below {batch_size}, such as {max(1, batch_size // 2)}, or resume this run on a "
        "device with more free memory. A run cannot be resumed with a different data.batch_size, because the results depend on it"
        if batch_size > 1
        else "data.batch_size is already 1; use a 16-bit precision, shorter windows, or a device with more memory"
    )
    return f"the accelerator ran out of memory while {occasion}{f' ({request})' if request else ''}; {remedy}"
