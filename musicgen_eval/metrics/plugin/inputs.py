"""The data that metric inputs are computed from: each window's scored readings and, in predict, the audio of its continuation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musicgen_eval.audio.reader import TrackAudio
from musicgen_eval.models.transfers import download, upload
from musicgen_eval.records import CodecSpec, ScoredWindow


@dataclass(frozen=True)
class ContinuationAudio:
    """The audio of a continuation and its track, as (C, N) float32 tensors on the CPU with values roughly in [-1, 1].

    An audio field is None if no metric needs that audio.

    Attributes:
        sample_rate_hz: Sample rate of every audio field.
        text: Text of the track. None if the track has no text.
        generated: Audio of the continuation. The codec decodes the prompt and the continuation together, and the prompt is then
            removed.
        context: Original audio of the track before the boundary.
        reference: Original audio of the track after the boundary, at most as long as the continuation. None if the track ends at
            the boundary.
        context_decoded: Audio of the prompt, decoded from its codes.
        reference_decoded: Audio of the reference, decoded from codes in the same way as `generated`. None if there is no reference.
    """

    sample_rate_hz: int
    text: str | None
    generated: Tensor | None = None
    context: Tensor | None = None
    reference: Tensor | None = None
    context_decoded: Tensor | None = None
    reference_decoded: Tensor | None = None


@dataclass(frozen=True)
class WindowData:
    """The data that the metric inputs for one window are computed from.

    Attributes:
        readings: Mapping from reading name to scored reading, or to None if the window has no such reading. The plain reading,
            which uses the window's own text and context, has the name "".
        frame_rate_hz: Frame rate of the codes.
        audio: Audio of the continuation if the run is a `predict`. None in all other runs.
        track: Function that opens the audio of the whole track. None in the trial.
        fetched: Copies of the readings on the CPU, without logits. None means that `fetch` has not been called.
    """

    readings: Mapping[str, ScoredWindow | None]
    frame_rate_hz: int
    audio: ContinuationAudio | None = None
    track: Callable[[], TrackAudio] | None = None
    fetched: Mapping[str, ScoredWindow | None] | None = None

    @property
    def on_cpu(self) -> WindowData:
        """The same data on the CPU, without logits."""
        readings = fetch([self])[0].fetched
        assert readings is not None
        return replace(self, readings=readings, fetched=readings)

    def to(self, device: torch.device) -> WindowData:
        """Returns the same data with the readings moved to a device."""

        def moved(read: ScoredWindow) -> ScoredWindow:
            codes, nll, rank = (upload(tensor, device) for tensor in (read.codes, read.nll, read.rank))
            logits = None if read.logits is None else upload(read.logits, device)
            return replace(read, codes=codes, nll=nll, rank=rank, logits=logits)

        readings = {name: None if read is None else moved(read) for name, read in self.readings.items()}
        return replace(self, readings=readings, fetched=None)


def fetch(window_data: Sequence[WindowData]) -> list[WindowData]:
    """Returns window data with copies of the readings on the CPU, excluding logits. The function waits for the device only once."""
    reads = [
        read for data in window_data if data.fetched is None for read in data.readings.values() if read is not None
    ]
    copies = download([tensor for read in reads for tensor in (read.codes, read.nll, read.rank)])
    triples = iter(zip(copies[::3], copies[1::3], copies[2::3], strict=True))

    def on_cpu(read: ScoredWindow) -> ScoredWindow:
        codes, nll, rank = next(triples)
        return replace(read, codes=codes, scored=read.scored.cpu(), nll=nll, rank=rank, logits=None)

    return [
        data
        if data.fetched is not None
        else replace(
            data,
            fetched={name: None if read is None else on_cpu(read) for name, read in data.readings.items()},
        )
        for data in window_data
    ]


def absent_reading(plain: ScoredWindow, spec: CodecSpec, *, with_logits: bool) -> ScoredWindow:
    """Returns a placeholder for a missing reading: every nll is NaN, every rank is -1, and no code is scored."""
    shape = (*plain.codes.shape, spec.codebook_size)
    return ScoredWindow(
        window=plain.window,
        codes=plain.codes,
        scored=torch.zeros_like(plain.scored),
        nll=torch.full_like(plain.nll, float("nan")),
        rank=torch.full_like(plain.rank, -1),
        logits=torch.zeros(shape, device=plain.nll.device) if with_logits else None,
    )
