"""Divides tracks into windows that consist of a context and a target, so that every code is scored exactly once.

    Example with head="score", a context of 3 frames, a target of 4 frames and a track of 13 frames (c: context, #: scored):

        window 0    # # # # # # #                    scores the first context + target frames
        window 1            c c c # # # #
        window 2                    c c c # #        has a shorter target, up to the end of the track

    With head="skip", window 0 is omitted, so only targets that have a full context are scored.

The windows are stored as a few numpy columns, because there can be millions of them. `Window` records are created on demand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.data.settings import Head
from musicgen_eval.errors import WindowError
from musicgen_eval.records import CodecSpec, Window


@dataclass(frozen=True)
class WindowPlan:
    """Windows stored as columns, with one row per window.

    Attributes:
        track: (windows,) int64, row of the track in the list of tracks.
        index: (windows,) int64, index of the window within its track, counted from 0.
        start_frame: (windows,) int64, first frame of the window, counted from the start of the track.
        context_frames: (windows,) int64, number of frames that are fed to the model but not scored.
        target_frames: (windows,) int64, number of frames that are scored or generated.
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
        """Lengths of the windows in frames, as a (windows,) int64 array."""
        return self.context_frames + self.target_frames

    def take(self, rows: NDArray[np.int64]) -> "WindowPlan":
        """Returns a plan that contains the given rows, in the given order."""
        return WindowPlan(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def in_scoring_order(self) -> "WindowPlan":
        """Returns the windows sorted by (length, track, index), so that the windows in a batch have similar lengths."""
        return self.take(np.lexsort((self.index, self.track, self.num_frames)))

    def window(self, row: int, track_ids: Sequence[str]) -> Window:
        """Returns the window in the given row as a `Window` record."""
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
    """Plans the windows of all tracks, given the lengths of the tracks.

    Args:
        num_frames: (tracks,) length of each track in frames. A track of 0 frames has no windows.
        context_frames: Number of frames that are fed to the model before each target, at least 0.
        target_frames: Number of frames that are scored in each window, at least 1.
        head: Treatment of the start of a track. With `score`, all of the first context + target frames are scored in the first
            window, and the targets of the following windows cover the rest of the track. Each frame is scored exactly once. With
            `skip`, only targets that have a full context are scored. The first `context_frames` frames are not scored, and a track
            that is not longer than the context has no windows.

    Returns:
        Windows sorted by (track, index).

    Raises:
        WindowError: The context is negative, the target is empty or `head` is unknown.
    """
    if context_frames < 0 or target_frames < 1:
        raise WindowError(
            f"context must be at least 0 frames and target at least 1, got {context_frames} and {target_frames}"
        )
    if head not in ("score", "skip"):
        raise WindowError(f"head must be 'score' or 'skip', got {head!r}")
    lengths = np.asarray(num_frames, dtype=np.int64)
    first = context_frames + target_frames if head == "score" else context_frames  # first frame of the tiled targets
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
    """Plans the prompt and the target of each continuation. Each continuation is one window.

        track     x x x x x x x x x x
        before    c c c p p                  p: prompt, which ends at the boundary; c: earlier frames, not fed to the model
        target              # # # # #        #: frames to generate

    Args:
        num_frames: (tracks,) length of each track in frames. A track of 0 frames has no windows.
        context_frames: Position of the boundary, in frames from the start of the track. None means half the length of each track,
            rounded down.
        target_frames: Number of frames to generate. None means up to the end of each track.
        max_frames: Length of the longest window that the decoder was trained on, in frames. If the track up to the boundary and the
            target together fit into such a window, the prompt is the whole track up to the boundary.
        stride_frames: Number of frames that the window slides by. If the track up to the boundary and the target do not fit into
            one window, the prompt is at most the last max_frames - stride_frames frames before the boundary.
        num_continuations: Number of continuations per track.

    Returns:
        Windows sorted by (track, index of the continuation). `context_frames` is the length of the prompt.
    """
    lengths = np.asarray(num_frames, dtype=np.int64)
    track = np.repeat(np.flatnonzero(lengths), num_continuations)
    index = np.arange(len(track)) % num_continuations
    boundary = lengths[track] // 2 if context_frames is None else np.full(len(track), context_frames)
    target = lengths[track] - boundary if target_frames is None else np.full(len(track), target_frames)
    prompt = np.where(boundary + target <= max_frames, boundary, np.minimum(boundary, max_frames - stride_frames))
    return WindowPlan(
        track=track, index=index, start_frame=boundary - prompt, context_frames=prompt, target_frames=target
    )


def check_limit(context_frames: int, target_frames: int, spec: CodecSpec, *, allow_beyond_limit: bool) -> None:
    """Checks that windows are not longer than the checkpoint's limit.

    Raises:
        WindowError: The context and the target together exceed `spec.max_frames`, and `allow_beyond_limit` is False.
    """
    total = context_frames + target_frames
    if total <= spec.max_frames or allow_beyond_limit:
        return
    rate = spec.frame_rate_hz
    raise WindowError(
        f"context {context_frames / rate:g} s + target {target_frames / rate:g} s is {total} frames, which exceeds the "
        f"checkpoint's limit of {spec.max_frames} frames ({spec.max_frames / rate:g} s), and the model was not trained on longer "
        "windows; reduce data.context_s or data.target_s, or set data.allow_beyond_limit to evaluate longer windows anyway"
    )
