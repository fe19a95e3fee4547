"""Section `profile`: kernels of decode steps, launches per step, and idle time of the device."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from musicgen_eval.models.numerics import full_precision
from musicgen_eval.records import StepKernels
from tools.gpu.continuation_speed import OwnLoop
from tools.gpu.findings import Findings
from tools.gpu.networks import Networks, release_memory
from tools.gpu.sections import Check

TOP_KERNELS = 15
KERNELS: tuple[StepKernels, ...] = ("graph", "eager")


def run(check: Check, findings: Findings) -> None:
    """Profiles captured steps and eager steps of a batch of one."""
    turns = check.sizes.profiled_turns
    findings.note(
        f"The profile contains {turns} steps of {check.sizes.option_shape} in bfloat16 at batch 1 with guidance, without a "
        "prompt. It also contains filling the tensors and reading the first step, which is the work of about one step. "
        "`device_idle_share` is the share of the time between the start of the first and the end of the last kernel in which no "
        "kernel ran."
    )
    networks = Networks.load(check.sizes.option_shape, check.device)
    with torch.inference_mode(), full_precision():
        for kernels in KERNELS:
            with findings.case("Steps", kernels=kernels) as row:
                _profile(check, findings, networks, kernels, row)
            release_memory(*networks.fused.values())


def _profile(check: Check, findings: Findings, networks: Networks, kernels: StepKernels, row: dict[str, Any]) -> None:
    turns = check.sizes.profiled_turns
    texts = networks.texts(1, check.sizes.text_tokens)
    loop = OwnLoop(networks.fused["bfloat16"], networks.codes(1, 1), texts, max_turns=turns, kernels=kernels)
    loop(turns)
    is_cuda = check.device.type == "cuda"
    wanted = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=[a for a in wanted if a in torch.profiler.supported_activities()]) as recorded:
        loop(turns)
        if is_cuda:
            torch.cuda.synchronize()
    events = list(recorded.events() or [])
    on_device = [
        event for event in events if event.device_type == DeviceType.CUDA and event.time_range.elapsed_us() > 0
    ]
    launches = Counter(
        event.name for event in events if event.name.startswith(("cudaLaunch", "cudaGraphLaunch", "cuLaunch"))
    )
    row.update(host_launches_per_step=launches.total() / turns, graph_launches=launches["cudaGraphLaunch"])
    if not on_device:
        findings.note("The profiler recorded no kernels on the device.")
        return
    busy_us, span_us = _busy(on_device)
    row.update(
        kernels_per_step=len(on_device) / turns,
        kernel_us_per_step=busy_us / turns,
        us_per_step=span_us / turns,
        device_idle_share=1 - busy_us / span_us,
    )
    totals: dict[str, list[float]] = defaultdict(list)
    for event in on_device:
        totals[event.name].append(event.time_range.elapsed_us())
    for name, each in sorted(totals.items(), key=lambda item: -sum(item[1]))[:TOP_KERNELS]:
        findings.add(
            f"Kernels by time, {kernels}",
            kernel=name[:100],
            calls_per_step=len(each) / turns,
            us_per_call=sum(each) / len(each),
            share_of_kernel_time=sum(each) / sum(map(sum, totals.values())),
        )


def _busy(events: Sequence[Any]) -> tuple[float, float]:
    """Returns the microseconds in which at least one event ran, and those from the first start to the last end."""
    ranges = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, reached = 0.0, ranges[0][0]
    for start, end in ranges:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - ranges[0][0]
