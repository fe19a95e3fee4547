"""The LightningModule: what happens to a batch of windows, and what becomes of all of them.

    test_step             audio -> codes -> readings, in the trainer's precision
                          readings -> the bank -> a state a window, outside of autocast, on one thread
    predict_step          contexts -> continuations -> sink and bank (`continuing.py`)
    on_..._epoch_end      what all ranks kept (`keeping.py`) -> rank 0 -> `result`

`validate` does the same as `test`. Knows the model, the bank and Lightning; files are written by callbacks and sinks. Longer than
most files, since Lightning calls all of these hooks on one class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.runs.argument_types import check_arguments
from musicgen_eval.metrics.plugin.bank import MetricBank, MetricEntry, named_metrics
from musicgen_eval.runs.continuation_step import BatchContinuation, Continuations, ContinuationSink
from musicgen_eval.runs.datamodule import Batch, WindowAudio, WindowDataModule
from musicgen_eval.errors import EvaluationError, RunError
from musicgen_eval.results.record_store import RecordStore, MemoryStore
from musicgen_eval.results.measurements import Measurements, WindowRecord
from musicgen_eval.metrics.plugin.states import State
from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.models.checkpoint import Checkpoint, find_checkpoint, refuse_other_types
from musicgen_eval.models.loading import require_files
from musicgen_eval.models.musicgen import MusicGen, load_model, unreadable_texts
from musicgen_eval.models.numerics import float32_by_default, full_precision, numerics_in_use
from musicgen_eval.models.out_of_memory import out_of_memory_explained
from musicgen_eval.models.sharding import shard_decoder
from musicgen_eval.models.threads import single_threaded
from musicgen_eval.data.notes import demo_notes, print_notes
from musicgen_eval.metrics.plugin.inputs import Offer, fetch
from musicgen_eval.data.continuation_plan import check_continuation, settle_stride
from musicgen_eval.data.planning import Plan, refuse_failures
from musicgen_eval.runs.processes.rank_messages import decide_on_rank_0, gather_on_rank_0, leave_process_group
from musicgen_eval.inference.readings import CodedWindow, score_readings
from musicgen_eval.runs.recipe import run_recipe
from musicgen_eval.records import CodecSpec, Continuation, ContinuationSettings, Failure, Task
from musicgen_eval.results.summary import EvaluationResult, summarise
from musicgen_eval.results.running_totals import RunningTotals
from musicgen_eval.runs.processes.strategy import keeps_records, refuse_strategy, shares_model

DEFAULT_CONTINUATION = ContinuationSettings()
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


@dataclass(frozen=True)
class Settled:
    """What a run settles when it first starts, for all of its starts.

    Attributes:
        threads: of a CPU, for drawing and decoding in predict.
        arithmetic: what computes the decoder's matrix products.
        other_machines: what else parts of it were measured on.
    """

    threads: int | None = None
    arithmetic: str | None = None
    other_machines: tuple[Mapping[str, Any], ...] = ()


class MusicGenEvaluation(L.LightningModule):
    """Evaluates a MusicGen checkpoint on windows of audio.

    Args:
        checkpoint: `demo`, a hub name such as `facebook/musicgen-small`, or a folder in transformers' format.
        revision: hub branch, tag or commit.
        max_frames: overrides the longest window that the checkpoint states, in frames.
        metrics: name -> a torchmetrics metric, or `{metric: ..., inputs: {...}}` to rename its inputs.
        tail: `score` counts every frame of every codebook; `drop` leaves out the last delays[k] frames of codebook k of
            each window, as audiocraft does.
        save_nll: keeps the nll of every code, and writes it as curves over each track.
        seed: of readings that change codes, and of continuations.
        continuation: how predict continues songs.
    """

    def __init__(
        self,
        checkpoint: str = "demo",
        revision: str | None = None,
        max_frames: int | None = None,
        metrics: dict[str, Metric | MetricEntry] | None = None,
        tail: Literal["score", "drop"] = "score",
        save_nll: bool = False,
        seed: int = 0,
        continuation: ContinuationSettings = DEFAULT_CONTINUATION,
    ) -> None:
        super().__init__()
        check_arguments(MusicGenEvaluation.__init__, locals(), without=("checkpoint", "metrics"))
        refuse_other_types(checkpoint)
        if not isinstance(continuation, ContinuationSettings):
            raise RunError(f"continuation must be ContinuationSettings, got {type(continuation).__name__}")
        self._asked = (str(checkpoint), revision, max_frames)
        self._metrics = {"perplexity": CodebookPerplexity()} if metrics is None else named_metrics(metrics)
        self.tail: Literal["score", "drop"] = tail
        self.save_nll = save_nll
        self.seed = seed
        self.continuation = continuation
        self.sink: ContinuationSink | None = None
        self.settings = {
            "checkpoint": str(checkpoint),
            "revision": revision,
            "max_frames": max_frames,
            "tail": tail,
            "save_nll": save_nll,
            "seed": seed,
            "continuation": asdict(continuation),
        }
        self.model: MusicGen | None = None
        self.result: EvaluationResult | None = None
        self.running: RunningTotals
        self.keeper: RecordStore | None = None
        self.measured: Measurements | None = None
        self.settled: Settled = Settled()
        self._keeper: RecordStore
        self._stopped: str | None = None
        self._text_notes: tuple[str, ...] = ()
        self._banks: dict[Task, MetricBank] = {}
        self._stays_on: torch.device | None = None
        self._is_callers_model = False
        self._continuer: BatchContinuation

    @classmethod
    def from_loaded(cls, model: MusicGen, **settings: Any) -> MusicGenEvaluation:
        """An evaluation of a model that is loaded already; settings as in the constructor."""
        module = cls(checkpoint=model.checkpoint.name, **settings)
        module.__dict__["checkpoint"] = model.checkpoint
        module.model = model
        module._is_callers_model = True
        return module

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, as found from its configuration."""
        name, revision, max_frames = self._asked
        return find_checkpoint(name, revision=revision, max_frames=max_frames)

    @property
    def spec(self) -> CodecSpec:
        """What the checkpoint says of its codes; known before its weights are loaded."""
        return self.checkpoint.spec

    @property
    def bank(self) -> MetricBank:
        """The metrics, tried and accepted. Not a submodule: a change of precision must not reach their states."""
        return self.prepare(self._task)

    def prepare(self, task: Task) -> MetricBank:
        """Refuses a wrong checkpoint, metric or setting before any audio is opened, and gives the metrics of a task."""
        if task == "continue":
            check_continuation(self.continuation, self.spec)
            for name, given in (("tail", self.tail != "score"), ("save_nll", self.save_nll)):
                if given:
                    raise RunError(
                        f"model.{name} says how windows are scored, and means nothing in predict; leave it out"
                    )
        if self.model is None:
            require_files(self.checkpoint.files)
        if task not in self._banks:
            self._banks[task] = MetricBank(self._metrics, spec=self.spec, task=task)
        return self._banks[task]

    def setup(self, stage: str) -> None:
        """Refuses what cannot be measured as asked."""
        refuse_strategy(self.trainer, self._task)
        if self.trainer.is_global_zero:
            print_notes(demo_notes("checkpoint", self._asked[0], file="config.json"))
        if self.trainer.precision not in PRECISIONS:
            raise RunError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.trainer.precision}")
        for setting in ("limit_test_batches", "limit_val_batches", "limit_predict_batches"):
            value = getattr(self.trainer, setting)
            if not (isinstance(value, float) and value == 1.0):
                self._refuse_setting(setting)
        for setting in ("fast_dev_run", "overfit_batches"):
            if getattr(self.trainer, setting):
                self._refuse_setting(setting)
        if self.trainer.strategy.root_device.type == "cuda" and torch.cuda.tunable.is_enabled():
            raise RunError(
                "PYTORCH_TUNABLEOP_ENABLED lets torch choose kernels by timing, so two runs would differ; unset it"
            )
        if self.model is not None:
            self.model.refuse_change(self.trainer.precision, self.trainer.strategy.root_device)
            is_there = self.model.device.type == self.trainer.strategy.root_device.type
            self._stays_on = self.model.device if self._is_callers_model and is_there else None
        if self.trainer.is_global_zero:
            print_notes(self.checkpoint.notes)
        plan = self._plan
        if any(reading.text == "other" for reading in self.bank.readings) and None in plan.other_texts:
            track = plan.tracks[plan.other_texts.index(None)].id
            raise RunError(
                f"a metric wants another track's text, and track {track} finds none; give at least two tracks different texts"
            )

    def configure_model(self) -> None:
        """Loads the weights, every process its own; where processes share a model, each keeps its part of them.

        A run that has measured everything already does without.
        """
        if self.model is None and not self.data.all_done:
            self.model = load_model(self.checkpoint)
            if self._device_mesh is not None:
                shard_decoder(self.model.decoder, self._device_mesh["tensor_parallel"])
        if self.model is not None and self.trainer.is_global_zero:
            self._text_notes = unreadable_texts(self.model, self._plan.tracks.texts)
            print_notes(self._text_notes)

    def on_test_start(self) -> None:
        """Starts afresh; what an earlier start of the run has measured is the keeper's."""
        self._keeper, self.keeper = self.keeper or MemoryStore(self._plan, self.bank.metrics), None
        self._stopped = None
        self.result = self.measured = None
        self.running = RunningTotals(self.spec)
        if self.model is not None:
            self._unless_stopped(self._prepare_model, "preparing the model")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Encodes and scores the windows of a batch, and keeps the state that each leaves in each metric."""
        self._unless_stopped(lambda: self._measure(batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> Continuations:
        """Continues the contexts of a batch, and keeps the state that each continuation leaves in each metric.

        Returns:
            What was generated; its audio where there is no sink to take it, the paths of its files where there is.
        """
        continuations: list[Continuation] = []
        self._unless_stopped(lambda: self._continue(batch, continuations))
        return Continuations(continuations)

    def on_predict_start(self) -> None:
        """Starts afresh."""
        self.on_test_start()
        threads = self.settled.threads or self.continuation.threads or torch.get_num_threads()
        self.settled = replace(self.settled, threads=threads)
        if self.model is None:
            return
        self._continuer = BatchContinuation(
            self._loaded,
            self.bank,
            self._plan,
            replace(self.continuation, threads=threads),
            stride_frames=settle_stride(self.continuation, self.spec),
            seed=self.seed,
            sink=self.sink,
        )

    def on_predict_batch_end(self, *args: Any) -> None:
        """Ends after the batch in hand when the process was told to; Lightning looks for it in test, and not here."""
        if getattr(self.trainer, "received_sigterm", False):
            raise SIGTERMException

    def on_test_epoch_end(self) -> None:
        """Brings the states of all ranks together; rank 0 keeps the result.

        Raises:
            RunError: on every rank, whatever went wrong on any.
        """
        parts = gather_on_rank_0(self.trainer, (self._keeper.close(), self._stopped))
        decide_on_rank_0(self.trainer, lambda: self._conclude(parts or []))

    def cpu(self) -> Self:
        """Moves the module to the CPU, except when Lightning calls this to end a run with a model that the caller has loaded.

        Then the model stays on the device if the run found it there. Otherwise each further run would copy all weights twice.
        """
        stays_on, self._stays_on = self._stays_on, None
        return super().cpu() if stays_on is None else self.to(stays_on)

    def teardown(self, stage: str) -> None:
        """Ends what ranks tell each other, and what belongs to this run alone."""
        leave_process_group(self.trainer)
        self.keeper, self.sink, self.settled = None, None, Settled()

    on_validation_start = on_test_start
    validation_step = test_step
    on_validation_epoch_end = on_test_epoch_end
    on_predict_epoch_end = on_test_epoch_end

    @property
    def _loaded(self) -> MusicGen:
        assert self.model is not None
        return self.model

    @property
    def data(self) -> WindowDataModule:
        """What is evaluated."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, WindowDataModule):
            raise RunError("MusicGenEvaluation is tested with a WindowDataModule: trainer.test(module, datamodule=...)")
        return data

    @property
    def _plan(self) -> Plan:
        assert self.data.plan is not None
        return self.data.plan

    @property
    def _task(self) -> Task:
        trainer = self._trainer
        return "continue" if trainer is not None and trainer.state.fn == TrainerFn.PREDICTING else "score"

    def _prepare_model(self) -> None:
        """Makes the loaded model ready for the trainer's precision, and tries metrics on its device."""
        model = self._loaded
        model.prepare(self.trainer.precision, decoding=self._task == "continue")
        self.bank.try_on(model.device)
        known = self.settled.arithmetic
        if known not in (None, model.arithmetic):
            raise RunError(
                f"the run was started with {known} products and would resume with {model.arithmetic} products, which differ in the "
                "last bits; resume it on the same type of device, and with the same strategy"
            )
        self.settled = replace(self.settled, arithmetic=model.arithmetic)

    def _unless_stopped(self, step: Callable[[], None], occasion: str = "a batch") -> None:
        if self._stopped is not None:
            return
        try:
            with out_of_memory_explained(self.data.settings.batch_size, occasion):
                step()
        except EvaluationError as error:
            if self.trainer.world_size == 1 or shares_model(self.trainer):
                raise  # who shares a model with this process would wait for it in the next layer
            self._stopped = str(error)  # the other ranks wait for this one; they all learn it at the end

    def _measure(self, batch: Batch) -> None:
        windows, failed = _readable(batch)
        with float32_by_default(), full_precision():
            offers = self._offers(windows) if windows else []
            with single_threaded(), torch.autocast(self.device.type, enabled=False):
                states = self.bank.update(offers)
        records = [self._record(*part) for part in zip(windows, offers, states, strict=True)]
        self.running.add([window.track_row for window in windows], offers)
        self._keep([*failed, *records])

    def _continue(self, batch: Batch, continuations: list[Continuation]) -> None:
        windows, records = _readable(batch)
        with float32_by_default(), full_precision():
            for continued in self._continuer.run(windows) if windows else ():
                track_row = continued.window.track_row
                if continued.continuation is not None and continued.offer is not None:
                    continuations.append(continued.continuation)
                    self.running.add([track_row], [continued.offer])
                    kept = {"codes": _compact(continued.continuation.codes)}
                else:
                    kept = {}
                states, failure = continued.states or {}, continued.failure
                records.append(WindowRecord(continued.window.row, track_row, states, failure, kept))
        self._keep(records)

    def _keep(self, records: Sequence[WindowRecord]) -> None:
        """Keeps a batch; more failures than allowed end a run of one process here, others at their end."""
        if keeps_records(self.trainer):
            self._keeper.keep(records)
        if self.trainer.world_size == 1 and any(record.failure is not None for record in records):
            plan, failed, allowed = self._plan, self._keeper.failed, self.data.settings.max_failures
            if len(plan.failures) + len(failed) > allowed:
                during = [Failure(plan.tracks.ids[row], reason) for row, reason in failed.items()]
                refuse_failures([*plan.failures, *during], allowed)

    def _conclude(self, parts: Sequence[tuple[list[WindowRecord], str | None]]) -> None:
        """On rank 0, where the result stays: it may be large."""
        stopped = next((stopped for _, stopped in parts if stopped is not None), None)
        if stopped is not None:
            raise RunError(stopped)
        with single_threaded(), torch.inference_mode(False):
            self.measured = self._keeper.measurements([records for records, _ in parts])
            self.result = summarise(
                self.measured, bank=self.bank, recipe=self.recipe(), max_failures=self.data.settings.max_failures
            )

    def _refuse_setting(self, setting: str) -> None:
        raise RunError(f"trainer.{setting} would leave tracks half measured; use data.limit, which counts tracks")

    def _offers(self, windows: Sequence[WindowAudio]) -> list[Offer]:
        codes = self._loaded.encode([window.audio for window in windows if window.audio is not None])
        coded = [
            CodedWindow(window.window, window_codes, window.text, window.other_text)
            for window, window_codes in zip(windows, codes, strict=True)
        ]
        readings = score_readings(
            self._loaded,
            coded,
            self.bank.readings,
            tail=self.tail,
            seed=self.seed,
            with_logits=self.bank.readings_with_logits,
        )
        return fetch([Offer(read, self.spec.frame_rate_hz) for read in readings])

    def _record(self, window: WindowAudio, offer: Offer, states: dict[str, State]) -> WindowRecord:
        """What is kept of a window; numbers that are not numbers make it a failure, not a quiet gap in a sum."""
        for name, read in offer.on_cpu.readings.items():
            if read is not None and not read.nll[read.scored].isfinite().all():
                reading = f"reading {name!r} of " if name else ""
                reason = (
                    f"{reading}window {window.window.index}: the decoder gave no finite nll in precision "
                    f"{self.trainer.precision}; try bf16-mixed or 32-true"
                )
                return WindowRecord(window.row, window.track_row, failure=reason)
        plain = offer.on_cpu.readings[""]
        kept = {"nll": plain.nll} if self.save_nll and plain is not None else {}
        return WindowRecord(window.row, window.track_row, states=states, tensors=kept)

    def recipe(self) -> dict[str, Any]:
        """All that the numbers depend on, as far as it is settled."""
        settings = self.data.settings
        task_settings: dict[str, Any]
        if self._task == "score":
            task_settings = {
                "head": settings.head, "tail": self.tail, "allow_beyond_limit": settings.allow_beyond_limit,
            }  # fmt: skip
        else:
            stride_s = settle_stride(self.continuation, self.spec) / self.spec.frame_rate_hz
            task_settings = {**asdict(self.continuation), "stride_s": stride_s, "threads": self.settled.threads}
            if self.device.type == "cpu":
                del task_settings["kernels"]  # a CPU ignores them
        return run_recipe(
            checkpoint=self.checkpoint,
            plan=self._plan,
            settings=settings,
            bank=self.bank,
            machine={
                "precision": self.trainer.precision,
                "device": self.device.type,
                "arithmetic": self.settled.arithmetic,
                **({"numerics": numerics_in_use()} if self.device.type == "cuda" else {}),
                **({"other_machines": list(self.settled.other_machines)} if self.settled.other_machines else {}),
            },
            seed=self.seed,
            notes=(*self.checkpoint.notes, *self._plan.tracks.notes, *self._text_notes),
            task_settings=task_settings,
        )


def _readable(batch: Batch) -> tuple[list[WindowAudio], list[WindowRecord]]:
    """The windows whose audio was read, and records of the others."""
    windows = [window for window in batch.windows if window.audio is not None]
    failed = [
        WindowRecord(window.row, window.track_row, failure=window.failure)
        for window in batch.windows
        if window.failure is not None
    ]
    return windows, failed


def _compact(codes: Tensor) -> Tensor:
    """Codes as a journal keeps them, in half or a quarter of the bytes."""
    return codes.to(torch.int16 if int(codes.max()) < 1 << 15 else torch.int32)
