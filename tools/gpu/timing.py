"""Times of variants that take turns, by CUDA events where there are any, and peaks of memory."""

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
        seconds: one number per measurement.
        warm_up_s: seconds of the first, unmeasured call.
        peak_bytes: largest memory in use during the first call.
    """

    seconds: list[float] = field(default_factory=list)
    warm_up_s: float = 0.0
    peak_bytes: int = 0

    @property
    def median_s(self) -> float:
        """Median."""
        return statistics.median(self.seconds)

    def spread(self, factor: float = 1.0) -> dict[str, float]:
        """Median, smallest and largest, times a factor, such as 1000 for milliseconds."""
        return {
            "median": factor * self.median_s,
            "min": factor * min(self.seconds),
            "max": factor * max(self.seconds),
            "measurements": len(self.seconds),
        }


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
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
    return float(first.elapsed_time(last)) / 1e3 or on_clock  # events that resolve no time are of no use


def time_in_turns(
    variants: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, variant_s: float
) -> dict[str, Timing]:
    """Times variants that take turns, after one call of each that warms it up.

    Args:
        variants: name -> what to time.
        device: the device that computes.
        repeats: how often each variant is measured at most.
        variant_s: a variant is not repeated once its measurements have taken this long together. One whose first call takes longer
            than `SLOW` times this is not called again, and that call is its only measurement.

    Returns:
        name -> its timing, in the order of `variants`.
    """
    timings = {}
    for name, function in variants.items():
        forget_peak()
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
        names: of the variants.
        measure: measures some of them.
        release: frees the memory that variants keep.

    Returns:
        name -> what was measured; None for a variant that runs out of memory alone, too.
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


def forget_peak() -> None:
    """Begins to look for the largest memory in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_in_use() -> int:
    """Bytes of the GPU's memory that tensors hold; 0 without a GPU."""
    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else 0


def peak_memory() -> int:
    """Largest number of bytes since `forget_peak`; 0 without a GPU."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
