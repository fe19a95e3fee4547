"""Generates, writes and measures the continuations of a batch of prompts in predict.

    contexts --encode--> prompts --generate--> codes --score (if a metric needs it)--> readings
                                                 |
                                                 +--decode, piece by piece--> sink, and metrics that need audio

The continuations are decoded, written and measured one after another, so that the audio of at most one continuation is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from musicgen_eval.audio.reader import TrackAudio
from musicgen_eval.data.plan import Plan
from musicgen_eval.errors import NON_FINITE_REMEDY, AudioError, NonFiniteError
from musicgen_eval.inference.batch_continuation import (
    ContinuedCodes,
    continue_windows,
    encode_reference,
    score_continuations,
    unscored,
)
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.inputs import ContinuationAudio, WindowData, fetch
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.models.numerics import float32_by_default, full_precision
from musicgen_eval.models.threads import single_threaded, torch_threads
from musicgen_eval.records import CodecSpec, Continuation
from musicgen_eval.results.measurements import WindowRecord
from musicgen_eval.results.running_totals import RunningTotals
from musicgen_eval.runs.continuation_audio import AudioPieces, ContinuationSink
from musicgen_eval.runs.scoring_step import readable_windows
from musicgen_eval.runs.window_dataset import Batch, WindowAudio


class Continuations:
    """An iterable over the continuations of one batch.

    This class is neither a list nor a dataclass, because Lightning traverses lists and dataclasses that `predict_step` returns, and
    fails on frozen dataclasses.
    """

    def __init__(self, continuations: Sequence[Continuation]) -> None:
        self._continuations = continuations

    def __iter__(self) -> Iterator[Continuation]:
        return iter(self._continuations)

    def __len__(self) -> int:
        return len(self._continuations)


@dataclass(frozen=True)
class _Prompt:
    """A window with its encoded prompt.

    Attributes:
        window: Window of the continuation.
        codes: (K, context_frames) int64 codes of the prompt.
        reference: (K, context_frames + R) int64 codes of the prompt and the reference, where R is the length of the reference in
            frames. None means that there is no reference, or that no metric needs these codes.
    """

    window: WindowAudio
    codes: Tensor
    reference: Tensor | None


class ContinuationStep:
    """Continues batches of prompts.

    Args:
        model: Model, already prepared for the precision of the run.
        bank: Metrics of the task "continue".
        plan: Plan of the run.
        settings: Settings of the continuations, including the number of threads.
        stride_frames: Stride of the generation windows, in frames.
        seed: Seed for sampling codes, and for readings that alter codes at random.
        sink: Object that stores the audio. None means that the audio is returned in the `Continuation`.
        totals: Running totals, which are updated in place.
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
        totals: RunningTotals,
    ) -> None:
        self.model = model
        self.bank = bank
        self.plan = plan
        self.settings = settings
        self.stride_frames = stride_frames
        self.seed = seed
        self.sink = sink
        self.totals = totals
        self._continuations: list[Continuation] = []

    def run(self, batch: Batch) -> list[WindowRecord]:
        """Continues the prompts of a batch, and returns one record per window.

        A record contains either the metric states and the codes, or the reason why the window failed.
        """
        self._continuations = []
        windows, records = readable_windows(batch)
        if windows:
            with float32_by_default(), full_precision():
                prompts, failed = self._encode(windows)
                records += failed
                records += self._continue(prompts)
        return records

    def take_continuations(self) -> Continuations:
        """Returns the continuations of the latest batch, and removes them from this object."""
        taken, self._continuations = self._continuations, []
        return Continuations(taken)

    @cached_property
    def _needs_reference_codes(self) -> bool:
        has_reading = any(reading.target == "reference" for reading in self.bank.readings)
        return has_reading or "reference_decoded" in self.bank.audio_names

    def _encode(self, windows: Sequence[WindowAudio]) -> tuple[list[_Prompt], list[WindowRecord]]:
        """Encodes prompts and references. Returns the prompts, and a failure record for each unreadable reference."""
        contexts = {window.track_row: window.audio for window in windows if window.audio is not None}
        encoded = dict(zip(contexts, self.model.encode(list(contexts.values())), strict=True))
        references: dict[int, Tensor | AudioError | None] = {}
        prompts: list[_Prompt] = []
        failed: list[WindowRecord] = []
        for window in windows:  # all continuations of a track have the same prompt and the same reference
            row = window.track_row
            if row not in references:
                try:
                    references[row] = self._encode_reference(window, encoded[row])
                except AudioError as error:
                    references[row] = error
            reference = references[row]
            if isinstance(reference, AudioError):
                failed.append(_failure(window, str(reference)))
            else:
                prompts.append(_Prompt(window, encoded[row], reference))
        return prompts, failed

    def _encode_reference(self, window: WindowAudio, prompt: Tensor) -> Tensor | None:
        """Returns the (K, context_frames + R) codes of the prompt and the reference, where R is the number of reference frames.

        The result is None if no metric needs these codes, or if there is no reference.

        Raises:
            AudioError: The track cannot be read.
        """
        num_frames = self._reference_frames(window)
        if not self._needs_reference_codes or num_frames == 0:
            return None
        read = _reader(self.plan.open_track(window.track_row), window, self.model.spec)
        return encode_reference(self.model, prompt, read, num_frames, stride_frames=self.stride_frames)

    def _reference_frames(self, window: WindowAudio) -> int:
        after_boundary = int(self.plan.num_frames[window.track_row]) - window.window.scored_from_frame
        return max(0, min(window.window.target_frames, after_boundary))

    def _continue(self, prompts: Sequence[_Prompt]) -> list[WindowRecord]:
        """Continues prompts as one batch. Returns one record per prompt. If the decoder fails on some of them, retries the rest."""
        if not prompts:
            return []
        try:
            codes = continue_windows(
                self.model,
                [prompt.codes for prompt in prompts],
                [prompt.window.window for prompt in prompts],
                texts=[prompt.window.text for prompt in prompts],
                settings=self.settings,
                stride_frames=self.stride_frames,
                seed=self.seed,
            )
        except NonFiniteError as error:
            reason = f"the decoder's logits are NaN or infinite; {NON_FINITE_REMEDY}"
            failed = [_failure(prompts[row].window, reason) for row in error.rows]
            return failed + self._continue([prompt for row, prompt in enumerate(prompts) if row not in error.rows])
        windows = [prompt.window for prompt in prompts]
        items = [
            ContinuedCodes(prompt.window.window, row, prompt.reference, prompt.window.text, prompt.window.other_text)
            for prompt, row in zip(prompts, codes, strict=True)
        ]
        return [self._measure(*results) for results in zip(windows, items, self._score(items), strict=True)]

    def _score(self, items: Sequence[ContinuedCodes]) -> list[WindowData]:
        """Scores the readings that the metrics need. Returns the data of each continuation, without its audio."""
        readings = score_continuations(
            self.model,
            items,
            self.bank.scored_readings,
            stride_frames=self.stride_frames,
            seed=self.seed,
            with_logits=self.bank.readings_with_logits,
        )
        return fetch(
            [
                WindowData(
                    {**read, "": read.get("") or unscored(item.window, item.codes)}, self.model.spec.frame_rate_hz
                )
                for item, read in zip(items, readings, strict=True)
            ]
        )

    def _measure(self, window: WindowAudio, item: ContinuedCodes, data: WindowData) -> WindowRecord:
        """Decodes, writes and measures one continuation."""
        if not _is_finite(data):
            return _failure(window, f"the nll is NaN or infinite; {NON_FINITE_REMEDY}")
        continuation = self._continuation(window, data)
        try:
            track = self.plan.open_track(window.track_row)
            with torch_threads(self.settings.threads if self.model.device.type == "cpu" else None):
                pieces = AudioPieces(track, continuation, self._reference_frames(window), self.model)
                continuation, audio = self._write(continuation, pieces, item)
        except AudioError as error:
            return _failure(window, str(error))
        with single_threaded(), torch.autocast(self.model.device.type, enabled=False):
            states = self.bank.update([replace(data, audio=audio, track=lambda: track)])[0]
        self._continuations.append(continuation)
        self.totals.add([window.track_row], [data])
        return WindowRecord(window.row, window.track_row, states, tensors={"codes": _compact(continuation.codes)})

    def _continuation(self, window: WindowAudio, data: WindowData) -> Continuation:
        plain = data.on_cpu.readings[""]
        assert plain is not None
        with torch.inference_mode(False):
            codes = plain.codes.clone()  # an ordinary tensor, not an inference tensor
        return Continuation(
            window=window.window,
            codes=codes,
            sample_rate_hz=self.model.spec.sample_rate_hz,
            text=window.text,
            seed=self.seed,
        )

    def _write(
        self, continuation: Continuation, pieces: AudioPieces, item: ContinuedCodes
    ) -> tuple[Continuation, ContinuationAudio]:
        """Passes the audio of a continuation to the sink while the audio is being decoded.

        Returns:
            A copy of the continuation with the paths of its files or with its audio, and the audio that the metrics need.
        """
        needed = self.bank.audio_names
        if self.sink is not None:
            copies = pieces.keep_generated() if "generated" in needed else []
            continuation = self.sink.write(continuation, pieces)
        else:
            copies = list(pieces.generated)
        generated = _whole(copies)
        context = _whole(pieces.context()) if self.sink is None or "context" in needed else None
        reference = _whole(pieces.reference()) if self.sink is None or "reference" in needed else None
        if self.sink is None:
            continuation = replace(continuation, generated=generated, context=context, reference=reference)
        reference_decoded = None
        if "reference_decoded" in needed and item.reference is not None:
            reference_decoded = self.model.decode(item.reference)[:, pieces.context_decoded.shape[1] :].cpu()
        return continuation, ContinuationAudio(
            sample_rate_hz=pieces.sample_rate_hz,
            text=continuation.text,
            generated=generated,
            context=context,
            reference=reference,
            context_decoded=pieces.context_decoded,
            reference_decoded=reference_decoded,
        )


def _reader(track: TrackAudio, window: WindowAudio, spec: CodecSpec) -> Callable[[int, int], Tensor]:
    """Returns a function that reads the audio of a range of frames. Frame 0 is the first frame of the prompt."""
    first_frame, hop = window.window.start_frame, spec.hop_samples

    def read(start: int, num_frames: int) -> Tensor:
        return track.read(
            (first_frame + start) * hop, num_frames * hop, sample_rate_hz=spec.sample_rate_hz, channels=spec.channels
        )

    return read


def _whole(pieces: Iterable[Tensor]) -> Tensor | None:
    """Concatenates pieces into one tensor that is not an inference tensor. Returns None if there are no pieces."""
    found = list(pieces)
    with torch.inference_mode(False):
        return torch.cat(found, dim=1) if found else None


def _is_finite(data: WindowData) -> bool:
    """Returns True if every scored code of every reading has a finite nll."""
    reads = [read for read in data.on_cpu.readings.values() if read is not None]
    return all(bool(read.nll[read.scored].isfinite().all()) for read in reads)


def _failure(window: WindowAudio, reason: str) -> WindowRecord:
    return WindowRecord(window.row, window.track_row, failure=reason)


def _compact(codes: Tensor) -> Tensor:
    """Converts codes to int16, or to int32 if any code does not fit into int16."""
    return codes.to(torch.int16 if int(codes.max()) < 1 << 15 else torch.int32)
