"""Plans continuations: determines the boundary in each track, the length of the prompt and the length of the continuation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.data.index_builder import OpenOptions
from musicgen_eval.data.plan import Plan
from musicgen_eval.data.plan_builder import Outcome, make_plan
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.data.windows import WindowPlan, plan_continuations
from musicgen_eval.errors import WindowError
from musicgen_eval.records import CodecSpec


def plan_continuation(
    settings: DataSettings,
    spec: CodecSpec,
    *,
    stride_frames: int,
    num_continuations: int,
    options: OpenOptions | None = None,
) -> Plan:
    """Creates the plan of a run that generates continuations.

    This function reads the source, and opens every track whose duration is not declared.

    Args:
        settings: Data settings. `context_s` sets the boundary, in seconds. By default, the boundary is the middle of the track.
            `target_s` sets the length of the continuation, in seconds. By default, the continuation ends where the track ends.
        spec: Codec parameters of the checkpoint.
        stride_frames: Number of frames that the window slides by if the prompt and the continuation together exceed the
            checkpoint's limit.
        num_continuations: Number of continuations per track.
        options: Options for opening the tracks, including the path of the track index.

    Raises:
        SourceError: The source cannot be read or contains no tracks.
        WindowError: The context does not fit into a window.
        RunError: More tracks failed than allowed, a setting that does not apply to `predict` is set, or no track can be continued.
    """
    settings.refuse_scoring_only("data")
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
            num_continuations=num_continuations,
        )

    return make_plan(
        settings,
        spec,
        outcome,
        windows,
        context_frames,
        target_frames,
        task="continue",
        options=options or OpenOptions(),
    )


def settle_continuation(settings: DataSettings, spec: CodecSpec, stride_frames: int) -> tuple[int | None, int | None]:
    """Returns the lengths of the context and of the continuation, in frames. A length that is not set is returned as None.

    Raises:
        WindowError: A length is less than one frame or is not a whole number of frames, or the context does not fit into a window.
    """
    rate = spec.frame_rate_hz
    given: list[int | None] = []
    for name, seconds in (("context_s", settings.context_s), ("target_s", settings.target_s)):
        if seconds is not None and not seconds * rate >= 1 - 1e-6:
            raise WindowError(f"{name}={seconds:g} is shorter than one frame ({1 / rate:g} s)")
        given.append(None if seconds is None else spec.whole_frames(seconds, setting=name))
    context, target = given
    if context is not None:
        check_context(context, 1 if target is None else target, spec, stride_frames)
    return context, target


def check_context(context_frames: int, target_frames: int, spec: CodecSpec, stride_frames: int) -> None:
    """Checks that the context fits into the first window, if the length of the context is set explicitly.

    Raises:
        WindowError: The context is too long. The message states the maximum length.
    """
    longest = spec.max_frames - stride_frames
    if context_frames + target_frames <= spec.max_frames or context_frames <= longest:
        return
    rate = spec.frame_rate_hz
    raise WindowError(
        f"context_s={context_frames / rate:g} and a continuation of {target_frames / rate:g} s together exceed the "
        f"checkpoint's limit of {spec.max_frames / rate:g} s, so the window slides by {stride_frames / rate:g} s and the "
        f"context must be at most {longest / rate:g} s; reduce data.context_s, data.target_s or "
        "model.continuation.stride_s"
    )
