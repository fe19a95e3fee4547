"""Section `peaks`: the bandwidth and the rate of matrix products that the device reaches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from musicgen_eval.models.numerics import full_precision
from tools.gpu.findings import Findings
from tools.gpu.sections import Check
from tools.gpu.timing import time_in_turns

BANDWIDTH = "bytes_per_s"


def matmul_peak(dtype: str) -> str:
    """Returns the name of the peak rate of products of a dtype, in operations per second."""
    return f"{dtype}_flop_per_s"


def run(check: Check, findings: Findings) -> None:
    """Measures both peaks. Each is the best of several operations."""
    with torch.inference_mode(), full_precision():
        _bandwidth(check, findings)
        for dtype in (torch.bfloat16, torch.float32):
            _products(check, findings, dtype)
    findings.note(
        "The peaks are the fastest measurement of the fastest operation. Shares in later sections are shares of these figures. "
        "float32 products use no TF32, and sums of bfloat16 products are in float32, as in this package."
    )


def _bandwidth(check: Check, findings: Findings) -> None:
    num_bytes = check.sizes.copy_bytes
    source = torch.ones(num_bytes // 4, device=check.device)
    target = torch.empty_like(source)
    operations: dict[str, tuple[int, Callable[[], object]]] = {
        "copy (reads and writes)": (2 * num_bytes, lambda: target.copy_(source)),
        "sum (reads)": (num_bytes, lambda: source.sum()),
        "row sums (reads)": (num_bytes, lambda: source.view(-1, 1 << 10).sum(1)),
    }
    timings = time_in_turns(
        {name: function for name, (_, function) in operations.items()},
        check.device,
        repeats=4 * check.sizes.repeats,
        variant_s=check.sizes.variant_s,
    )
    for name, timing in timings.items():
        rate = operations[name][0] / min(timing.seconds)
        findings.add("Memory", operation=name, GB=num_bytes / 1e9, ms=timing.spread(1e3), TB_per_s=rate / 1e12)
        check.peaks[BANDWIDTH] = max(rate, check.peaks.get(BANDWIDTH, 0.0))


def _products(check: Check, findings: Findings, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    for M, K, N in check.sizes.matmul_sizes:
        with findings.case("Products", dtype=name, M=M, K=K, N=N) as row:
            x, weight = (torch.randn(size, device=check.device).to(dtype) for size in ((M, K), (N, K)))
            timing = time_in_turns(
                {"product": lambda x=x, weight=weight: torch.nn.functional.linear(x, weight)},  # type: ignore[misc]
                check.device,
                repeats=4 * check.sizes.repeats,
                variant_s=check.sizes.variant_s / 4,
            )["product"]
            rate = 2 * M * K * N / min(timing.seconds)
            row.update(ms=timing.spread(1e3), TFLOP_per_s=rate / 1e12)
            check.peaks[matmul_peak(name)] = max(rate, check.peaks.get(matmul_peak(name), 0.0))
