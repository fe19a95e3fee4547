"""The state of one run in one process.

    RunRecorder.setup          opens a context on the run folder
    MusicGenEvaluation.setup   takes this context, or creates one in memory if no recorder provides one

From then on, the module holds the context. The data module and the callbacks read it as `module.context`. `runs/module.py` shows
the order of the hooks.
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


@dataclass(frozen=True)
class RunConstants:
    """Values that the first start of a run determines for all later starts.

    Attributes:
        threads: Number of CPU threads for generating codes and decoding audio in predict. None means not determined yet.
        arithmetic: Implementation of the decoder's matrix products. None means that the model has not been loaded yet.
        other_machines: Further machines on which parts of the run were measured.
    """

    threads: int | None = None
    arithmetic: str | None = None
    other_machines: tuple[Mapping[str, Any], ...] = ()


@dataclass
class RunContext:
    """The state of one run in one process, from the `setup` hooks to `teardown`.

    Attributes:
        plan: Tracks, windows and batches of the run.
        batch_size: Number of windows per batch.
        store: Store of this process's window records.
        totals: Running totals of this process, for progress displays.
        measured: Batches that earlier starts of the run have measured.
        constants: Values that are the same in all starts of the run.
        sink: Receiver of continuations in predict. None means that their audio is kept in memory.
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
        """True if earlier starts of the run have measured every batch."""
        return len(self.measured.batches) == num_batches(len(self.plan.windows), self.batch_size)

    def settle_threads(self, threads: int) -> int:
        """Returns the number of threads of the run. The first start of the run sets it to `threads`."""
        self.constants = replace(self.constants, threads=self.constants.threads or threads)
        return self.constants.threads or threads

    def settle_arithmetic(self, arithmetic: str) -> None:
        """Sets the implementation of the matrix products, or compares it with that of the first start.

        Raises:
            RunError: The run was started with another implementation.
        """
        known = self.constants.arithmetic
        if known not in (None, arithmetic):
            raise RunError(
                f"the run was started with {known} kernels and would resume with {arithmetic} kernels, whose results differ in the "
                "last bits; resume it on the same type of device and with the same strategy"
            )
        self.constants = replace(self.constants, arithmetic=arithmetic)


class ContextProvider(L.Callback):
    """Base class of the callback that opens the context of a run. A trainer has at most one.

    Attributes:
        context: Context of the current run, from this callback's `setup` on. None means that the module creates one in memory.
        retry_failures: Whether to measure again the tracks that failed when the run was started before.
    """

    context: RunContext | None = None
    retry_failures: bool = False

    @property
    def index_path(self) -> Path | None:
        """File that stores the properties of the source's audio files for later starts of the run, or None if there is none."""
        return None


def context_provider(trainer: L.Trainer) -> ContextProvider:
    """Returns the trainer's provider, or one without a context if the trainer has none."""
    found = (callback for callback in trainer.callbacks if isinstance(callback, ContextProvider))  # type: ignore[attr-defined]
    return next(found, ContextProvider())
