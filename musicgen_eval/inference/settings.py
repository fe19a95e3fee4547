"""Defines the settings for generating continuations."""

from __future__ import annotations

from dataclasses import dataclass

from musicgen_eval.errors import RunError, WindowError
from musicgen_eval.models.decoder.sampling_settings import SamplingSettings
from musicgen_eval.records import CodecSpec, StepKernels

MAX_THREADS = 1024  # torch accepts any number, but with too many threads the process runs out of memory


@dataclass(frozen=True, kw_only=True)
class ContinuationSettings(SamplingSettings):
    """Settings for generating continuations.

    Attributes:
        stride_s: Number of seconds by which the window slides if the prompt and the continuation together exceed the checkpoint's
            limit. Defaults to 3/5 of the limit.
        num_continuations: Number of continuations per track, each with its own random numbers.
        threads: Number of CPU threads for generating codes and decoding audio. Defaults to the number that torch uses. The number
            of threads affects the last bits of the results, and can therefore change which codes are sampled. Decoding steps for
            small batches always use one thread.
        kernels: Implementation of decoding steps on CUDA. `graph` replays a CUDA graph, `compiled` replays a graph of kernels that
            `torch.compile` has fused, and `eager` launches each kernel individually. Ignored on CPUs, which have their own kernels.
    """

    stride_s: float | None = None
    num_continuations: int = 1
    threads: int | None = None
    kernels: StepKernels = "graph"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_0("stride_s")
        self.require_at_least(1, "num_continuations", "threads")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise RunError(f"threads must be at most {MAX_THREADS}, got {self.threads}")
        if self.temperature == 0 and self.num_continuations > 1:
            raise RunError(
                f"num_continuations is {self.num_continuations}, but at temperature 0 all continuations of a track are identical; "
                "set model.continuation.num_continuations to 1 or increase model.continuation.temperature"
            )

    def check_for(self, spec: CodecSpec) -> None:
        """Checks the settings whose valid ranges depend on the checkpoint.

        Raises:
            RunError: If `top_k` exceeds the size of a codebook.
            WindowError: If the stride is out of range, or if it is not a whole number of frames.
        """
        self.check(spec.codebook_size)
        self.stride_frames(spec)

    def stride_frames(self, spec: CodecSpec) -> int:
        """Returns the stride of the sliding window, in frames.

        Raises:
            WindowError: If the stride is zero, not a whole number of frames, or not shorter than the window.
        """
        if self.stride_s is None:
            return 3 * spec.max_frames // 5
        stride = spec.whole_frames(self.stride_s, setting="stride_s")
        if not 1 <= stride < spec.max_frames:
            raise WindowError(
                "stride_s must be above 0 and below the checkpoint's window of "
                f"{spec.max_frames / spec.frame_rate_hz:g} s, got {self.stride_s:g}"
            )
        return stride
