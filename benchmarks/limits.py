"""The best rates of a machine: matrix products and bytes read per second, measured between the turns of a benchmark.

A ratio to a baseline depends on the machine. The share of the machine's limit shows the remaining potential.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from musicgen_eval.models.packed_matrix import PackedMatrix, can_pack
from musicgen_eval.models.threads import map_single_threaded

PRODUCT = (1536, 1024, 4096)
"""Rows, inputs and outputs of the measured products: a feed-forward layer of musicgen-small over one window."""
READ_BYTES = 1 << 28
"""Number of bytes that each thread reads, far more than its caches hold."""
LSTM_BYTES = 1 << 24
"""Number of bytes that a layer of the codec's LSTM reads per step, more than the cache of one core holds."""


@dataclass
class Limits:
    """Rates of the processor, measured several times.

    Attributes:
        gflops: Rates of matrix products per dtype in GFLOP/s, with one product per thread on all threads.
        read_gb_s: Rates of reading memory with all threads, in GB/s.
        reread_gb_s: Rates if each thread reads its own `LSTM_BYTES` repeatedly, in GB/s.
    """

    gflops: dict[torch.dtype, list[float]] = field(default_factory=dict)
    read_gb_s: list[float] = field(default_factory=list)
    reread_gb_s: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Measures each rate once more, as the best of several tries."""
        for dtype in filter(can_pack, (torch.float32, torch.bfloat16)):
            self.gflops.setdefault(dtype, []).append(_product_rate(dtype))
        self.read_gb_s.append(_read_rate(READ_BYTES))
        self.reread_gb_s.append(_read_rate(LSTM_BYTES, times=16))

    def rate(self, dtype: torch.dtype) -> float:
        """Returns the median rate of matrix products in GFLOP/s."""
        return statistics.median(self.gflops[dtype])

    @property
    def reread(self) -> float:
        """Median rate of repeated reading in GB/s."""
        return statistics.median(self.reread_gb_s)

    @property
    def bandwidth(self) -> float:
        """Median rate of reading in GB/s."""
        return statistics.median(self.read_gb_s)

    def describe(self) -> str:
        """Returns one line with each rate and its spread."""
        rates = [f"{_name(dtype)} {spread(rates, '.0f')} GFLOP/s" for dtype, rates in self.gflops.items()]
        return (
            f"Limits of these {torch.get_num_threads()} threads, median (lowest to highest): {', '.join(rates)}, "
            f"reading {spread(self.read_gb_s, '.1f')} GB/s, rereading {LSTM_BYTES >> 20} MB "
            f"{spread(self.reread_gb_s, '.1f')} GB/s."
        )


def spread(values: Sequence[float], form: str) -> str:
    """Formats a median with the lowest and the highest value, such as `3.1 (2.9 to 3.4)`.

    >>> spread([3.0, 1.0, 2.0], ".1f")
    '2.0 (1.0 to 3.0)'
    """
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def _product_rate(dtype: torch.dtype, *, tries: int = 4, times: int = 5) -> float:
    """Returns the rate of the faster of packed and plain products."""
    M, K, N = PRODUCT
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to(dtype)
    weight = torch.randn(N, K, generator=generator).to(dtype)
    seconds = []
    for lay_out in (True, False):
        matrix = PackedMatrix(weight, num_rows=M, lay_out=lay_out)

        def multiply(_: int, matrix: PackedMatrix = matrix) -> None:
            for _ in range(times):
                matrix(x)

        seconds.append(_best(multiply, tries))
    return torch.get_num_threads() * times * 2 * M * K * N / min(seconds) / 1e9


def _read_rate(num_bytes: int, *, times: int = 1, tries: int = 4) -> float:
    blocks: list[Tensor] = [torch.ones(num_bytes // 4) for _ in range(torch.get_num_threads())]

    seconds = []
    for reduce in (torch.sum, torch.max):  # the faster of the two depends on the processor

        def read(thread: int, reduce: Callable[[Tensor], Tensor] = reduce) -> None:
            for _ in range(times):
                reduce(blocks[thread])

        seconds.append(_best(read, tries))
    return len(blocks) * times * num_bytes / min(seconds) / 1e9


def _best(work: Callable[[int], None], tries: int) -> float:
    """Returns the seconds of the fastest of several tries with one concurrent call per thread."""
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        map_single_threaded(work, range(torch.get_num_threads()))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
