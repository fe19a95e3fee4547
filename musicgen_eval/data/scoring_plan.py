"""Plans an evaluation: divides every track into windows that consist of a context and a target."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.data.index_builder import OpenOptions
from musicgen_eval.data.plan import Plan
from musicgen_eval.data.plan_builder import Outcome, make_plan
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.data.windows import WindowPlan, check_limit, plan_windows
from musicgen_eval.records import CodecSpec


def plan_evaluation(settings: DataSettings, spec: CodecSpec, options: OpenOptions | None = None) -> Plan:
    """Creates the plan of a run that scores tracks.

    This function reads the source, and opens every track whose duration is not declared.

    Args:
        settings: Data settings.
        spec: Codec parameters of the checkpoint.
        options: Options for opening the tracks, including the path of the track index.

    Raises:
        SourceError: The source cannot be read or contains no tracks.
        WindowError: The context and the target together exceed the checkpoint's limit, or one of them is not a whole number of
            frames.
        RunError: More tracks failed than allowed, or no track can be scored.
    """
    context_frames, target_frames = settle_windows(settings, spec)

    def outcome(num_frames: int) -> Outcome:
        if settings.head == "skip" and num_frames <= context_frames:
            return (
                "too_short",
                f"is not longer than the context of {context_frames / spec.frame_rate_hz:g} s, and data.head is skip",
            )
        return "ok", ""

    def windows(num_frames: NDArray[np.int64]) -> WindowPlan:
        return plan_windows(num_frames, context_frames, target_frames, settings.head)

    return make_plan(
        settings, spec, outcome, windows, context_frames, target_frames, task="score", options=options or OpenOptions()
    )


def settle_windows(settings: DataSettings, spec: CodecSpec) -> tuple[int, int]:
    """Returns the length of the context and the length of the target, in frames.

    By default, each length is half of the checkpoint's limit.

    Raises:
        WindowError: The context and the target together exceed the checkpoint's limit, or one of them is not a whole number of
            frames.
    """
    half = spec.max_frames // 2
    context = half if settings.context_s is None else spec.whole_frames(settings.context_s, setting="context_s")
    target = half if settings.target_s is None else spec.whole_frames(settings.target_s, setting="target_s")
    plan_windows([], context, target, settings.head)
    check_limit(context, target, spec, allow_beyond_limit=settings.allow_beyond_limit)
    return context, target
