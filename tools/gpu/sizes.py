"""What the sections measure, and how often: the full check, and a quick one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from musicgen_eval.records import StepKernels


@dataclass(frozen=True)
class Sizes:
    """Sizes of the check.

    Attributes:
        shapes: networks, as in `benchmarks/models.py`.
        batches: rows per batch, without those that guidance adds.
        repeats: how often each variant is measured at most.
        variant_s: a variant is not repeated once it has taken so many seconds.
        copy_bytes: size of the tensors whose copying shows the bandwidth.
        matmul_sizes: (M, K, N) of the products whose best rate is the peak.
        oracle_cases: folders of tests/data/oracle.
        oracle_precisions: precisions that are compared with the oracle.
        window_s: length of a scored window.
        prompt_frames: prompt of a continuation.
        num_turns: steps per measurement of the package's own loop.
        slow_turns: steps per measurement of the other loops.
        text_tokens: length of a text.
        option_shape: network that the options and the profile are measured on.
        kernels: kernels of the options.
        option_batches: batches of the options.
        key_lengths: how many new key lengths attention meets.
        profiled_turns: steps in the profile.
        demo_tracks: tracks of the demo that two equal runs measure.
        precisions: precisions of two equal runs.
        tests: test files and folders, from the root of the repository.
    """

    shapes: tuple[str, ...] = ("small", "large", "medium", "demo")
    batches: tuple[int, ...] = (1, 32, 8)
    repeats: int = 3
    variant_s: float = 1.0
    copy_bytes: int = 1 << 31
    matmul_sizes: tuple[tuple[int, int, int], ...] = (
        (4096, 4096, 4096),
        (8192, 8192, 8192),
        (16384, 8192, 8192),
        (12032, 2048, 8192),
    )
    oracle_cases: tuple[str, ...] = ("mono_T50", "mono_T200", "stereo_T50")
    oracle_precisions: tuple[str, ...] = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
    window_s: float = 30.0
    prompt_frames: int = 500
    num_turns: int = 96
    slow_turns: int = 12
    text_tokens: int = 12
    option_shape: str = "small"
    kernels: tuple[StepKernels, ...] = ("eager", "graph", "compiled")
    option_batches: tuple[int, ...] = (1, 8)
    key_lengths: int = 8
    profiled_turns: int = 50
    demo_tracks: int = 4
    precisions: tuple[str, ...] = ("32-true", "bf16-mixed")
    tests: tuple[str, ...] = (
        "tests/cuda",
        "tests/support/test_pretend_cuda.py",
        "tests/metrics/plugin/test_bank.py",
    )


FULL = Sizes()
QUICK = replace(
    FULL,
    shapes=("small",),
    batches=(1, 8),
    repeats=2,
    variant_s=0.5,
    num_turns=48,
    slow_turns=8,
    kernels=("eager", "graph"),
    option_batches=(1,),
    key_lengths=4,
    demo_tracks=1,
    tests=("tests/cuda",),
)
