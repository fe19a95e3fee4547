"""The LightningModule of an evaluation.

In `trainer.test`, Lightning calls the hooks in this order. In `trainer.validate` and `trainer.predict`, the order is similar.

    data.setup                      rank 0 creates the plan and broadcasts it
    RunRecorder.setup               rank 0 reads the journal; every rank creates a RunContext on the run folder
    module.setup                    takes this context, or creates one in memory; refuses unsuitable settings
    module.configure_model          loads the weights, unless every batch is already measured
    data.test_dataloader            returns the batches of this rank that are not measured yet
    module.on_test_start            prepares the model; sets the constants of the context; creates the step
    RunRecorder.on_test_epoch_start writes the constants to run.json
    module.test_step                for each batch: step.run(batch) -> records -> context.store
    module.on_test_epoch_end        rank 0 gathers the records of all ranks, and sets `measured` and `result`
    RunRecorder.on_test_end         writes and prints the result
    RunRecorder.teardown            drops its context
    module.teardown                 drops its context

After an exception, Lightning calls `on_exception` on each callback, but does not call `teardown`. In that case, the recorder
closes the store and drops its context. The module keeps its context until the next `setup` replaces the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torchmetrics import Metric

from musicgen_eval.data.notes import demo_notes, print_notes
from musicgen_eval.data.plan import Plan
from musicgen_eval.data.plan_builder import refuse_failures
from musicgen_eval.errors import EvaluationError, RunError
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import InstalledMetric, MetricEntry
from musicgen_eval.metrics.plugin.entries import metric_entries
from musicgen_eval.models.checkpoint import Checkpoint, find_checkpoint
from musicgen_eval.models.loading import require_files
from musicgen_eval.models.musicgen import MusicGen, load_model, unreadable_texts
from musicgen_eval.models.numerics import numerics_in_use
from musicgen_eval.models.out_of_memory import out_of_memory_explained
from musicgen_eval.models.sharding import shard_decoder
from musicgen_eval.models.threads import single_threaded
from musicgen_eval.records import CodecSpec, Failure, Task
from musicgen_eval.records.signatures import takes_settings
from musicgen_eval.results.evaluation_result import EvaluationResult
from musicgen_eval.results.measurements import Measurements, WindowRecord
from musicgen_eval.results.record_store import MemoryStore
from musicgen_eval.results.running_totals import RunningTotals
from musicgen_eval.results.summary import summarise
from musicgen_eval.runs.context import RunConstants, RunContext, context_provider
from musicgen_eval.runs.continuation_step import Continuations, ContinuationStep
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.processes.lightning_internals import attached_trainer
from musicgen_eval.runs.processes.rank_messages import decide_on_rank_0, gather_on_rank_0, leave_process_group
from musicgen_eval.runs.processes.strategy import keeps_records, refuse_strategy, shares_model
from musicgen_eval.runs.recipe import run_recipe
from musicgen_eval.runs.scoring_step import ScoringStep, Step
from musicgen_eval.runs.settings import ModelSettings
from musicgen_eval.runs.trainer_settings import refuse_trainer_settings
from musicgen_eval.runs.window_dataset import Batch

DEFAULT_CONTINUATION = ContinuationSettings()


class MusicGenEvaluation(L.LightningModule):
    """Evaluates a MusicGen checkpoint on windows of audio.

    Attributes:
        model: The loaded model. None means that no model has been loaded yet.
        measured: Records of the latest run. None on ranks other than 0, and before the first run has finished.
        result: Result of the latest run. None on ranks other than 0, and before the first run has finished.
    """

    @takes_settings(
        positional=("checkpoint", "revision", "max_frames", "metrics", "tail", "save_nll", "seed", "continuation")
    )
    def __init__(
        self,
        settings: ModelSettings,
        metrics: dict[str, Metric | MetricEntry | InstalledMetric] | None = None,
        continuation: ContinuationSettings = DEFAULT_CONTINUATION,
    ) -> None:
        """Creates an evaluation. No checkpoint is opened.

        Args:
            metrics: Metrics by name. Each is a torchmetrics metric, `{metric: ..., inputs: {...}}` to rename its inputs, or
                `{name: ..., init_args: {...}, inputs: {...}}` for a metric that an installed package declares.
            continuation: Settings of predict.
        """
        super().__init__()
        if not isinstance(continuation, ContinuationSettings):
            raise RunError(f"continuation must be ContinuationSettings, got {type(continuation).__name__}")
        self.settings = settings
        self.continuation = continuation
        self._metrics = metric_entries({"perplexity": CodebookPerplexity()} if metrics is None else metrics)
        self.model: MusicGen | None = None
        self.measured: Measurements | None = None
        self.result: EvaluationResult | None = None
        self._checkpoint: Checkpoint | None = None
        self._is_callers_model = False
        self._banks: dict[Task, MetricBank] = {}
        self._context: RunContext | None = None
        self._step: Step | None = None
        self._stopped: str | None = None
        self._stays_on: torch.device | None = None
        self._text_notes: tuple[str, ...] = ()

    @classmethod
    def from_loaded(cls, model: MusicGen, **settings: Any) -> Self:
        """Creates an evaluation of a loaded model.

        Args:
            model: Model returned by `load_model`.
            **settings: Arguments of the constructor, excluding `checkpoint`, `revision` and `max_frames`.

        Raises:
            RunError: The model was not returned by `load_model`, or an excluded argument is given.
        """
        if not isinstance(model, MusicGen):
            raise RunError(f"model must be a model from load_model, got {type(model).__name__}")
        for name in ("checkpoint", "revision", "max_frames"):
            if settings.get(name) is not None:
                raise RunError(f"{name} is set when a model is loaded; pass it to load_model")
        module = cls(checkpoint=model.checkpoint.name, **settings)
        module._checkpoint = model.checkpoint
        module.model = model
        module._is_callers_model = True
        return module

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, as described by its configuration files. The weights need not be loaded."""
        if self._checkpoint is None:
            asked = self.settings
            self._checkpoint = find_checkpoint(
                str(asked.checkpoint), revision=asked.revision, max_frames=asked.max_frames
            )
        return self._checkpoint

    @property
    def spec(self) -> CodecSpec:
        """The codec specification of the checkpoint. The weights need not be loaded."""
        return self.checkpoint.spec

    @property
    def bank(self) -> MetricBank:
        """The metrics of the current task. The bank is not a submodule, so precision changes do not cast metric states."""
        return self.prepare(self._task)

    @property
    def generation_threads(self) -> int | None:
        """Number of CPU threads that generate codes and decode audio in predict, or None for other tasks.

        The number affects the last bits of the results, so all sessions of a run use the number of the first session.
        """
        return (self.continuation.threads or torch.get_num_threads()) if self._task == "continue" else None

    @property
    def context(self) -> RunContext:
        """The context of the current run.

        Raises:
            RunError: No run is in progress.
        """
        if self._context is None:
            raise RunError(
                "MusicGenEvaluation has a context only during a run; call trainer.test, trainer.validate or trainer.predict"
            )
        return self._context

    @property
    def data(self) -> WindowDataModule:
        """The trainer's data module, which provides the windows to evaluate."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, WindowDataModule):
            raise RunError(
                "MusicGenEvaluation needs a WindowDataModule; call trainer.test(module, datamodule=WindowDataModule(...))"
            )
        return data

    def prepare(self, task: Task) -> MetricBank:
        """Checks the checkpoint, the metrics and the settings without opening any audio. Returns the metrics of the task."""
        if task == "continue":
            self.settings.refuse_scoring_only("model")
            self.continuation.check_for(self.spec)
        if self.model is None:
            require_files(self.checkpoint.files)
        if task not in self._banks:
            self._banks[task] = MetricBank(self._metrics, spec=self.spec, task=task)
        return self._banks[task]

    def setup(self, stage: str) -> None:
        """Sets the context of the run, and rejects settings that the run does not support."""
        self._context = None
        refuse_strategy(self.trainer, self._task)
        if self.trainer.is_global_zero:
            print_notes(demo_notes("checkpoint", str(self.settings.checkpoint), file="config.json"))
        refuse_trainer_settings(self.trainer)
        if self.model is not None:
            self.model.refuse_change(self.trainer.precision, self.trainer.strategy.root_device)
            is_there = self.model.device.type == self.trainer.strategy.root_device.type
            self._stays_on = self.model.device if self._is_callers_model and is_there else None
        if self.trainer.is_global_zero:
            print_notes(self.checkpoint.notes)
        self._context = context_provider(self.trainer).context or self._context_in_memory()
        plan = self._context.plan
        self._refuse_missing_texts(plan)
        self.bank.budget.start(
            num_windows=len(plan.windows), most_windows_per_track=int(np.bincount(plan.windows.track).max(initial=0))
        )

    def configure_model(self) -> None:
        """Loads the weights in every process. Processes that share a model keep only their own parts of the model.

        If every batch is already measured, no weights are loaded.
        """
        if self.model is None and not self.context.is_complete:
            self.model = load_model(self.checkpoint)
            if self.device_mesh is not None:
                shard_decoder(self.model.decoder, self.device_mesh["tensor_parallel"])
        if self.model is not None and self.trainer.is_global_zero:
            self._text_notes = unreadable_texts(self.model, self.context.plan.tracks.texts)
            print_notes(self._text_notes)

    def on_test_start(self) -> None:
        """Prepares the model, and creates the step that measures batches."""
        self._stopped = None
        self._step = None
        self.result = self.measured = None
        if self.model is not None:
            self._unless_stopped(self._prepare_model, "preparing the model")
        if self.generation_threads is not None:
            self.context.settle_threads(self.generation_threads)
        self._step = self.make_step()

    def make_step(self) -> Step | None:
        """Returns the step that measures batches, or None if no model is loaded because every batch is already measured."""
        if self.model is None:
            return None
        if self._task == "continue":
            return ContinuationStep(
                self.model,
                self.bank,
                self.context.plan,
                replace(self.continuation, threads=self.context.constants.threads),
                stride_frames=self.continuation.stride_frames(self.spec),
                seed=self.settings.seed,
                sink=self.context.sink,
                totals=self.context.totals,
            )
        return ScoringStep(
            self.model,
            self.bank,
            self.context.plan,
            tail=self.settings.tail,
            seed=self.settings.seed,
            save_nll=self.settings.save_nll,
            precision=str(self.trainer.precision),
            totals=self.context.totals,
        )

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Encodes and scores the windows of a batch, and stores one record per window."""
        self._measure(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Continuations:
        """Continues the prompts of a batch, and stores one record per continuation.

        Returns:
            The continuations, which contain the paths of their files, or their audio if the run has no sink for continuations.
        """
        self._measure(batch)
        return self._step.take_continuations() if isinstance(self._step, ContinuationStep) else Continuations([])

    def on_predict_batch_end(self, *args: Any) -> None:
        """Ends the run after this batch if the process has received SIGTERM. In predict, Lightning does not do this itself."""
        if getattr(self.trainer, "received_sigterm", False):
            raise SIGTERMException

    def on_test_epoch_end(self) -> None:
        """Gathers the records of all ranks on rank 0, and computes the result there.

        Raises:
            RunError: One of the ranks failed. The error is raised on every rank.
        """
        parts = gather_on_rank_0(self.trainer, (self.context.store.close(), self._stopped))
        decide_on_rank_0(self.trainer, lambda: self._conclude(parts or []))

    def cpu(self) -> Self:
        """Moves the module to the CPU. Lightning calls this method at the end of a run.

        A model that was passed to `from_loaded` stays on the device of the run if it was on this device before the run. As a
        result, further runs do not need to copy the weights.
        """
        stays_on, self._stays_on = self._stays_on, None
        return super().cpu() if stays_on is None else self.to(stays_on)

    def teardown(self, stage: str) -> None:
        """Leaves the process group, and drops the context and the step of the run."""
        leave_process_group(self.trainer)
        self._context = self._step = None

    on_validation_start = on_test_start
    on_predict_start = on_test_start
    validation_step = test_step
    on_validation_epoch_end = on_test_epoch_end
    on_predict_epoch_end = on_test_epoch_end

    def recipe(self, constants: RunConstants) -> dict[str, Any]:
        """Returns the recipe of the run: everything that determines the results, including the given constants."""
        assert self.data.plan is not None
        return run_recipe(
            checkpoint=self.checkpoint,
            plan=self.data.plan,
            data=self.data.settings,
            model=self.settings,
            continuation=self.continuation,
            bank=self.bank,
            machine={
                "precision": self.trainer.precision,
                "device": self.device.type,
                "arithmetic": constants.arithmetic,
                **({"numerics": numerics_in_use()} if self.device.type == "cuda" else {}),
                **({"other_machines": list(constants.other_machines)} if constants.other_machines else {}),
            },
            threads=constants.threads,
            notes=(*self.checkpoint.notes, *self.data.plan.tracks.notes, *self._text_notes),
        )

    @property
    def _task(self) -> Task:
        trainer = attached_trainer(self)
        return "continue" if trainer is not None and trainer.state.fn == TrainerFn.PREDICTING else "score"

    def _refuse_missing_texts(self, plan: Plan) -> None:
        """Rejects any metric that needs the text of another track if there is no such text for some tracks."""
        if any(reading.text == "other" for reading in self.bank.readings) and None in plan.other_texts:
            track = plan.tracks[plan.other_texts.index(None)].id
            raise RunError(
                f"a metric needs the text of another track, but no track has a text that differs from that of track {track}; "
                "provide different texts for at least two tracks"
            )

    def _context_in_memory(self) -> RunContext:
        plan = self.data.plan
        assert plan is not None
        return RunContext(
            plan=plan,
            batch_size=self.data.settings.batch_size,
            store=MemoryStore(plan, self.bank.metrics),
            totals=RunningTotals(self.spec),
        )

    def _prepare_model(self) -> None:
        """Prepares the loaded model for the trainer's precision, and the metrics for the model and its device."""
        model = self.model
        assert model is not None
        model.prepare(self.trainer.precision, decoding=self._task == "continue")
        self.bank.prepare(model)
        self.bank.try_on(model.device)
        self.context.settle_arithmetic(model.arithmetic)

    def _unless_stopped(self, act: Callable[[], None], occasion: str = "processing a batch") -> None:
        """Calls `act` unless this rank has stopped. If `act` fails and other ranks are waiting, stops this rank.

        A stopped rank measures no further batches, and `on_test_epoch_end` raises the error of this rank on every rank. If there is
        only one process, or if the processes share a model, the error is raised immediately.
        """
        if self._stopped is not None:
            return
        try:
            with out_of_memory_explained(self.data.settings.batch_size, occasion):
                act()
        except EvaluationError as error:
            if self.trainer.world_size == 1 or shares_model(self.trainer):
                raise  # a process that shares the model with this process would wait for it in the next layer
            self._stopped = str(error)  # this rank must continue, because the other ranks wait for it at the end

    def _measure(self, batch: Batch) -> None:
        """Runs the step on a batch, and stores the batch's records. If the batch is empty, does nothing."""
        if not batch.windows:
            return
        step = self._step
        assert step is not None
        self._unless_stopped(lambda: self._keep(step.run(batch)))

    def _keep(self, records: Sequence[WindowRecord]) -> None:
        """Stores the records of a batch. In a run with a single process, raises an error if too many tracks have failed.

        In a run with several processes, this error is raised when the result is computed.
        """
        store = self.context.store
        if keeps_records(self.trainer):
            store.keep(records)
        if self.trainer.world_size == 1 and any(record.failure is not None for record in records):
            plan, allowed = self.context.plan, self.data.settings.max_failures
            if len(plan.failures) + len(store.failed) > allowed:
                during = [Failure(plan.tracks.ids[row], reason) for row, reason in store.failed.items()]
                refuse_failures([*plan.failures, *during], allowed)

    def _conclude(self, parts: Sequence[tuple[list[WindowRecord], str | None]]) -> None:
        """Computes the result on rank 0. The result is not sent to the other ranks, because it can be large."""
        stopped = next((stopped for _, stopped in parts if stopped is not None), None)
        if stopped is not None:
            raise RunError(stopped)
        with single_threaded(), torch.inference_mode(False):
            self.measured = self.context.store.measurements([records for records, _ in parts])
            self.result = summarise(
                self.measured,
                bank=self.bank,
                recipe=self.recipe(self.context.constants),
                max_failures=self.data.settings.max_failures,
            )
