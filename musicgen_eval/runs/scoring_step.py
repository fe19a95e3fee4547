"""Scores and measures a batch of windows in test and validate.

    audio --encode--> codes --score--> readings --metrics--> one record per window

A window that cannot be read or scored gets a record with the reason for its failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, Protocol

import torch

from musicgen_eval.data.plan import Plan
from musicgen_eval.errors import NON_FINITE_REMEDY
from musicgen_eval.inference.readings import CodedWindow, score_readings
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.inputs import WindowData, fetch
from musicgen_eval.metrics.plugin.states import State
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.models.numerics import float32_by_default, full_precision
from musicgen_eval.models.threads import single_threaded
from musicgen_eval.results.measurements import WindowRecord
from musicgen_eval.results.running_totals import RunningTotals
from musicgen_eval.runs.window_dataset import Batch, WindowAudio


class Step(Protocol):
    """An object that measures batches of windows, one batch at a time."""

    def run(self, batch: Batch) -> list[WindowRecord]:
        """Measures a batch, and returns one record per window."""
        ...


class ScoringStep:
    """Scores batches of windows under teacher forcing.

    Args:
        model: Model, already prepared for `precision`.
        bank: Metrics of the task "score".
        plan: Plan of the run.
        tail: Treatment of the last frames of each window, as in `ModelSettings`.
        seed: Seed for readings that alter codes at random.
        save_nll: Whether to store the nll of every code in the window records.
        precision: Precision of the decoder, to be named in error messages.
        totals: Running totals, which are updated in place.
    """

    def __init__(
        self,
        model: MusicGen,
        bank: MetricBank,
        plan: Plan,
        *,
        tail: Literal["score", "drop"],
        seed: int,
        save_nll: bool,
        precision: str,
        totals: RunningTotals,
    ) -> None:
        self.model = model
        self.bank = bank
        self.plan = plan
        self.tail: Literal["score", "drop"] = tail
        self.seed = seed
        self.save_nll = save_nll
        self.precision = precision
        self.totals = totals

    def run(self, batch: Batch) -> list[WindowRecord]:
        """Scores and measures a batch, and returns one record per window.

        A record contains either the metric states or the reason why the window failed.
        """
        windows, records = readable_windows(batch)
        if not windows:
            return records
        with float32_by_default(), full_precision():
            window_data = self.score(windows)
            with single_threaded(), torch.autocast(self.model.device.type, enabled=False):
                states = self.bank.update(window_data)
        records += [self._record(*results) for results in zip(windows, window_data, states, strict=True)]
        self.totals.add([window.track_row for window in windows], window_data)
        return records

    def score(self, windows: Sequence[WindowAudio]) -> list[WindowData]:
        """Encodes and scores windows whose audio could be read, and returns the data of each window for the metrics."""
        codes = self.model.encode([window.audio for window in windows if window.audio is not None])
        coded = [
            CodedWindow(window.window, window_codes, window.text, window.other_text)
            for window, window_codes in zip(windows, codes, strict=True)
        ]
        readings = score_readings(
            self.model,
            coded,
            self.bank.readings,
            tail=self.tail,
            seed=self.seed,
            with_logits=self.bank.readings_with_logits,
        )
        frame_rate_hz = self.model.spec.frame_rate_hz
        return fetch(
            [
                WindowData(read, frame_rate_hz, track=partial(self.plan.open_track, window.track_row))
                for window, read in zip(windows, readings, strict=True)
            ]
        )

    def _record(self, window: WindowAudio, data: WindowData, states: dict[str, State]) -> WindowRecord:
        """Returns the record of a window. If the nll of any scored code is NaN or infinite, the record is a failure record."""
        for name, read in data.on_cpu.readings.items():
            if read is not None and not read.nll[read.scored].isfinite().all():
                reading = f"reading {name!r} of " if name else ""
                reason = (
                    f"{reading}window {window.window.index}: the nll is NaN or infinite in precision {self.precision}; "
                    f"{NON_FINITE_REMEDY}"
                )
                return WindowRecord(window.row, window.track_row, failure=reason)
        plain = data.on_cpu.readings[""]
        tensors = {"nll": plain.nll} if self.save_nll and plain is not None else {}
        return WindowRecord(window.row, window.track_row, states=states, tensors=tensors)


def readable_windows(batch: Batch) -> tuple[list[WindowAudio], list[WindowRecord]]:
    """Returns those windows of a batch whose audio could be read, and a failure record for each of the other windows."""
    windows = [window for window in batch.windows if window.audio is not None]
    failed = [
        WindowRecord(window.row, window.track_row, failure=window.failure)
        for window in batch.windows
        if window.failure is not None
    ]
    return windows, failed
