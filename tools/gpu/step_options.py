"""Section `options`: speed of decode steps with different kernels, and costs of cuDNN attention with new shapes."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch.nn import functional

from musicgen_eval.models.decoder.sampling import Sampling
from musicgen_eval.models.numerics import full_precision
from musicgen_eval.records import StepKernels
from tools.gpu.continuation_speed import OwnLoop, step_times
from tools.gpu.findings import Findings
from tools.gpu.networks import Networks, release_memory
from tools.gpu.sections import Check
from tools.gpu.timing import seconds_of

COMPILING_S = 45.0
"""Expected seconds of the first compilation."""


def run(check: Check, findings: Findings) -> None:
    """Measures attention with growing keys first, then the kernels, ending with the compiled ones, which take longest."""
    _cudnn_attention(check, findings)
    findings.note(
        f"The steps are those of {check.sizes.option_shape} in bfloat16 without a prompt. `first_run_s` includes compilation and "
        "capture. `codes_as_eager` is the share of codes that equal those of eager steps with the same random numbers."
    )
    networks = Networks.load(check.sizes.option_shape, check.device)
    with torch.inference_mode(), full_precision():
        _kernels(check, findings, networks, check.sizes.option_batches[0], "graph", sampling=Sampling(temperature=0))
        for kernels in check.sizes.kernels:
            needed_s = COMPILING_S if kernels == "compiled" else check.sizes.variant_s
            for batch in check.sizes.option_batches:
                needed_s = _kernels(check, findings, networks, batch, kernels, needed_s=needed_s)


def _kernels(
    check: Check,
    findings: Findings,
    networks: Networks,
    batch: int,
    kernels: StepKernels,
    *,
    needed_s: float = 0.0,
    sampling: Sampling | None = None,
) -> float:
    """Measures steps with one kind of kernels if enough time remains. Returns the seconds that the next batch will need."""
    fused, turns = networks.fused["bfloat16"], check.sizes.num_turns
    name = kernels if sampling is None else f"{kernels}, most likely code instead of sampling"
    with findings.case("Kernels of decode steps", batch=batch, kernels=name) as row:
        if check.left_s < needed_s:
            row["error"] = "no time left"
            return needed_s
        prompt, texts = networks.codes(batch, 1), networks.texts(batch, check.sizes.text_tokens)
        eager = OwnLoop(fused, prompt, texts, max_turns=turns, kernels="eager", sampling=sampling)(turns).clone()
        release_memory(fused)
        loop = OwnLoop(fused, prompt, texts, max_turns=turns, kernels=kernels, sampling=sampling)
        first_run_s = seconds_of(partial(loop, turns), check.device)
        step, timing = step_times(check, {name: (loop, turns)})[name]
        row.update(
            first_run_s=first_run_s,
            codes_as_eager=float((loop(turns) == eager).float().mean()),
            peak_GB=timing.peak_bytes / 1e9,
        )
        needed_s = max(needed_s if kernels != "compiled" else 0.0, 1.5 * first_run_s)
        if step["median"] > 0:
            milliseconds = {key: value if key == "measurements" else 1e3 * value for key, value in step.items()}
            row.update(steps_per_s=1 / step["median"], ms_per_step=milliseconds)
    release_memory(fused)
    return needed_s


def _cudnn_attention(check: Check, findings: Findings) -> None:
    """Measures attention of one query to growing keys, as in a loop with a cache, with and without the kernel of cuDNN."""
    found = torch.backends.cuda.cudnn_sdp_enabled()
    q = torch.ones((2, 16, 1, 64), dtype=torch.bfloat16, device=check.device)
    try:
        for is_allowed in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(is_allowed)
            first: list[float] = []
            again: list[float] = []
            for length in range(501, 501 + check.sizes.key_lengths):
                keys = torch.ones((2, 16, length, 64), dtype=torch.bfloat16, device=check.device)
                attend = partial(functional.scaled_dot_product_attention, q, keys, keys)
                first.append(seconds_of(attend, check.device))
                again.append(seconds_of(attend, check.device))
            findings.add(
                "Attention to new key lengths",
                cudnn="allowed" if is_allowed else "off, as in this package",
                new_lengths=len(first),
                first_call_ms=1e3 * statistics.median(first[1:]),
                second_call_ms=1e3 * statistics.median(again[1:]),
            )
    finally:
        torch.backends.cuda.enable_cudnn_sdp(found)
