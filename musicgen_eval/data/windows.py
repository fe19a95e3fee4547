"""Cuts tracks into windows of context and target, in whole frames, so that every code is scored exactly once.

    head="score", context 3, target 4, a track of 13 frames (c: context, #: scored):

        window 0    # # # # # # #                    what fits a window, all of it scored
        window 1            c c c # # # #
        window 2                    c c c # #        the last one is what is left

    head="skip" leaves out window 0 and starts with the first target that has a full context.

A plan for a million tracks is a handful of numpy columns; `Window` records are views of a row. This file knows frames
and nothing of audio, codes or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.errors import WindowError
from musicgen_eval.records import CodecSpec, Window

Head = Literal["score", "skip"]
MAX_FRAMES = 1 << 40  # centuries


@dataclass(frozen=True)
class WindowPlan:
    """Windows as columns, one row each; all columns are int64 and of one length.

    Attributes:
        track: row of the track in its table.
        index: number of the window in its track, from 0.
        start_frame: first frame, from the track's start.
        context_frames: frames read and not scored.
        target_frames: frames scored.
    """

    track: NDArray[np.int64]
    index: NDArray[np.int64]
    start_frame: NDArray[np.int64]
    context_frames: NDArray[np.int64]
    target_frames: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.track)

    @property
    def num_frames(self) -> NDArray[np.int64]:
        """Frames that the model reads in each window."""
        return self.context_frames + self.target_frames

    def take(self, rows: NDArray[np.int64]) -> "WindowPlan":
        """The plan with these rows, in this order."""
        return WindowPlan(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def in_scoring_order(self) -> "WindowPlan":
        """Sorted by (length, track, index): equal lengths meet in a batch, so little is padded."""
        return self.take(np.lexsort((self.index, self.track, self.num_frames)))

    def window(self, row: int, track_ids: Sequence[str]) -> Window:
        """The record of one row."""
        return Window(
            track=track_ids[int(self.track[row])],
            index=int(self.index[row]),
            start_frame=int(self.start_frame[row]),
            context_frames=int(self.context_frames[row]),
            target_frames=int(self.target_frames[row]),
        )


def plan_windows(
    num_frames: NDArray[np.int64] | Sequence[int], context_frames: int, target_frames: int, head: Head = "score"
) -> WindowPlan:
    """Plans the windows of tracks of the given lengths.

    Args:
        num_frames: (tracks,) length of each track in frames; 0 gives no window.
        context_frames: frames read before each target, >= 0.
        target_frames: frames scored in each window, >= 1.
        head: `score`: the first window is the first context + target frames, all of them scored, and targets tile the
            rest, so every frame is scored once. `skip`: only targets with a full context; the first `context_frames`
            frames are never scored, and a track no longer than that has no window.

    Returns:
        Windows in (track, index) order.

    Raises:
        WindowError: a negative context, an empty target or an unknown head.
    """
    if context_frames < 0 or target_frames < 1:
        raise WindowError(f"context must be >= 0 and target >= 1 frames, got {context_frames} and {target_frames}")
    if head not in ("score", "skip"):
        raise WindowError(f"head must be 'score' or 'skip', got {head!r}")
    lengths = np.asarray(num_frames, dtype=np.int64)
    first = context_frames + target_frames if head == "score" else context_frames  # where tiling begins
    tiles = -(-np.maximum(lengths - first, 0) // target_frames)
    heads = ((lengths > 0) & (head == "score")).astype(np.int64)
    counts = heads + tiles

    track = np.repeat(np.arange(len(lengths)), counts)
    index = np.arange(len(track)) - np.repeat(np.cumsum(counts) - counts, counts)
    tile = index - heads[track]  # -1 for the head window
    is_head = tile < 0
    scored_from = np.where(is_head, 0, first + tile * target_frames)
    context = np.where(is_head, 0, context_frames)
    target = np.minimum(lengths[track] - scored_from, np.where(is_head, first, target_frames))
    return WindowPlan(
        track=track, index=index, start_frame=scored_from - context, context_frames=context, target_frames=target
    )


def plan_continuations(
    num_frames: NDArray[np.int64] | Sequence[int],
    context_frames: int | None,
    target_frames: int | None,
    *,
    max_frames: int,
    stride_frames: int,
    num_continuations: int = 1,
) -> WindowPlan:
    """Plans what is heard of each track and how long it is continued: one window for each continuation.

        track     x x x x x x x x x x        heard: the last frames before the joint, as many as the windows to come will keep
        context   c c c h h
        target              # # # # #

    Args:
        num_frames: (tracks,) length of each track in frames; 0 gives no window.
        context_frames: where the continuation begins; None: at half of each track, rounded down.
        target_frames: frames to generate; None: up to the end of each track.
        max_frames: longest window that the decoder was trained on. Where context and target fit, the whole context is heard.
        stride_frames: where they do not, the last max_frames - stride_frames frames of the context are heard.
        num_continuations: windows a track.

    Returns:
        Windows in (track, continuation) order; context_frames are those that are heard.
    """
    lengths = np.asarray(num_frames, dtype=np.int64)
    track = np.repeat(np.flatnonzero(lengths), num_continuations)
    index = np.arange(len(track)) % num_continuations
    joint = lengths[track] // 2 if context_frames is None else np.full(len(track), context_frames)
    target = lengths[track] - joint if target_frames is None else np.full(len(track), target_frames)
    heard = np.where(joint + target <= max_frames, joint, np.minimum(joint, max_frames - stride_frames))
    return WindowPlan(track=track, index=index, start_frame=joint - heard, context_frames=heard, target_frames=target)


def whole_frames(seconds: float, frame_rate_hz: int, *, setting: str) -> int:
    """Seconds as frames, which must come out whole.

    Raises:
        WindowError: no length of audio, or not a whole number of frames; the nearest lengths that are stand in the message.

    >>> whole_frames(0.34, 50, setting="context_s")
    17
    """
    frames = seconds * frame_rate_hz
    if not abs(frames) < MAX_FRAMES:
        raise WindowError(f"{setting}={seconds:g} is no length of audio in seconds")
    nearest = round(frames)
    if abs(frames - nearest) > 1e-6:
        below = int(frames) / frame_rate_hz
        raise WindowError(
            f"{setting}={seconds:g} s is {frames:g} frames at {frame_rate_hz} Hz; take {below:g} or "
            f"{below + 1 / frame_rate_hz:g} s"
        )
    return nearest


def check_limit(context_frames: int, target_frames: int, spec: CodecSpec, *, allow_beyond_limit: bool) -> None:
    """Refuses windows longer than the model was trained on, unless that is meant.

    Raises:
        WindowError: context + target over `spec.max_frames` and not allowed.
    """
    total = context_frames + target_frames
    if total <= spec.max_frames or allow_beyond_limit:
        return
    rate = spec.frame_rate_hz
    raise WindowError(
        f"context {context_frames / rate:g} s + target {target_frames / rate:g} s is {total} frames, over the checkpoint's "
        f"limit of {spec.max_frames} ({spec.max_frames / rate:g} s), past which its positions are untrained; shorten one, "
        "or set allow_beyond_limit for an experiment"
    )
