"""What will be continued: where in each track, by how much, and how much of it is heard before.

Knows frames and settings; the tracks are `planning.py`'s.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.data.index_builder import Opening
from musicgen_eval.data.planning import DataSettings, Outcome, Plan, check_settings, make_plan
from musicgen_eval.data.windows import WindowPlan, plan_continuations, whole_frames
from musicgen_eval.errors import RunError, WindowError
from musicgen_eval.models.decoder.sampling import check_sampling
from musicgen_eval.records import CodecSpec, ContinuationSettings

MAX_THREADS = 1024  # torch accepts any number, and the process then dies for lack of memory


def plan_continuation(
    settings: DataSettings, spec: CodecSpec, continuation: ContinuationSettings, opening: Opening | None = None
) -> Plan:
    """Reads the source, opens every track whose length is not given, once, and plans its continuations.

    Args:
        settings: context_s is where a continuation begins and target_s how long it gets; each is half of a track unless given.
        spec: the checkpoint's codes.
        continuation: gives the stride and how many continuations a track has.
        opening: how tracks are opened, and where it is kept what they hold.

    Raises:
        SourceError: the source does not yield tracks.
        WindowError: a context that the model cannot hear whole, or a stride that cannot be.
        RunError: more failures than allowed, settings that mean nothing here, or nothing left to continue.
    """
    check_settings(settings)
    for name, meaningless in (("head", settings.head != "score"), ("allow_beyond_limit", settings.allow_beyond_limit)):
        if meaningless:
            raise RunError(f"data.{name} says how windows are scored, and means nothing in predict; leave it out")
    stride_frames = settle_stride(continuation, spec)
    context_frames, target_frames = settle_continuation(settings, spec, stride_frames)

    def outcome(num_frames: int) -> Outcome:
        context = num_frames // 2 if context_frames is None else context_frames
        if not 0 < context <= num_frames or (target_frames is None and context == num_frames):
            asked = (1 if context_frames is None else context_frames) / spec.frame_rate_hz
            after = (
                "" if target_frames is not None else " and more to continue to; give a duration to go on past its end"
            )
            return "too_short", f"does not hold a context of {asked:g} s{after}"
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
    """Refuses settings of a continuation that mean nothing, before anything is opened.

    Raises:
        RunError: names the setting.
        WindowError: a stride that cannot be.
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
        raise RunError(f"guidance_scale must be at least 1, which is none, got {continuation.guidance_scale}")
    if continuation.temperature == 0 and continuation.num_continuations > 1:
        raise RunError(
            "temperature=0 takes the likeliest codes, so continuations of a track are one and the same; ask for one"
        )
    for name in ("num_continuations", "threads"):
        number = getattr(continuation, name)
        if number is not None and number < 1:
            raise RunError(f"{name} must be at least 1, got {number}")
    if continuation.threads is not None and continuation.threads > MAX_THREADS:
        raise RunError(f"threads must be at most {MAX_THREADS}, got {continuation.threads}")


def settle_stride(continuation: ContinuationSettings, spec: CodecSpec) -> int:
    """By how many frames the window slides: 3/5 of the checkpoint's limit unless given.

    Raises:
        WindowError: a stride that is zero, no whole number of frames, or not below the window.
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
    """Context and continuation in frames; None where each track gives its own half.

    Raises:
        WindowError: less than a frame, no whole number of frames, or a context that cannot be heard whole.
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
    """Refuses a context that was asked for and that the model could not hear whole.

    Raises:
        WindowError: says what would fit.
    """
    longest = spec.max_frames - stride_frames
    if context_frames + target_frames <= spec.max_frames or context_frames <= longest:
        return
    rate = spec.frame_rate_hz
    raise WindowError(
        f"context_s={context_frames / rate:g} and {target_frames / rate:g} s after it are over the checkpoint's "
        f"{spec.max_frames / rate:g} s, so windows slide by {stride_frames / rate:g} s and hear {longest / rate:g} s at most; "
        "shorten the context or the continuation, or set a smaller stride_s"
    )
