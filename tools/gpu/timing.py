"""Times of variants that run in turns, measured with CUDA events on a GPU, and peak memory."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")
SLOW = 4.0


@dataclass
class Timing:
    """Seconds of repeated measurements.

    Attributes:
        seconds: Seconds of each measurement.
        warm_up_s: Seconds of the first call, which is not a measurement.
        peak_bytes: Peak memory of the first call in bytes.
    """

    seconds: list[float] = field(default_factory=list)
    warm_up_s: float = 0.0
    peak_bytes: int = 0

    @property
    def median_s(self) -> float:
        """Median of the measurements."""
        return statistics.median(self.seconds)

    def spread(self, factor: float = 1.0) -> dict[str, float]:
        """Returns median, minimum and maximum, multiplied by a factor, such as 1000 for milliseconds."""
        return {
            "median": factor * self.median_s,
            "min": factor * min(self.seconds),
            "max": factor * max(self.seconds),
            "measurements": len(self.seconds),
        }


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of one call, including the work of the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    on_clock = time.perf_counter() - start
    return float(first.elapsed_time(last)) / 1e3 or on_clock  # events may have no resolution


def time_in_turns(
    variants: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, variant_s: float
) -> dict[str, Timing]:
    """Measures variants in turns, after a first call of each.

    Args:
        variants: Name -> function to measure.
        device: Device of the computation.
        repeats: Largest number of measurements per variant.
        variant_s: Total seconds after which a variant is not measured again. If the first call takes longer than `SLOW` times
            this value, it is the only measurement.

    Returns:
        Name -> timing, in the order of `variants`.
    """
    timings = {}
    for name, function in variants.items():
        reset_peak()
        before = memory_in_use()
        timings[name] = timing = Timing()
        timing.warm_up_s = seconds_of(function, device)
        timing.peak_bytes = max(0, peak_memory() - before)
        if timing.warm_up_s > SLOW * variant_s:
            timing.seconds.append(timing.warm_up_s)
    for _ in range(repeats):
        for name, function in variants.items():
            timing = timings[name]
            if timing.warm_up_s <= SLOW * variant_s and sum(timing.seconds) < variant_s:
                timing.seconds.append(seconds_of(function, device))
    return timings


def in_turns_or_alone(
    names: Sequence[str], measure: Callable[[Sequence[str]], Mapping[str, T]], release: Callable[[], None]
) -> dict[str, T | None]:
    """Measures variants together, or one at a time if memory cannot hold all of them.

    Args:
        names: Names of the variants.
        measure: Function that measures the named variants.
        release: Function that frees the memory of the variants.

    Returns:
        Name -> measurement, or None for a variant that runs out of memory alone.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        return dict(measure(names))
    found: dict[str, T | None] = {}
    for name in names:
        release()
        found[name] = None
        with contextlib.suppress(torch.OutOfMemoryError):
            found.update(measure([name]))
    release()
    return found


def reset_peak() -> None:
    """Starts a new measurement of peak memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_in_use() -> int:
    """Returns the bytes of GPU memory that tensors use, or 0 without a GPU."""
    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else 0


def peak_memory() -> int:
    """Returns the peak memory since `reset_peak` in bytes, or 0 without a GPU."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
