"""What predict does with a batch of contexts: continue them, write what came of them, and offer it to the metrics.

    contexts --encode--> codes --continue--> codes --score, where a metric asks--> readings
                                              |
                                              +--decode, piece by piece--> sink (files) and, where a metric asks, the bank

One continuation after the other is decoded, written and measured, so that no audio outlives its own. Knows the model, the bank and
the plan; what a sink does with audio is the sink's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from musicgen_eval.audio.reader import TrackAudio
from musicgen_eval.data.plan import Plan
from musicgen_eval.errors import AudioError, NonFiniteError
from musicgen_eval.inference.batch_continuation import (
    ContinuedCodes,
    continue_windows,
    encode_reference,
    score_continuations,
    unscored,
)
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.inputs import ContinuationAudio, Offer, fetch
from musicgen_eval.metrics.plugin.states import State
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.models.threads import single_threaded, torch_threads
from musicgen_eval.records import CodecSpec, Continuation, ContinuationSettings
from musicgen_eval.runs.datamodule import WindowAudio

PIECE_S = 20  # of a track's own audio at a time


class ContinuationSink(Protocol):
    """Takes continuations as they come."""

    def write(self, continuation: Continuation, sound: Sound) -> Continuation:
        """Stores a continuation; `sound.generated` can be gone through once. Returns it with the paths of its files."""
        ...


@dataclass(frozen=True)
class Continued:
    """What became of one window of a batch.

    Attributes:
        window: as it was read.
        continuation: what was generated; None where the window failed.
        failure: why it failed.
        offer: what the metrics were offered, without its audio.
        states: metric name -> the state that the window left.
    """

    window: WindowAudio
    continuation: Continuation | None = None
    failure: str | None = None
    offer: Offer | None = None
    states: dict[str, State] | None = None


class Continuations:
    """The continuations of one step, to be iterated over.

    Neither a list nor a dataclass: Lightning goes through those that predict returns, and stops at frozen records.
    """

    def __init__(self, continuations: Sequence[Continuation]) -> None:
        self._continuations = continuations

    def __iter__(self) -> Iterator[Continuation]:
        return iter(self._continuations)

    def __len__(self) -> int:
        return len(self._continuations)


@dataclass(frozen=True)
class _Ready:
    """A window whose context is encoded, and its reference where that is wanted."""

    window: WindowAudio
    heard: Tensor
    reference: Tensor | None


class Sound:
    """The audio around one continuation, at the codec's rate, as (C, n) float32 pieces on the CPU.

    Attributes:
        sample_rate_hz: of all of it.
        num_channels: C.
        context_decoded: (C, N) what was heard, as the codec decodes it.
        generated: what follows, as the codec decodes it; can be gone through once.
        num_context_samples: how much of the track lies before the joint.
        num_reference_samples: how much of it lies after the joint, up to the length of the continuation.
        num_generated_samples: how much is generated.
    """

    def __init__(self, track: TrackAudio, continuation: Continuation, reference_frames: int, model: MusicGen) -> None:
        spec, window = model.spec, continuation.window
        self.sample_rate_hz = spec.sample_rate_hz
        self.num_channels = spec.channels
        self.num_context_samples = window.scored_from_frame * spec.hop_samples
        self.num_reference_samples = reference_frames * spec.hop_samples
        self.num_generated_samples = window.target_frames * spec.hop_samples
        self._track = track
        self.context_decoded, self.generated = split_pieces(
            (_finite(piece.cpu()) for piece in model.decode_pieces(continuation.codes)),
            window.context_frames * spec.hop_samples,
        )

    def context(self) -> Iterator[Tensor]:
        """The track from its start to the joint."""
        return self._read(0, self.num_context_samples)

    def reference(self) -> Iterator[Tensor]:
        """The track from the joint on, up to the length of the continuation."""
        return self._read(self.num_context_samples, self.num_context_samples + self.num_reference_samples)

    def _read(self, start: int, end: int) -> Iterator[Tensor]:
        step = PIECE_S * self.sample_rate_hz
        for first in range(start, end, step):
            num_samples = min(step, end - first)
            yield self._track.read(first, num_samples, sample_rate_hz=self.sample_rate_hz, channels=self.num_channels)


def split_pieces(pieces: Iterator[Tensor], num_samples: int) -> tuple[Tensor, Iterator[Tensor]]:
    """The first samples of a stream of (C, n) pieces as one (C, num_samples) tensor, and the rest of the stream."""
    first: list[Tensor] = []
    missing, rest = num_samples, None
    while missing > 0:
        piece = next(pieces)
        first.append(piece[:, :missing])
        rest = piece[:, missing:]
        missing -= piece.shape[1]

    def following() -> Iterator[Tensor]:
        if rest is not None and rest.shape[1]:
            yield rest
        yield from pieces

    return torch.cat(first, dim=1), following()


class BatchContinuation:
    """Continues batches of one run.

    Args:
        model: made ready for its precision.
        bank: the metrics, for predict.
        plan: of the run.
        settings: how to draw.
        stride_frames: by how much windows slide.
        seed: of the numbers to draw with.
        sink: where audio goes; None: it stays in the `Continuation`.
    """

    def __init__(
        self,
        model: MusicGen,
        bank: MetricBank,
        plan: Plan,
        settings: ContinuationSettings,
        *,
        stride_frames: int,
        seed: int,
        sink: ContinuationSink | None,
    ) -> None:
        self.model = model
        self.bank = bank
        self.plan = plan
        self.settings = settings
        self.stride_frames = stride_frames
        self.seed = seed
        self.sink = sink

    @cached_property
    def _wants_reference_codes(self) -> bool:
        wants_reading = any(reading.target == "reference" for reading in self.bank.readings)
        return wants_reading or "reference_decoded" in self.bank.audio_names

    def run(self, windows: Sequence[WindowAudio]) -> Iterator[Continued]:
        """Continues windows whose context was read, together, and gives them one by one."""
        contexts = {window.track_row: window.audio for window in windows if window.audio is not None}
        encoded = dict(zip(contexts, self.model.encode(list(contexts.values())), strict=True))
        references: dict[int, Tensor | AudioError | None] = {}
        ready: list[_Ready] = []
        for window in windows:  # continuations of one track hear the same, and are held against the same
            row = window.track_row
            if row not in references:
                try:
                    references[row] = self._reference(window, encoded[row])
                except AudioError as error:
                    references[row] = error
            reference = references[row]
            if isinstance(reference, AudioError):
                yield Continued(window, failure=str(reference))
            else:
                ready.append(_Ready(window, encoded[row], reference))
        if ready:
            yield from self._continue(ready)

    def _continue(self, ready: Sequence[_Ready]) -> Iterator[Continued]:
        """Continues what is ready, in one batch."""
        windows = [item.window for item in ready]
        try:
            codes = continue_windows(
                self.model,
                [item.heard for item in ready],
                [window.window for window in windows],
                texts=[window.text for window in windows],
                settings=self.settings,
                stride_frames=self.stride_frames,
                seed=self.seed,
            )
        except NonFiniteError as error:
            for row in error.rows:
                yield Continued(windows[row], failure="the decoder gave no finite logits; try bf16-mixed or 32-true")
            good = [item for row, item in enumerate(ready) if row not in error.rows]
            if good:
                yield from self._continue(good)
            return
        items = [
            ContinuedCodes(item.window.window, row, item.reference, item.window.text, item.window.other_text)
            for item, row in zip(ready, codes, strict=True)
        ]
        readings = score_continuations(
            self.model,
            items,
            self.bank.scored_readings,
            stride_frames=self.stride_frames,
            seed=self.seed,
            with_logits=self.bank.readings_with_logits,
        )
        offers = fetch(
            [
                Offer({**read, "": read.get("") or unscored(item.window, item.codes)}, self.model.spec.frame_rate_hz)
                for item, read in zip(items, readings, strict=True)
            ]
        )
        for window, item, offer in zip(windows, items, offers, strict=True):
            if not _is_finite(offer):
                yield Continued(window, failure="the decoder gave no finite nll; try bf16-mixed or 32-true")
            else:
                yield self._finish(window, item, offer)

    def _finish(self, window: WindowAudio, item: ContinuedCodes, offer: Offer) -> Continued:
        """Decodes, writes and measures one continuation."""
        spec = self.model.spec
        plain = offer.on_cpu.readings[""]
        assert plain is not None
        with torch.inference_mode(False):
            codes = plain.codes.clone()  # an ordinary tensor, as its audio
        continuation = Continuation(
            window=window.window,
            codes=codes,
            sample_rate_hz=spec.sample_rate_hz,
            text=window.text,
            seed=self.seed,
        )
        try:
            track = self.plan.open_track(window.track_row)
            with torch_threads(self.settings.threads if self.model.device.type == "cpu" else None):
                sound = Sound(track, continuation, self._reference_frames(window), self.model)
                continuation, audio = self._sounding(continuation, sound, item)
        except AudioError as error:
            return Continued(window, failure=str(error))
        with single_threaded(), torch.autocast(self.model.device.type, enabled=False):
            states = self.bank.update([replace(offer, audio=audio)])[0]
        return Continued(window, continuation, offer=offer, states=states)

    def _sounding(
        self, continuation: Continuation, sound: Sound, item: ContinuedCodes
    ) -> tuple[Continuation, ContinuationAudio]:
        """Hands the audio on as it is decoded, and keeps what the metrics want, or all of it where there is no sink."""
        wanted = self.bank.audio_names
        kept: list[Tensor] = []
        if self.sink is not None:
            if "generated" in wanted:
                sound.generated = _kept(sound.generated, kept)
            continuation = self.sink.write(continuation, sound)
        else:
            kept = list(sound.generated)
        generated = _whole(kept)
        context = _whole(sound.context()) if self.sink is None or "context" in wanted else None
        reference = _whole(sound.reference()) if self.sink is None or "reference" in wanted else None
        if self.sink is None:
            continuation = replace(continuation, generated=generated, context=context, reference=reference)
        decoded = None
        if "reference_decoded" in wanted and item.reference is not None:
            decoded = self.model.decode(item.reference)[:, sound.context_decoded.shape[1] :].cpu()
        return continuation, ContinuationAudio(
            sample_rate_hz=sound.sample_rate_hz,
            text=continuation.text,
            generated=generated,
            context=context,
            reference=reference,
            context_decoded=sound.context_decoded,
            reference_decoded=decoded,
        )

    def _reference(self, window: WindowAudio, heard: Tensor) -> Tensor | None:
        """The reference's codes behind those heard, where some metric wants them and there are any.

        Raises:
            AudioError: the track cannot be read.
        """
        num_frames = self._reference_frames(window)
        if not self._wants_reference_codes or num_frames == 0:
            return None
        track = self.plan.open_track(window.track_row)
        return encode_reference(
            self.model, heard, _reader(track, window, self.model.spec), num_frames, stride_frames=self.stride_frames
        )

    def _reference_frames(self, window: WindowAudio) -> int:
        behind = int(self.plan.num_frames[window.track_row]) - window.window.scored_from_frame
        return max(0, min(window.window.target_frames, behind))


def _reader(track: TrackAudio, window: WindowAudio, spec: CodecSpec) -> Callable[[int, int], Tensor]:
    """Reads frames of a track, counted from where hearing began."""
    first_frame, hop = window.window.start_frame, spec.hop_samples

    def read(start: int, num_frames: int) -> Tensor:
        return track.read(
            (first_frame + start) * hop, num_frames * hop, sample_rate_hz=spec.sample_rate_hz, channels=spec.channels
        )

    return read


def _kept(pieces: Iterator[Tensor], kept: list[Tensor]) -> Iterator[Tensor]:
    """The same pieces, each also put into `kept`."""
    for piece in pieces:
        kept.append(piece)
        yield piece


def _whole(pieces: Iterable[Tensor]) -> Tensor | None:
    """Pieces as one ordinary tensor, which its owner may change; None where there are none."""
    found = list(pieces)
    with torch.inference_mode(False):
        return torch.cat(found, dim=1) if found else None


def _is_finite(offer: Offer) -> bool:
    """Whether every scored code of every reading has a finite nll."""
    reads = [read for read in offer.on_cpu.readings.values() if read is not None]
    return all(bool(read.nll[read.scored].isfinite().all()) for read in reads)


def _finite(piece: Tensor) -> Tensor:
    if not piece.isfinite().all():
        raise AudioError("the codec made NaN or infinite samples of the continuation's codes")
    return piece
