"""Describes the decoder's input for drawing one window of codes, and applies classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowDraw:
    """The decoder's input for one window per row. Rows with a text come first.

    Attributes:
        prompts: (B, K, S) int64 delayed ids, padded on the right.
        starts: (B,) number of steps in each row's prompt, at least 1.
        columns: (B, K, C) int64 ids. Column c is fed to the decoder at step start + c of the row. Entries that are not drawn are
            fed unchanged.
        is_drawn: (B, K, C) bool mask on the CPU, True for entries that are drawn.
        numbers: (B, K, C) float32 uniform random numbers in [0, 1). None at temperature 0.
        is_idle: (B,) bool mask, True for rows that are complete. Codes drawn for these rows are not used.
    """

    prompts: Tensor
    starts: Sequence[int]
    columns: Tensor
    is_drawn: Tensor
    numbers: Tensor | None
    is_idle: Sequence[bool]


def guided(logits: Tensor, num_rows: int, guidance_scale: float) -> Tensor:
    """Applies classifier-free guidance.

    Args:
        logits: (R, K, V) logits, which are changed in place. The rows from index `num_rows` on repeat the first rows, but without a
            text.
        num_rows: Number of rows, B.
        guidance_scale: Scale of the guidance. If the scale is 1, the logits with the text are returned.

    Returns:
        (B, K, V) guided logits.

    Source: MusicGen (arXiv 2306.05284), section 3.1; audiocraft 1.3.0, `LMModel._sample_next_token`.
    """
    own, twins = logits[:num_rows], logits[num_rows:]
    if len(twins):
        own[: len(twins)] = torch.lerp(twins, own[: len(twins)], guidance_scale)
    return own
