"""The callback that makes an evaluation a run in a folder: begun or gone on with, kept as it is measured, written and printed.

    setup   rank 0: fingerprint compared, journal read --> all ranks: which batches are done, where to keep the others
    end     rank 0: result --> files and a table

Knows when; what is compared is `fingerprint.py`'s, what is kept `keeping.py`'s, what is printed `tables.py`'s, what is written
`run_folder.py`'s, `result_files.py`'s and `continuation_files.py`'s.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from musicgen_eval.runs.continuation_files import (
    AudioSettings,
    ContinuationFolder,
    continuation_path,
    read_table,
    sweep,
    written_continuations,
)
from musicgen_eval.runs.datamodule import WindowDataModule, comes_from_a_dead_worker
from musicgen_eval.errors import RunError
from musicgen_eval.runs.fingerprint import differences, machine, metric_settings, weights_digest
from musicgen_eval.results.record_store import MeasuredBatches, JournalStore, read_measured
from musicgen_eval.results.journal.reader import JournalReader
from musicgen_eval.runs.module import MusicGenEvaluation, Settled
from musicgen_eval.data.batches import batch_rows
from musicgen_eval.data.continuation_plan import settle_stride
from musicgen_eval.data.planning import refuse_failures
from musicgen_eval.runs.processes.rank_messages import decide_on_rank_0, gather_on_rank_0
from musicgen_eval.records import Failure
from musicgen_eval.files.redaction import redact
from musicgen_eval.results.files import summary, to_json, write_result
from musicgen_eval.runs.folder import RunFolder, run_record, start_record
from musicgen_eval.results.terminal import print_result

UNLIKE = "{begun} on another machine, whose last bits may differ; --allow_other_machine lets it go on, and the result will say so:"
MAX_LISTED = 8  # continuations that are named one by one
NOT_OF_THE_NUMBERS = ("source", "arithmetic", "other_machines", "resamplers", "notes")
"""Parts of the recipe that no fingerprint holds: where the same tracks lie, and what follows from the rest."""


@dataclass(frozen=True)
class Start:
    """What rank 0 tells the others as a run begins or goes on.

    Attributes:
        path: the run folder.
        number: of this start, from 0.
        done: what earlier starts have measured.
        settled: what the first start settled.
        machine: rank 0's.
    """

    path: Path
    number: int
    done: MeasuredBatches
    settled: Settled
    machine: Mapping[str, Any]


class RunRecorder(L.Callback):
    """Keeps a run in a folder, and prints its result on rank 0.

    A run that ends early leaves what it has measured, and goes on from there when it is started again; one that has measured
    nothing leaves the folder as it was found.

    Args:
        folder: a claimed folder; None: nothing is written.
        command: which command ran, for run.json.
        config_yaml: the configuration, for config.yaml.
        resume: tells the user how a run in this folder is resumed; None: says nothing.
        console: where to print the result tables; None: the run prints nothing, on standard error neither.
        audio: how continuations are written.
        allow_other_machine: goes on with what was begun on another machine, or with other versions of libraries.

    Attributes:
        files: what was written at the end, in the order of interest.
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
        audio: AudioSettings | None = None,
        allow_other_machine: bool = False,
    ) -> None:
        self.folder = folder
        self.command = command
        self.config_yaml = config_yaml
        self.resume = resume
        self.console = console
        self.audio = audio or AudioSettings()
        self.allow_other_machine = allow_other_machine
        self.files: list[Path] = []
        self.continuations: list[dict[str, str]] = []
        self._written: ContinuationFolder | None = None
        self._start: Start | None = None
        self._keeper: JournalStore | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begins the run, or goes on with it: tells every rank what is left, and gives it somewhere to keep what it measures."""
        assert isinstance(pl_module, MusicGenEvaluation)
        if self.folder is None:
            return
        folder, data = self.folder, pl_module.data
        start = decide_on_rank_0(trainer, lambda: self._begin(folder, trainer, pl_module, data))
        if not trainer.is_global_zero:  # whose default name is of another second
            folder.path = start.path
        self._start = start
        self._check_ranks(trainer, pl_module)
        assert data.plan is not None
        data.done = frozenset(start.done.batches)
        pl_module.settled = start.settled
        pl_module.keeper = self._keeper = JournalStore(
            start.path / folder.journal.name,  # curves are read from it later, from wherever that is
            data.plan,
            pl_module.bank.metrics,
            batch_size=data.settings.batch_size,
            frame_rate_hz=pl_module.spec.frame_rate_hz,
            start=start.number,
            rank=trainer.global_rank,
            failed=start.done.failed,
        )
        if stage == "predict":
            spec = pl_module.spec
            pl_module.sink = self._written = ContinuationFolder(
                folder.path,
                self.audio,
                continuation=pl_module.continuation,
                stride_s=settle_stride(pl_module.continuation, spec) / spec.frame_rate_hz,
                start=start.number,
                rank=trainer.global_rank,
            )

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes down, before the first batch, what the run has settled."""
        assert isinstance(pl_module, MusicGenEvaluation)
        if self.folder is None or self._start is None or not trainer.is_global_zero:
            return
        run, arithmetic = self.folder.run, pl_module.settled.arithmetic
        if run["settled"]["arithmetic"] != arithmetic is not None:
            self.folder.write_run({**run, "settled": {**run["settled"], "arithmetic": arithmetic}})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes, then prints."""
        assert isinstance(pl_module, MusicGenEvaluation)
        if not trainer.is_global_zero or pl_module.result is None:
            return
        try:
            if self.folder is not None:
                self._finish(self.folder, pl_module)
        finally:
            if self.console is not None:
                print_result(pl_module.result, self.console, files=self.files)

    on_validation_epoch_start = on_test_epoch_start
    on_predict_epoch_start = on_test_epoch_start
    on_validation_end = on_test_end
    on_predict_end = on_test_end

    def finds_result(self, data: WindowDataModule) -> bool:
        """Whether an earlier start has finished the run, so that this one only prints its result."""
        return self.folder is not None and self.folder.state == "finished" and data.all_done

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lets go of the folder, and says what stays."""
        folder = self.folder
        assert isinstance(pl_module, MusicGenEvaluation)
        pl_module.keeper, pl_module.sink = None, None  # what comes after is no part of this run
        try:
            self._close_records()
        finally:
            if trainer.is_global_zero and folder is not None:
                self._leave(folder, pl_module)

    def _close_records(self) -> None:
        """Closes the journal of a run that ends with an error.

        torch reports a dead DataLoader worker from a signal handler, which may run at any moment, also while the journal is being
        closed. Closing is then repeated.
        """
        if self._keeper is None:
            return
        try:
            try:
                self._keeper.close()
            except RuntimeError as error:
                if isinstance(error, RunError) or not comes_from_a_dead_worker(error):
                    raise
                self._keeper.close()
        except RunError as error:
            self._say(str(error))

    def _leave(self, folder: RunFolder, pl_module: MusicGenEvaluation) -> None:
        """Unlocks the folder and says what it holds, or removes it if the run has measured nothing."""
        written = self._written
        if written is not None and written.num_written:
            self._say(f"\n{written.num_written} continuations stay, and are listed in {written.table}")
        if folder.state != "new" or (written is not None and written.num_written) or _has_measured(folder):
            if self.resume is not None and self._start is not None:
                failed = bool(self._keeper and self._keeper.failed) or bool(
                    pl_module.data.plan and pl_module.data.plan.failures
                )
                told = "\n  with --max_failures to record what failed, or --retry_failures once it is mended" * failed
                self._say(
                    f"\nwhat was measured stays in {folder.path}; go on with it:\n  {self.resume(folder.path)}{told}"
                )
            folder.unlock()
        else:
            folder.remove_if_empty()

    def _begin(
        self, folder: RunFolder, trainer: L.Trainer, module: MusicGenEvaluation, data: WindowDataModule
    ) -> Start:
        """On rank 0: compares with what the run was, or writes down what it is."""
        assert data.plan is not None
        asked = json.loads(to_json({"fingerprint": self._fingerprint(module, data), "machine": machine(module.device)}))
        run = folder.run
        if not run:
            run = {
                **run_record(command=self.command, seed=module.seed, max_frames_from=module.checkpoint.max_frames_from),
                **asked,
                "settled": {"threads": self._threads(trainer, module), "arithmetic": None},
            }
            folder.write("config.yaml", self.config_yaml)
        else:
            self._compare(folder, run, asked)
        done = read_measured(folder.journal, data.plan, data.settings.batch_size, retry_failures=data.retry_failures)
        number = max(len(run["starts"]), done.starts)
        for note in done.notes:
            self._say(f"journal: {note}")
        if folder.state != "new":
            sweep(folder.path)
            if data.plan.task == "continue":
                self._leave_out_lost(folder, done, data)
        if done.batches and not data.plan_is_done(done.batches):
            self._say(f"{folder.path}: {done.windows} of {len(data.plan.windows)} windows have been measured already")
        if not data.plan_is_done(done.batches):
            (folder.path / "summary.json").unlink(missing_ok=True)  # a result of less than there will be
            starts = [*run["starts"], start_record(processes=trainer.world_size)]
            folder.write_run({**run, "starts": starts})
        known = [Failure(data.plan.tracks.ids[row], reason) for row, reason in done.failed.items()]
        refuse_failures([*data.plan.failures, *known], data.settings.max_failures)
        settled = run["settled"]
        return Start(
            path=folder.path.absolute(),
            number=number,
            done=done,
            settled=Settled(settled["threads"], settled["arithmetic"], tuple(run.get("other_machines", ()))),
            machine=asked["machine"],
        )

    @staticmethod
    def _threads(trainer: L.Trainer, module: MusicGenEvaluation) -> int | None:
        """Of a CPU, for drawing and decoding: they are part of the last bits, and so of the whole run."""
        return (module.continuation.threads or torch.get_num_threads()) if trainer.state.fn == "predict" else None

    def _leave_out_lost(self, folder: RunFolder, done: MeasuredBatches, data: WindowDataModule) -> None:
        """Continuations whose files or rows are gone are generated again, with their batches."""
        plan, there = data.plan, written_continuations(folder.path)
        assert plan is not None
        lost = set()
        for number in done.batches:
            for row in batch_rows(number, len(plan.windows), data.settings.batch_size):
                window = plan.windows.window(row, plan.tracks.ids)
                has_failed = int(plan.windows.track[row]) in done.failed
                if not has_failed and continuation_path(window.track, window.index, self.audio.format) not in there:
                    lost.add(number)
        if lost:
            self._say(f"journal: the files of {len(lost)} batches are not all there; these are continued again")
        done.leave_out(lost, len(plan.windows), data.settings.batch_size)

    def _fingerprint(self, module: MusicGenEvaluation, data: WindowDataModule) -> dict[str, Any]:
        recipe = module.recipe()
        plan = data.plan
        assert plan is not None
        readings = [replace(reading, change=None) for reading in module.bank.readings]
        return {
            **{name: value for name, value in recipe.items() if name not in NOT_OF_THE_NUMBERS},
            "threads": module.continuation.threads,
            "weights": weights_digest(module.checkpoint),
            "tracks": len(plan.tracks),
            "data": plan.source_digest,
            "save_nll": module.save_nll,
            "readings": {reading.name: asdict(reading) for reading in readings},
            "metrics": metric_settings(module.bank),
            **({"audio": asdict(self.audio)} if plan.task == "continue" else {}),
        }

    def _compare(self, folder: RunFolder, run: dict[str, Any], asked: dict[str, Any]) -> None:
        """Refuses to go on with a run as something else than it was.

        Raises:
            RunError: names what differs.
        """
        if "fingerprint" not in run:
            raise RunError(f"run_dir {folder.path} holds a run without a journal; choose another with --run_dir")
        lines = differences(run["fingerprint"], asked["fingerprint"])
        if lines:
            raise RunError(
                "\n  ".join(
                    [
                        f"run_dir {folder.path} holds another run, begun with {run['command']}; choose another folder, or ask for "
                        "the same:",
                        *lines,
                    ]
                )
            )
        machines = [run["machine"], *run.get("other_machines", ())]
        if asked["machine"] in machines:
            return
        lines = differences(run["machine"], asked["machine"])
        if not self.allow_other_machine:
            raise RunError("\n  ".join([f"run_dir {folder.path} {UNLIKE.format(begun='was begun')}", *lines]))
        run["other_machines"] = [*run.get("other_machines", ()), asked["machine"]]

    def _check_ranks(self, trainer: L.Trainer, module: MusicGenEvaluation) -> None:
        """Refuses a folder that not every process sees, and processes on unlike machines."""
        assert self._start is not None
        start = self._start
        own = json.loads(to_json(machine(module.device)))
        ranks = gather_on_rank_0(trainer, ((start.path / "run.json").is_file(), own))

        def refuse() -> None:
            for rank, (sees, found) in enumerate(ranks or []):
                if not sees:
                    raise RunError(
                        f"run_dir {start.path} is not seen by rank {rank}; it must lie on a file system that all machines share"
                    )
                if found != start.machine and not self.allow_other_machine:
                    raise RunError(
                        "\n  ".join([f"rank {rank} {UNLIKE.format(begun='is')}", *differences(start.machine, found)])
                    )

        decide_on_rank_0(trainer, refuse)

    def _finish(self, folder: RunFolder, module: MusicGenEvaluation) -> None:
        """Writes the result where this start has found it, or finds it where an earlier one did."""
        assert module.result is not None
        assert module.measured is not None
        if self.finds_result(module.data):
            self._say(f"{folder.path} holds a finished run; this is its result")
            if (folder.path / "summary.json").read_text(encoding="utf-8") != to_json(summary(module.result)):
                self.files = write_result(folder.path, module.result)  # it was damaged, or is older than the journal
            if self._written is not None:
                self.continuations = read_table(folder.path / "continuations.csv")
        else:
            continued = []
            if self._written is not None:
                self.continuations = self._written.finish(module.measured.plan.tracks.ids)
                paths = [folder.path / row["path"] for row in self.continuations]
                continued = [
                    folder.path / "continuations.csv",
                    *(paths if len(paths) <= MAX_LISTED else [folder.path / "audio"]),
                ]
            written = write_result(folder.path, module.result)
            self.files = [*continued, *written, folder.path / "run.json", folder.path / "config.yaml"]
        folder.unlock()

    def _say(self, line: str) -> None:
        """Prints a line for the user on standard error; standard output holds the result alone."""
        if self.console is not None:
            print(redact(line), file=sys.stderr)


def _has_measured(folder: RunFolder) -> bool:
    """Whether any process has measured anything; failures alone are not worth keeping."""
    return any(row.failure is None for _, rows in JournalReader(folder.journal).batches() for row in rows)
