"""The nll and the perplexity of generated codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from musicgen_eval.inference.batch_continuation import ContinuedCodes, score_continuations
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.records import Continuation, Reading
from song_similarity.clips import STRIDE_FRAMES


def nats(model: MusicGen, continuations: Sequence[Continuation], codes: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Scores generated codes without guidance, in sliding windows within the limit.

    Args:
        model: Loaded model.
        continuations: Continuations to score.
        codes: (K, T) codes of each prompt and continuation, scored instead of those of the continuations.

    Returns:
        (K, T) nll of the codes after each prompt, in nats.
    """
    rows = [
        ContinuedCodes(one.window, one.codes if codes is None else codes[row], None, one.text)
        for row, one in enumerate(continuations)
    ]
    found = []
    for first in range(0, len(rows), 16):
        found += score_continuations(model, rows[first : first + 16], [Reading("")], stride_frames=STRIDE_FRAMES)
    reads = [read[""] for read in found]
    return [
        read.nll[:, one.window.context_frames :]
        for read, one in zip(reads, continuations, strict=True)
        if read is not None
    ]


def perplexity(curves: Iterable[Tensor]) -> float:
    """Returns the perplexity of (K, T) nats by the definition of the package: exp of the mean over codebooks."""
    return float(torch.cat(list(curves), dim=1).double().nanmean(1).mean().exp())
