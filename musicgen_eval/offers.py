"""What one window has to offer to the metrics: its readings, where they lie, and what stands for one that does not exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from musicgen_eval.records import CodecSpec, ScoredWindow


@dataclass(frozen=True)
class Offer:
    """All that one window has to offer: its scored readings by name, "" the plain one; a reading that does not exist is None."""

    readings: Mapping[str, ScoredWindow | None]
    frame_rate_hz: int

    @cached_property
    def on_cpu(self) -> Offer:
        """The same without logits, on the CPU, moved once."""
        readings = {name: None if read is None else _without_logits(read) for name, read in self.readings.items()}
        return Offer(readings=readings, frame_rate_hz=self.frame_rate_hz)


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
