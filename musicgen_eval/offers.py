"""What one window has to offer to the metrics: its readings, in predict its audio, and what stands for what does not exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from musicgen_eval.records import CodecSpec, ScoredWindow


@dataclass(frozen=True)
class ContinuationAudio:
    """What a continuation sounds like; (C, N) float32 in about [-1, 1] on the CPU, None for what no metric asked for.

    Attributes:
        sample_rate_hz: of all of it.
        text: the prompt, or None.
        generated: the continuation, as the codec decodes it after what was heard.
        context: the track before the joint.
        reference: how the track went on, up to the length of the continuation; None also where it does not.
        context_decoded: what was heard, as the codec decodes it.
        reference_decoded: the reference, as the codec decodes it after what was heard; None also where there is none.
    """

    sample_rate_hz: int
    text: str | None
    generated: Tensor | None = None
    context: Tensor | None = None
    reference: Tensor | None = None
    context_decoded: Tensor | None = None
    reference_decoded: Tensor | None = None


@dataclass(frozen=True)
class Offer:
    """All that one window has to offer.

    Attributes:
        readings: scored readings by name, "" the plain one; a reading that does not exist is None.
        frame_rate_hz: of the codes.
        audio: in predict what it sounds like.
    """

    readings: Mapping[str, ScoredWindow | None]
    frame_rate_hz: int
    audio: ContinuationAudio | None = None

    @cached_property
    def on_cpu(self) -> Offer:
        """The same without logits, on the CPU, moved once."""
        readings = {name: None if read is None else _without_logits(read) for name, read in self.readings.items()}
        return Offer(readings=readings, frame_rate_hz=self.frame_rate_hz, audio=self.audio)


def absent_reading(plain: ScoredWindow, spec: CodecSpec, *, with_logits: bool) -> ScoredWindow:
    """A reading that does not exist: all NaN, rank -1, nothing scored."""
    shape = (*plain.codes.shape, spec.codebook_size)
    return ScoredWindow(
        window=plain.window,
        codes=plain.codes,
        scored=torch.zeros_like(plain.scored),
        nll=torch.full_like(plain.nll, float("nan")),
        rank=torch.full_like(plain.rank, -1),
        logits=torch.zeros(shape, device=plain.nll.device) if with_logits else None,
    )


def _without_logits(read: ScoredWindow) -> ScoredWindow:
    return replace(
        read, codes=read.codes.cpu(), scored=read.scored.cpu(), nll=read.nll.cpu(), rank=read.rank.cpu(), logits=None
    )
