"""Plans the sliding windows of a continuation: the frames to feed to the decoder and the frames to generate in each window.

If the prompt and the continuation together exceed the decoder's longest window, the prompt is continued in several windows. In
this example, max_frames is 10, the stride is 6, the prompt has 4 frames (p), and the total length is 20 frames:

    frame        0 1 2 3 4 5 6 7 8 9 . . . . . . . . . 19
    window 0     p p p p # # # # # #                          the prompt is fed, six frames are generated (#)
    window 1                 k k k k # # # # # #              the last four frames (k) are fed again, six are generated
    window 2                             k k k k # # # #      the last four frames are fed again, four are generated

Source: audiocraft 1.3.0, `MusicGen._generate_tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowSpan:
    """One sliding window of a continuation. Positions are in frames from the start of the prompt.

    Attributes:
        start: First frame of the window.
        known: First frame to generate. The codes of the frames from `start` to `known` (exclusive) are already known.
        end: First frame after the window.
    """

    start: int
    known: int
    end: int

    @property
    def num_frames(self) -> int:
        """Length of the window, in frames."""
        return self.end - self.start


def window_spans(prompt_frames: int, total_frames: int, *, max_frames: int, stride_frames: int) -> list[WindowSpan]:
    """Returns the sliding windows that extend a prompt to a total length.

    The list is empty if the prompt already has the total length.

    If the prompt is shorter than max_frames, the first window contains the whole prompt. Otherwise, the first window contains only
    the last max_frames - stride_frames frames of the prompt.

    >>> [(span.start, span.known, span.end) for span in window_spans(4, 20, max_frames=10, stride_frames=6)]
    [(0, 4, 10), (6, 10, 16), (12, 16, 20)]

    Raises:
        ValueError: If max_frames or stride_frames is out of range.
    """
    if max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    if total_frames > max_frames and not 1 <= stride_frames < max_frames:
        raise ValueError(
            f"stride_frames must be between 1 and {max_frames - 1} (below max_frames={max_frames}), got {stride_frames}"
        )
    fits = total_frames <= max_frames or prompt_frames < max_frames
    start, known = (0 if fits else prompt_frames - max_frames + stride_frames), prompt_frames
    spans = []
    while known < total_frames:
        end = min(start + max_frames, total_frames)
        spans.append(WindowSpan(start, known, end))
        start, known = start + stride_frames, end
    return spans


@dataclass(frozen=True)
class WindowLayout:
    """The mapping from the columns of a window to frames. All tensors are on the CPU.

    Each column corresponds to one decoding step, and contains one entry per codebook. For codebook k, column c contains frame
    known + c - delay_k. The decoder predicts each column from the previous columns.

    In this example, the window starts at frame 3 and has 4 known frames (p) and 3 frames to generate (#). The delays are 0 and 1:

        frame              3 4 5 6 7 8 9          column            0 1 2 3
        codebook 0         p p p p # # #          codebook 0        # # # .        frames 7 8 9
        codebook 1         p p p p # # #          codebook 1        p # # #        frames 6 7 8 9; . is the special token

    Attributes:
        frames: (B, K, C) int64 frame of each entry, clamped to the valid frames of the row.
        is_drawn: (B, K, C) bool mask, True for entries to generate.
        is_known: (B, K, C) bool mask, True for entries whose codes are known.
    """

    frames: Tensor
    is_drawn: Tensor
    is_known: Tensor


def window_layout(spans: Sequence[WindowSpan | None], *, delays: Sequence[int], num_frames: int) -> WindowLayout:
    """Computes the layout of one sliding window per row of a batch.

    Args:
        spans: (B,) window of each row. None means that the row is complete.
        delays: (K,) delay of each codebook in steps.
        num_frames: Number of frames per row, T.

    >>> layout = window_layout([WindowSpan(3, 7, 10)], delays=(0, 1), num_frames=12)
    >>> layout.frames[0].tolist()
    [[7, 8, 9, 10], [6, 7, 8, 9]]
    >>> layout.is_drawn[0].int().tolist()
    [[1, 1, 1, 0], [0, 1, 1, 1]]
    """
    windows = [span or WindowSpan(0, 0, 0) for span in spans]
    num_columns = max(span.end - span.known for span in windows) + max(delays)
    column = torch.arange(num_columns)
    delay = torch.tensor(list(delays)).view(1, -1, 1)
    start, known, end = (
        torch.tensor([getattr(span, name) for span in windows]).view(-1, 1, 1) for name in ("start", "known", "end")
    )
    frames = known + column - delay
    return WindowLayout(
        frames=frames.clamp(0, num_frames - 1),
        is_drawn=(column >= delay) & (frames < end),
        is_known=(frames >= start) & (frames < known),
    )
