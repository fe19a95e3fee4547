"""What a decoder is given to draw one window of codes for every row of a batch, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowDraw:
    """One window of every row. Rows with a text come first.

    Attributes:
        prompts: (B, K, S) int64 delayed ids, padded on the right.
        starts: (B,) steps of each row's prompt, at least 1.
        columns: (B, K, C) int64 ids; column c is fed at the row's step start + c. Entries that are not drawn are fed as they are.
        is_drawn: (B, K, C) bool on the CPU, True where a code is drawn.
        numbers: (B, K, C) float32 in [0, 1) to draw with; None at temperature 0.
        is_idle: (B,) rows that are complete; whatever is drawn for them is not used.
    """

    prompts: Tensor
    starts: Sequence[int]
    columns: Tensor
    is_drawn: Tensor
    numbers: Tensor | None
    is_idle: Sequence[bool]


def guided(logits: Tensor, num_rows: int, guidance_scale: float) -> Tensor:
    """Classifier-free guidance.

    Args:
        logits: (R, K, V); rows from `num_rows` on are the first rows again, without their text. Changed in place.
        num_rows: B.
        guidance_scale: 1 is the logits with the text.

    Returns:
        (B, K, V).

    Source: MusicGen (arXiv 2306.05284), section 3.1; audiocraft 1.3.0, `LMModel._sample_next_token`.
    """
    own, twins = logits[:num_rows], logits[num_rows:]
    if len(twins):
        own[: len(twins)] = torch.lerp(twins, own[: len(twins)], guidance_scale)
    return own
