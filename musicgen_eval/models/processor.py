"""Which of torch's two CPU libraries multiplies faster on this processor: oneDNN, with packed weights, or MKL."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def has_fast_mkl() -> bool:
    """Whether torch's plain float32 products and its attention use MKL on an Intel processor.

    There MKL multiplies large float32 matrices 8% faster than oneDNN does with packed weights, and torch's causal attention takes
    two thirds (float32) or a third (bfloat16) of the time of one that is made of oneDNN's products. On processors of other makers
    MKL is half as fast as oneDNN. With few rows, as in a decoding step, packed weights are faster everywhere.
    """
    return torch.backends.mkl.is_available() and _is_intel()


def _is_intel() -> bool:
    if CPUINFO.exists():
        return "GenuineIntel" in CPUINFO.read_text(encoding="utf-8", errors="replace")
    return "GenuineIntel" in platform.processor()  # Windows
