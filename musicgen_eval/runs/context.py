"""The context of a run: the state of one session of the run in one process.

    RunRecorder.setup          creates a context that stores records in the run folder
    MusicGenEvaluation.setup   takes this context, or creates a context in memory if no recorder provides one

After `setup`, the module holds the context. The data module and the callbacks read the context as `module.context`.
`runs/module.py` shows the order of the hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L

from musicgen_eval.data.batches import num_batches
from musicgen_eval.data.plan import Plan
from musicgen_eval.errors import RunError
from musicgen_eval.results.record_store import MeasuredBatches, RecordStore
from musicgen_eval.results.running_totals import RunningTotals
from musicgen_eval.runs.continuation_audio import ContinuationSink
from musicgen_eval.runs.settings import RunSettings


@dataclass(frozen=True)
class RunConstants:
    """Values that are shared by all sessions of a run. The first session of the run sets `threads` and `arithmetic`.

    Attributes:
        threads: Number of CPU threads for generating codes and decoding audio in predict. None means that the number has not been
            determined yet.
        arithmetic: Implementation of the decoder's matrix products. None means that the model has not been loaded yet.
        other_machines: Machines on which parts of the run were measured, excluding the machine of the first session.
    """

    threads: int | None = None
    arithmetic: str | None = None
    other_machines: tuple[Mapping[str, Any], ...] = ()


@dataclass
class RunContext:
    """The state of one session of a run in one process, from the `setup` hooks to the `teardown` hooks.

    Attributes:
        plan: Tracks, windows and batches of the run.
        batch_size: Number of windows per batch.
        store: Store of this process's window records.
        totals: Running totals of this process, for progress displays.
        measured: Batches that were measured in earlier sessions of the run.
        constants: Values that are shared by all sessions of the run.
        sink: Object that stores the continuations in predict. None means that the audio of continuations is kept in memory.
    """

    plan: Plan
    batch_size: int
    store: RecordStore
    totals: RunningTotals
    measured: MeasuredBatches = field(default_factory=MeasuredBatches)
    constants: RunConstants = field(default_factory=RunConstants)
    sink: ContinuationSink | None = None

    @property
    def is_complete(self) -> bool:
        """True if every batch was measured in an earlier session of the run."""
        return len(self.measured.batches) == num_batches(len(self.plan.windows), self.batch_size)

    def settle_threads(self, threads: int) -> int:
        """Returns the number of threads that the run uses. In the first session of the run, this number is set to `threads`."""
        self.constants = replace(self.constants, threads=self.constants.threads or threads)
        return self.constants.threads or threads

    def settle_arithmetic(self, arithmetic: str) -> None:
        """Sets the implementation of the matrix products, or checks that earlier sessions of the run used the same implementation.

        Raises:
            RunError: Earlier sessions of the run used a different implementation.
        """
        known = self.constants.arithmetic
        if known not in (None, arithmetic):
            raise RunError(
                f"the run was started with {known} kernels and would resume with {arithmetic} kernels, whose results differ in the "
                "last bits; resume it on the same type of device and with the same strategy"
            )
        self.constants = replace(self.constants, arithmetic=arithmetic)


class ContextProvider(L.Callback):
    """Base class of the callback that creates the context of a run. A trainer has at most one such callback.

    Attributes:
        context: Context of the current run, available once `setup` has run. None means that the module creates a context in memory.
        settings: Settings of the run.
    """

    context: RunContext | None = None
    settings: RunSettings = RunSettings()

    @property
    def index_path(self) -> Path | None:
        """Path of the file that stores properties of the source's audio files for later sessions, or None if there is no file."""
        return None


def context_provider(trainer: L.Trainer) -> ContextProvider:
    """Returns the trainer's `ContextProvider`, or a new `ContextProvider` without a context if the trainer has none."""
    found = (callback for callback in trainer.callbacks if isinstance(callback, ContextProvider))  # type: ignore[attr-defined]
    return next(found, ContextProvider())
