"""The callback that records a run in a run folder.

    setup   rank 0 checks or writes run.json and reads the journal --> every rank creates a RunContext on the folder
    end     rank 0 writes the result files and prints the tables of the result

`runs/module.py` shows the order of the hooks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
from rich.console import Console

from musicgen_eval.data.plan import Plan
from musicgen_eval.errors import RunError
from musicgen_eval.files.redaction import redact
from musicgen_eval.results.evaluation_result import EvaluationResult
from musicgen_eval.results.files import summary, to_json, write_result
from musicgen_eval.results.journal.reader import JournalReader
from musicgen_eval.results.record_store import JournalStore, RecordStore
from musicgen_eval.results.running_totals import RunningTotals
from musicgen_eval.results.terminal import print_result
from musicgen_eval.runs.context import ContextProvider, RunContext
from musicgen_eval.runs.continuation_files import ContinuationFolder
from musicgen_eval.runs.continuation_table import read_table
from musicgen_eval.runs.folder import RunFolder
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.processes.data_workers import comes_from_a_dead_worker
from musicgen_eval.runs.processes.rank_messages import decide_on_rank_0
from musicgen_eval.runs.resume_check import refuse_other_ranks
from musicgen_eval.runs.run_start import RunStart, start_run
from musicgen_eval.runs.settings import AudioSettings, RunSettings

DEFAULT_AUDIO = AudioSettings()
DEFAULT_SETTINGS = RunSettings()
MAX_LISTED = 8
"""Maximum number of continuations whose files are listed one by one."""


class RunRecorder(ContextProvider):
    """Records a run in a run folder, and prints the result of the run on rank 0.

    If a run ends early, its completed batches are kept, and the run can be resumed. If a new run ends before its first batch, the
    folder is restored to its previous state.

    Args:
        folder: Run folder, which must be claimed before `setup`. None means that no files are written.
        command: Command of the run, to be recorded in run.json.
        config_yaml: Content of config.yaml for a new run.
        resume: Function that takes the path of a run folder, and returns the line that tells the user how to resume the run.
            None means that no line is printed.
        console: Console for the tables of the result. None means that nothing is printed, not even on standard error.
        audio: Settings of the audio files.
        settings: Settings for resuming.

    Attributes:
        files: Paths of the files that were written at the end of the run, in order of importance.
        continuations: Rows of continuations.csv as dictionaries.
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
        self.settings = settings
        self.files: list[Path] = []
        self.continuations: list[dict[str, str]] = []
        self.context: RunContext | None = None
        self._start: RunStart | None = None
        self._continuation_folder: ContinuationFolder | None = None

    @property
    def index_path(self) -> Path | None:
        """Path of the file that stores properties of the source's audio files for later sessions, or None if there is no file."""
        return None if self.folder is None else self.folder.index

    @property
    def finds_result(self) -> bool:
        """True if the run had already finished before this session, in which case the session only prints the result."""
        is_finished = self.folder is not None and self.folder.state == "finished"
        return is_finished and self.context is not None and self.context.is_complete

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Starts or resumes the run on rank 0, and creates a context on the run folder on every rank."""
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
            allow_other_machine=self.settings.allow_other_machine,
        )
        if stage == "predict":
            self._continuation_folder = self._new_continuation_folder(folder, pl_module, start, trainer.global_rank)
        self.context = self._new_context(folder, pl_module, start, trainer.global_rank)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the constants of the run to run.json before the first batch."""
        if self.folder is None or self.context is None or not trainer.is_global_zero:
            return
        run, arithmetic = self.folder.run, self.context.constants.arithmetic
        assert run is not None
        assert run.settled is not None
        if arithmetic is not None and run.settled.arithmetic != arithmetic:
            self.folder.write_run(replace(run, settled=replace(run.settled, arithmetic=arithmetic)))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the result to the run folder, and prints the result."""
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
        """Closes the store, then unlocks the folder and reports which files are kept.

        If the run was new and no window was measured, the folder is restored to its previous state instead.
        """
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
        return start_run(
            folder,
            trainer,
            module,
            command=self.command,
            config_yaml=self.config_yaml,
            audio=self.audio,
            settings=self.settings,
            say=self._say,
        )

    def _new_context(self, folder: RunFolder, module: MusicGenEvaluation, start: RunStart, rank: int) -> RunContext:
        plan, batch_size, spec = module.data.plan, module.data.settings.batch_size, module.spec
        assert plan is not None
        store = JournalStore(
            start.path
            / folder.journal.name,  # absolute, because nll may be read after the working directory has changed
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
        """Writes the result files unless an earlier session has already written them, then unlocks the folder."""
        if self.finds_result:
            self._say(f"{folder.path} contains a finished run; its result follows")
            if (folder.path / "summary.json").read_text(encoding="utf-8") != to_json(summary(result)):
                self.files = write_result(folder.path, result)  # summary.json is damaged or outdated
            if self._continuation_folder is not None:
                self.continuations = read_table(folder.path / "continuations.csv")
        else:
            continued = self._finish_continuations(folder, plan)
            written = write_result(folder.path, result)
            self.files = [*continued, *written, folder.path / "run.json", folder.path / "config.yaml"]
        folder.unlock()

    def _finish_continuations(self, folder: RunFolder, plan: Plan) -> list[Path]:
        """Merges the continuation tables. Returns the paths of the merged table and of the continuations.

        If there are more than `MAX_LISTED` continuations, the path of the audio folder replaces the paths of the continuations.
        """
        if self._continuation_folder is None:
            return []
        self.continuations = self._continuation_folder.finish(plan.tracks.ids)
        paths = [folder.path / row["path"] for row in self.continuations]
        return [folder.path / "continuations.csv", *(paths if len(paths) <= MAX_LISTED else [folder.path / "audio"])]

    def _close_store(self, store: RecordStore) -> None:
        """Closes the store of a run that ends with an error.

        torch reports a dead DataLoader worker from a signal handler, which can run at any time, even while the journal is being
        closed. In that case, this method calls `close` again.
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
        """Unlocks the folder and reports the kept files. If the run is new and no window was measured, restores the folder."""
        written = self._continuation_folder
        num_written = 0 if written is None else written.num_written
        if written is not None and num_written:
            self._say(f"\n{num_written} continuations are kept and listed in {written.table.path}")
        if folder.state == "new" and not num_written and not _has_measured(folder):
            folder.remove_if_empty()
            return
        if self.resume is not None and self._start is not None:
            has_failures = context is not None and bool(context.store.failed or context.plan.failures)
            self._say(_resume_message(folder.path, self.resume(folder.path), has_failures=has_failures))
        folder.unlock()

    def _say(self, line: str) -> None:
        """Prints a line for the user on standard error. Standard output receives only the result."""
        if self.console is not None:
            print(redact(line), file=sys.stderr)


def _has_measured(folder: RunFolder) -> bool:
    """Returns True if the journal contains a window that did not fail. A run in which every window failed is treated as empty."""
    return any(row.failure is None for _, rows in JournalReader(folder.journal).batches() for row in rows)


def _resume_message(path: Path, resume_line: str, *, has_failures: bool) -> str:
    lines = [f"\ncompleted batches are kept in {path}; to resume the run:", f"  {resume_line}"]
    if has_failures:
        lines.append(
            "  add --max_failures to record the failed tracks and continue, or --retry_failures after fixing the files"
        )
    return "\n".join(lines)
