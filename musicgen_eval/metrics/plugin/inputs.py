"""What one window has to offer to the metrics: its readings, in predict its audio, and what stands for what does not exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musicgen_eval.models.transfers import download, upload
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
        fetched: the readings without logits, on the CPU, if `fetch` has copied them.
    """

    readings: Mapping[str, ScoredWindow | None]
    frame_rate_hz: int
    audio: ContinuationAudio | None = None
    fetched: Mapping[str, ScoredWindow | None] | None = None

    @property
    def on_cpu(self) -> Offer:
        """The same offer without logits, on the CPU."""
        readings = fetch([self])[0].fetched
        assert readings is not None
        return Offer(readings, self.frame_rate_hz, self.audio, readings)

    def to(self, device: torch.device) -> Offer:
        """The same offer with its readings on a device."""

        def moved(read: ScoredWindow) -> ScoredWindow:
            codes, nll, rank = (upload(tensor, device) for tensor in (read.codes, read.nll, read.rank))
            logits = None if read.logits is None else upload(read.logits, device)
            return replace(read, codes=codes, nll=nll, rank=rank, logits=logits)

        readings = {name: None if read is None else moved(read) for name, read in self.readings.items()}
        return Offer(readings, self.frame_rate_hz, self.audio)


def fetch(offers: Sequence[Offer]) -> list[Offer]:
    """Offers with a copy of their readings on the CPU, without logits; one wait for the device serves all of them."""
    reads = [read for offer in offers if offer.fetched is None for read in offer.readings.values() if read is not None]
    copies = download([tensor for read in reads for tensor in (read.codes, read.nll, read.rank)])
    triples = iter(zip(copies[::3], copies[1::3], copies[2::3], strict=True))

    def on_cpu(read: ScoredWindow) -> ScoredWindow:
        codes, nll, rank = next(triples)
        return replace(read, codes=codes, scored=read.scored.cpu(), nll=nll, rank=rank, logits=None)

    return [
        offer
        if offer.fetched is not None
        else replace(
            offer,
            fetched={name: None if read is None else on_cpu(read) for name, read in offer.readings.items()},
        )
        for offer in offers
    ]


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
