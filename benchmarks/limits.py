"""What this machine can do at best: products per second and bytes read per second, sampled between the turns of a benchmark.

A ratio against a baseline depends on the machine. The share of the machine's limit tells what is left to gain on it.
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
"""Rows, inputs and outputs of the products that are timed: a feed-forward layer of musicgen-small over one window."""
READ_BYTES = 1 << 28
"""Bytes that each thread reads; far more than its caches hold."""
LSTM_BYTES = 1 << 24
"""Bytes that a layer of the codec's LSTM reads in each of its steps; more than the cache of one core holds."""


@dataclass
class Limits:
    """Rates of the processor, sampled several times.

    Attributes:
        gflops: rates of packed products per dtype, one product per thread, all threads at once, in GFLOP/s.
        read_gb_s: rates of reading memory with all threads, in GB/s.
        reread_gb_s: the same where each thread reads its own `LSTM_BYTES` again and again.
    """

    gflops: dict[torch.dtype, list[float]] = field(default_factory=dict)
    read_gb_s: list[float] = field(default_factory=list)
    reread_gb_s: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Measures each rate again, as the best of a few tries."""
        for dtype in filter(can_pack, (torch.float32, torch.bfloat16)):
            self.gflops.setdefault(dtype, []).append(_product_rate(dtype))
        self.read_gb_s.append(_read_rate(READ_BYTES))
        self.reread_gb_s.append(_read_rate(LSTM_BYTES, times=16))

    def rate(self, dtype: torch.dtype) -> float:
        """GFLOP/s: the median."""
        return statistics.median(self.gflops[dtype])

    @property
    def reread(self) -> float:
        """GB/s: the median."""
        return statistics.median(self.reread_gb_s)

    @property
    def bandwidth(self) -> float:
        """GB/s: the median."""
        return statistics.median(self.read_gb_s)

    def describe(self) -> str:
        """One line with every rate and its spread."""
        rates = [f"{_name(dtype)} {spread(rates, '.0f')} GFLOP/s" for dtype, rates in self.gflops.items()]
        return (
            f"Limits of these {torch.get_num_threads()} threads, median (lowest to highest): {', '.join(rates)}, "
            f"reading {spread(self.read_gb_s, '.1f')} GB/s, reading {LSTM_BYTES >> 20} MB again and again "
            f"{spread(self.reread_gb_s, '.1f')} GB/s."
        )


def spread(values: Sequence[float], form: str) -> str:
    """A median with the lowest and the highest value: `3.1 (2.9 to 3.4)`.

    >>> spread([3.0, 1.0, 2.0], ".1f")
    '2.0 (1.0 to 3.0)'
    """
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def _product_rate(dtype: torch.dtype, *, tries: int = 4, times: int = 5) -> float:
    """The faster of packed and plain products."""
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
    for reduce in (torch.sum, torch.max):  # which of the two reads faster depends on the processor

        def read(thread: int, reduce: Callable[[Tensor], Tensor] = reduce) -> None:
            for _ in range(times):
                reduce(blocks[thread])

        seconds.append(_best(read, tries))
    return len(blocks) * times * num_bytes / min(seconds) / 1e9


def _best(work: Callable[[int], None], tries: int) -> float:
    """Seconds of the fastest of several tries, one call per thread side by side."""
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        map_single_threaded(work, range(torch.get_num_threads()))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
