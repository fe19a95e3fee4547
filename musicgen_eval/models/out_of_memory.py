"""Turns an accelerator's out-of-memory error into one that names the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from musicgen_eval.errors import RunError


@contextmanager
def out_of_memory_explained(batch_size: int, occasion: str) -> Iterator[None]:
    """Raises a `RunError` in place of `torch.OutOfMemoryError`.

    Args:
        batch_size: present value of data.batch_size, for the message.
        occasion: what needed the memory, for the message.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(_message(error, batch_size, occasion)) from error


def _message(error: torch.OutOfMemoryError, batch_size: int, occasion: str) -> str:
    request = next((part for part in str(error).split(". ") if part.startswith("Tried to allocate")), "")
    remedy = (
        f"start a new run with a smaller data.batch_size than {batch_size}, such as {max(1, batch_size // 2)}. A run's batches are "
        "part of its numbers, so this one can only be resumed with the same data.batch_size, on a device with more free memory"
        if batch_size > 1
        else "data.batch_size is 1 already; use a precision of 16 bits, shorter windows, or a device with more memory"
    )
    return f"the accelerator ran out of memory in {occasion}{f' ({request})' if request else ''}; {remedy}"
