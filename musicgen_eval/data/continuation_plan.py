"""Plans continuations: the boundary in each track, and the lengths of prompt and continuation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.data.index_builder import Opening
from musicgen_eval.data.planning import DataSettings, Outcome, Plan, check_settings, make_plan
from musicgen_eval.data.windows import WindowPlan, plan_continuations, whole_frames
from musicgen_eval.errors import RunError, WindowError
from musicgen_eval.models.decoder.sampling import check_sampling
from musicgen_eval.records import CodecSpec, ContinuationSettings

MAX_THREADS = 1024  # torch accepts any number, but the process then runs out of memory


def plan_continuation(
    settings: DataSettings, spec: CodecSpec, continuation: ContinuationSettings, opening: Opening | None = None
) -> Plan:
    """Reads the source, opens every track whose duration is not declared, and plans the continuations.

    Args:
        settings: `context_s` sets the boundary and `target_s` the length of a continuation, both in seconds. The defaults are the
            middle of the track and the rest of the track.
        spec: Codec parameters of the checkpoint.
        continuation: Sets the stride and the number of continuations per track.
        opening: How tracks are opened, and where the index of tracks is saved.

    Raises:
        SourceError: The source contains no tracks or cannot be read.
        WindowError: The context does not fit a window, or the stride is out of range.
        RunError: More tracks failed than allowed, a setting does not apply to predict, or no track can be continued.
    """
    check_settings(settings)
    for name, meaningless in (("head", settings.head != "score"), ("allow_beyond_limit", settings.allow_beyond_limit)):
        if meaningless:
            raise RunError(f"data.{name} does not apply to predict; remove it")
    stride_frames = settle_stride(continuation, spec)
    context_frames, target_frames = settle_continuation(settings, spec, stride_frames)

    def outcome(num_frames: int) -> Outcome:
        context = num_frames // 2 if context_frames is None else context_frames
        if not 0 < context <= num_frames or (target_frames is None and context == num_frames):
            asked = (1 if context_frames is None else context_frames) / spec.frame_rate_hz
            if target_frames is None:
                return (
                    "too_short",
                    f"is not longer than a context of {asked:g} s; set data.target_s to continue past the end of the track",
                )
            return "too_short", f"is shorter than a context of {asked:g} s"
        if target_frames is None and context_frames is not None:
            check_context(context, num_frames - context, spec, stride_frames)
        return "ok", ""

    def windows(num_frames: NDArray[np.int64]) -> WindowPlan:
        return plan_continuations(
            num_frames,
            context_frames,
            target_frames,
            max_frames=spec.max_frames,
            stride_frames=stride_frames,
            num_continuations=continuation.num_continuations,
        )

    return make_plan(
        settings, spec, outcome, windows, context_frames, target_frames, task="continue", opening=opening or Opening()
    )


def check_continuation(continuation: ContinuationSettings, spec: CodecSpec) -> None:
    """Checks the settings of a continuation before anything is opened.

    Raises:
        RunError: A setting is out of range.
        WindowError: The stride is out of range or not a whole number of frames.
    """
    settle_stride(continuation, spec)
    try:
        check_sampling(
            temperature=continuation.temperature,
            top_k=continuation.top_k,
            top_p=continuation.top_p,
            codebook_size=spec.codebook_size,
        )
    except ValueError as error:
        raise RunError(str(error)) from error
    if not 1 <= continuation.guidance_scale < float("inf"):
        raise RunError(f"guidance_scale must be at least 1 (no guidance) and finite, got {continuation.guidance_scale}")
    if continuation.temperature == 0 and continuation.num_continuations > 1:
        raise RunError(
            f"num_continuations is {continuation.num_continuations}, but at temperature 0 all continuations of a track are equal; "
            "set model.continuation.num_continuations to 1 or raise model.continuation.temperature"
        )
    for name in ("num_continuations", "threads"):
        number = getattr(continuation, name)
        if number is not None and number < 1:
            raise RunError(f"{name} must be at least 1, got {number}")
    if continuation.threads is not None and continuation.threads > MAX_THREADS:
        raise RunError(f"threads must be at most {MAX_THREADS}, got {continuation.threads}")


def settle_stride(continuation: ContinuationSettings, spec: CodecSpec) -> int:
    """Returns the stride of the sliding window in frames; the default is 3/5 of the checkpoint's limit.

    Raises:
        WindowError: The stride is zero, not a whole number of frames, or not shorter than the window.
    """
    if continuation.stride_s is None:
        return 3 * spec.max_frames // 5
    stride = whole_frames(continuation.stride_s, spec.frame_rate_hz, setting="stride_s")
    if not 1 <= stride < spec.max_frames:
        raise WindowError(
            f"stride_s={continuation.stride_s:g} must be above 0 and below the checkpoint's window of "
            f"{spec.max_frames / spec.frame_rate_hz:g} s"
        )
    return stride


def settle_continuation(settings: DataSettings, spec: CodecSpec, stride_frames: int) -> tuple[int | None, int | None]:
    """Returns the lengths of context and continuation in frames; None stands for half of each track.

    Raises:
        WindowError: A length is shorter than a frame or not a whole number of frames, or the context does not fit a window.
    """
    rate = spec.frame_rate_hz
    given: list[int | None] = []
    for name, seconds in (("context_s", settings.context_s), ("target_s", settings.target_s)):
        if seconds is not None and not seconds * rate >= 1 - 1e-6:
            raise WindowError(f"{name}={seconds:g} is shorter than one frame ({1 / rate:g} s)")
        given.append(None if seconds is None else whole_frames(seconds, rate, setting=name))
    context, target = given
    if context is not None:
        check_context(context, 1 if target is None else target, spec, stride_frames)
    return context, target


def check_context(context_frames: int, target_frames: int, spec: CodecSpec, stride_frames: int) -> None:
    """Checks that an explicit context fits the first window.

    Raises:
        WindowError: The context is too long; the message gives the longest context that fits.
    """
    longest = spec.max_frames - stride_frames
    if context_frames + target_frames <= spec.max_frames or context_frames <= longest:
        return
    rate = spec.frame_rate_hz
    raise WindowError(
        f"context_s={context_frames / rate:g} and a continuation of {target_frames / rate:g} s exceed the checkpoint's limit of "
        f"{spec.max_frames / rate:g} s, so the window slides by {stride_frames / rate:g} s and the context must be at most "
        f"{longest / rate:g} s; shorten data.context_s or data.target_s, or reduce model.continuation.stride_s"
    )
