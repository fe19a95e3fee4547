"""Sizes and numbers of the measurements, for the full and the quick check."""

from __future__ import annotations

from dataclasses import dataclass, replace

from musicgen_eval.records import StepKernels


@dataclass(frozen=True)
class Sizes:
    """Sizes of the check.

    Attributes:
        shapes: Names of the networks in `benchmarks/models.py`.
        batches: Numbers of rows per batch, without those for guidance.
        repeats: Largest number of measurements per variant.
        variant_s: Total seconds after which a variant is not measured again.
        copy_bytes: Size of the tensors that are copied to measure the bandwidth.
        matmul_sizes: (M, K, N) of the products whose best rate is the peak.
        oracle_cases: Folders of tests/data/oracle.
        oracle_precisions: Precisions that are compared with the oracle.
        window_s: Length of a scored window in seconds.
        prompt_frames: Length of the prompt of a continuation in frames.
        num_turns: Number of steps per measurement of the package's loop.
        slow_turns: Number of steps per measurement of the other loops.
        text_tokens: Length of a text in tokens.
        option_shape: Network of the sections `options` and `profile`.
        kernels: Kernels of the section `options`.
        option_batches: Batches of the section `options`.
        key_lengths: Number of new key lengths for attention.
        profiled_turns: Number of steps in the profile.
        demo_tracks: Number of demo tracks in two equal runs.
        precisions: Precisions of two equal runs.
        tests: Test files and folders, relative to the root of the repository.
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
