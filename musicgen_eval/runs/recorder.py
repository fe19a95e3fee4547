"""The callback that records a run in a folder.

    setup   rank 0: run.json compared or written, journal read --> every rank: a RunContext on the folder
    end     rank 0: result --> files and tables

`runs/module.py` shows the order of the hooks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from musicgen_eval.data.plan import Plan
from musicgen_eval.data.plan_builder import refuse_failures
from musicgen_eval.errors import RunError
from musicgen_eval.files.redaction import redact
from musicgen_eval.records import Failure
from musicgen_eval.results.files import summary, to_json, write_result
from musicgen_eval.results.journal.reader import JournalReader
from musicgen_eval.results.record_store import JournalStore, MeasuredBatches, RecordStore, read_measured
from musicgen_eval.results.running_totals import RunningTotals
from musicgen_eval.results.summary import EvaluationResult
from musicgen_eval.results.terminal import print_result
from musicgen_eval.runs.context import ContextProvider, RunConstants, RunContext
from musicgen_eval.runs.continuation_files import ContinuationFolder, read_table, remove_partial_files
from musicgen_eval.runs.datamodule import comes_from_a_dead_worker
from musicgen_eval.runs.folder import RunFolder, run_record, start_record
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.processes.rank_messages import decide_on_rank_0
from musicgen_eval.runs.resume_check import batches_without_files, refuse_other_ranks, refuse_other_run, run_identity
from musicgen_eval.runs.settings import AudioSettings, RunSettings

DEFAULT_AUDIO = AudioSettings()
DEFAULT_SETTINGS = RunSettings()
MAX_LISTED = 8  # number of continuations that are listed one by one


@dataclass(frozen=True)
class RunStart:
    """The message of rank 0 to all ranks when a run is started or resumed.

    Attributes:
        path: absolute path of the run folder.
        number: number of this start, from 0.
        measured: batches that earlier starts have measured.
        constants: values that the first start has determined.
        machine: device and library versions of rank 0.
    """

    path: Path
    number: int
    measured: MeasuredBatches
    constants: RunConstants
    machine: Mapping[str, Any]


class RunRecorder(ContextProvider):
    """Records a run in a folder, and prints its result on rank 0.

    A run that ends early keeps its completed batches, and is resumed when it is started again. A run that ends before its first
    batch restores the folder.

    Args:
        folder: a claimed folder. None means that nothing is written.
        command: the command of the run, for run.json.
        config_yaml: the configuration, for config.yaml.
        resume: returns the line that tells the user how a run in this folder is resumed. None means that no line is printed.
        console: prints the result tables. None means that nothing is printed, on standard error neither.
        audio: format of the continuations' files.
        settings: Settings for resuming.

    Attributes:
        files: files written at the end, the most important first.
        continuations: the rows of continuations.csv, by column.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        *,
        command: str,
        config_yaml: str,
        resume: Callable[[Path], str] | None = None,
        console: Console | None = None,
        audio: AudioSettings = DEFAULT_AUDIO,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> None:
        self.folder = folder
        self.command = command
        self.config_yaml = config_yaml
        self.resume = resume
        self.console = console
        self.audio = audio
        self.retry_failures = settings.retry_failures
        self.allow_other_machine = settings.allow_other_machine
        self.files: list[Path] = []
        self.continuations: list[dict[str, str]] = []
        self.context: RunContext | None = None
        self._start: RunStart | None = None
        self._continuation_folder: ContinuationFolder | None = None

    @property
    def index_path(self) -> Path | None:
        """File that keeps the properties of the source's files for later starts."""
        return None if self.folder is None else self.folder.index

    @property
    def finds_result(self) -> bool:
        """True during a run that an earlier start has finished, so that this start only prints the result."""
        is_finished = self.folder is not None and self.folder.state == "finished"
        return is_finished and self.context is not None and self.context.is_complete

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Starts or resumes the run on rank 0, and opens the context of every rank on the folder."""
        assert isinstance(pl_module, MusicGenEvaluation)
        self.context = self._start = self._continuation_folder = None
        folder = self.folder
        if folder is None:
            return
        start = decide_on_rank_0(trainer, lambda: self._begin(folder, trainer, pl_module))
        if not trainer.is_global_zero:
            folder.path = start.path  # a default name contains the time, which differs between ranks
        self._start = start
        refuse_other_ranks(
            trainer,
            pl_module,
            run_dir=start.path,
            machine_of_rank_0=start.machine,
            allow_other_machine=self.allow_other_machine,
        )
        if stage == "predict":
            self._continuation_folder = self._new_continuation_folder(folder, pl_module, start, trainer.global_rank)
        self.context = self._new_context(folder, pl_module, start, trainer.global_rank)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the constants of the run to run.json before the first batch."""
        if self.folder is None or self.context is None or not trainer.is_global_zero:
            return
        run, arithmetic = self.folder.run, self.context.constants.arithmetic
        if arithmetic is not None and run["settled"]["arithmetic"] != arithmetic:
            self.folder.write_run({**run, "settled": {**run["settled"], "arithmetic": arithmetic}})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the result, then prints it."""
        assert isinstance(pl_module, MusicGenEvaluation)
        result = pl_module.result
        if not trainer.is_global_zero or result is None:
            return
        try:
            if self.folder is not None and self.context is not None:
                self._finish(self.folder, self.context.plan, result)
        finally:
            if self.console is not None:
                print_result(result, self.console, files=self.files)

    on_validation_epoch_start = on_test_epoch_start
    on_predict_epoch_start = on_test_epoch_start
    on_validation_end = on_test_end
    on_predict_end = on_test_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the store, and releases the folder or removes what the run has put there. Reports what was kept."""
        context, self.context = self.context, None
        try:
            if context is not None:
                self._close_store(context.store)
        finally:
            if trainer.is_global_zero and self.folder is not None:
                self._release(self.folder, context)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Drops the context of the run."""
        self.context = None

    def _begin(self, folder: RunFolder, trainer: L.Trainer, module: MusicGenEvaluation) -> RunStart:
        """Starts or resumes the run on rank 0: compares or writes run.json, and reads the journal.

        Raises:
            RunError: the folder holds another run, or too many tracks have failed.
        """
        plan, settings = module.data.plan, module.data.settings
        assert plan is not None
        identity = run_identity(module, self.audio)
        run = folder.run
        if run:
            run = refuse_other_run(folder.path, run, identity, allow_other_machine=self.allow_other_machine)
        else:
            run = {
                **run_record(
                    command=self.command, seed=module.settings.seed, max_frames_from=module.checkpoint.max_frames_from
                ),
                "fingerprint": identity.fingerprint,
                "machine": identity.machine,
                "settled": {"threads": _threads(trainer, module), "arithmetic": None},
            }
            folder.write("config.yaml", self.config_yaml)
        measured = self._read_measured(folder, plan, settings.batch_size)
        number = max(len(run["starts"]), measured.starts)
        if measured.windows < len(plan.windows):
            (folder.path / "summary.json").unlink(missing_ok=True)  # it would lack the windows of this start
            started = start_record(processes=trainer.world_size, windows=len(plan.windows))
            folder.write_run({**run, "starts": [*run["starts"], started]})
        known = [Failure(plan.tracks.ids[row], reason) for row, reason in measured.failed.items()]
        refuse_failures([*plan.failures, *known], settings.max_failures)
        settled = run["settled"]
        return RunStart(
            path=folder.path.absolute(),
            number=number,
            measured=measured,
            constants=RunConstants(settled["threads"], settled["arithmetic"], tuple(run.get("other_machines", ()))),
            machine=identity.machine,
        )

    def _read_measured(self, folder: RunFolder, plan: Plan, batch_size: int) -> MeasuredBatches:
        """Reads from the journal which batches are measured, and removes what a killed process left unfinished."""
        measured = read_measured(folder.journal, plan, batch_size, retry_failures=self.retry_failures)
        for note in measured.notes:
            self._say(f"journal: {note}")
        if folder.state != "new":
            remove_partial_files(folder.path)
            if plan.task == "continue":
                lost = batches_without_files(folder.path, plan, measured, batch_size=batch_size, audio=self.audio)
                if lost:
                    self._say(f"journal: the files of {len(lost)} batches are not all there; these are continued again")
                measured.leave_out(lost, len(plan.windows), batch_size)
        if 0 < measured.windows < len(plan.windows):
            self._say(f"{folder.path}: {measured.windows} of {len(plan.windows)} windows have been measured already")
        return measured

    def _new_context(self, folder: RunFolder, module: MusicGenEvaluation, start: RunStart, rank: int) -> RunContext:
        plan, batch_size, spec = module.data.plan, module.data.settings.batch_size, module.spec
        assert plan is not None
        store = JournalStore(
            start.path
            / folder.journal.name,  # absolute, since curves are read later, perhaps from another working directory
            plan,
            module.bank.metrics,
            batch_size=batch_size,
            frame_rate_hz=spec.frame_rate_hz,
            start=start.number,
            rank=rank,
            failed=start.measured.failed,
        )
        return RunContext(
            plan=plan,
            batch_size=batch_size,
            store=store,
            totals=RunningTotals(spec),
            measured=start.measured,
            constants=start.constants,
            sink=self._continuation_folder,
        )

    def _new_continuation_folder(
        self, folder: RunFolder, module: MusicGenEvaluation, start: RunStart, rank: int
    ) -> ContinuationFolder:
        return ContinuationFolder(
            folder.path,
            self.audio,
            continuation=module.continuation,
            stride_s=module.continuation.stride_frames(module.spec) / module.spec.frame_rate_hz,
            start=start.number,
            rank=rank,
        )

    def _finish(self, folder: RunFolder, plan: Plan, result: EvaluationResult) -> None:
        """Writes the files of the result, unless an earlier start has written them. Releases the folder."""
        if self.finds_result:
            self._say(f"{folder.path} holds a finished run; this is its result")
            if (folder.path / "summary.json").read_text(encoding="utf-8") != to_json(summary(result)):
                self.files = write_result(folder.path, result)  # summary.json is damaged, or older than the journal
            if self._continuation_folder is not None:
                self.continuations = read_table(folder.path / "continuations.csv")
        else:
            continued = self._finish_continuations(folder, plan)
            written = write_result(folder.path, result)
            self.files = [*continued, *written, folder.path / "run.json", folder.path / "config.yaml"]
        folder.unlock()

    def _finish_continuations(self, folder: RunFolder, plan: Plan) -> list[Path]:
        """Merges the tables of continuations. Returns the table and the audio files, or their folder if they are many."""
        if self._continuation_folder is None:
            return []
        self.continuations = self._continuation_folder.finish(plan.tracks.ids)
        paths = [folder.path / row["path"] for row in self.continuations]
        return [folder.path / "continuations.csv", *(paths if len(paths) <= MAX_LISTED else [folder.path / "audio"])]

    def _close_store(self, store: RecordStore) -> None:
        """Closes the store of a run that ends with an error.

        torch reports a dead DataLoader worker from a signal handler, which may run at any moment, also while the journal is being
        closed. Closing is then repeated.
        """
        try:
            try:
                store.close()
            except RuntimeError as error:
                if isinstance(error, RunError) or not comes_from_a_dead_worker(error):
                    raise
                store.close()
        except RunError as error:
            self._say(str(error))

    def _release(self, folder: RunFolder, context: RunContext | None) -> None:
        """Unlocks the folder and reports what was kept, or restores the folder if the run has measured nothing."""
        written = self._continuation_folder
        num_written = 0 if written is None else written.num_written
        if written is not None and num_written:
            self._say(f"\n{num_written} continuations stay, and are listed in {written.table}")
        if folder.state == "new" and not num_written and not _has_measured(folder):
            folder.remove_if_empty()
            return
        if self.resume is not None and self._start is not None:
            has_failures = context is not None and bool(context.store.failed or context.plan.failures)
            self._say(_resume_message(folder.path, self.resume(folder.path), has_failures=has_failures))
        folder.unlock()

    def _say(self, line: str) -> None:
        """Prints a line for the user on standard error. Standard output holds the result alone."""
        if self.console is not None:
            print(redact(line), file=sys.stderr)


def _threads(trainer: L.Trainer, module: MusicGenEvaluation) -> int | None:
    """Returns the number of CPU threads of predict. It affects the last bits, so all starts of a run use the same number."""
    return (module.continuation.threads or torch.get_num_threads()) if trainer.state.fn == "predict" else None


def _has_measured(folder: RunFolder) -> bool:
    """Returns True if any process has measured a window. Failures alone are not kept."""
    return any(row.failure is None for _, rows in JournalReader(folder.journal).batches() for row in rows)


def _resume_message(path: Path, resume_line: str, *, has_failures: bool) -> str:
    lines = [f"\nwhat was measured stays in {path}; go on with it:", f"  {resume_line}"]
    if has_failures:
        lines.append("  with --max_failures to record what failed, or --retry_failures once it is mended")
    return "\n".join(lines)
