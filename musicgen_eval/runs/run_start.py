"""Starts or resumes a run in a claimed run folder. The functions in this module are called on rank 0 only.

    compare or write run.json --> read the journal --> RunStart

Rank 0 then sends the `RunStart` to all ranks.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L

from musicgen_eval.data.plan import Plan
from musicgen_eval.data.plan_builder import refuse_failures
from musicgen_eval.errors import RunError
from musicgen_eval.records import Failure
from musicgen_eval.results.record_store import MeasuredBatches, read_measured
from musicgen_eval.results.run_record import RunRecord, SettledValues
from musicgen_eval.runs.context import RunConstants
from musicgen_eval.runs.continuation_files import remove_partial_files
from musicgen_eval.runs.folder import RunFolder
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.provenance import git_commit, start_record
from musicgen_eval.runs.resume_check import RunIdentity, batches_without_files, refuse_other_run, run_identity
from musicgen_eval.runs.settings import AudioSettings, RunSettings


@dataclass(frozen=True)
class RunStart:
    """The message that rank 0 sends to all ranks when a run is started or resumed.

    Attributes:
        path: Absolute path of the run folder.
        number: Index of this session within the run, counted from 0.
        measured: Batches that were measured in earlier sessions of the run.
        constants: Values that are shared by all sessions of the run.
        machine: Device and library versions of rank 0.
    """

    path: Path
    number: int
    measured: MeasuredBatches
    constants: RunConstants
    machine: Mapping[str, Any]


def start_run(
    folder: RunFolder,
    trainer: L.Trainer,
    module: MusicGenEvaluation,
    *,
    command: str,
    config_yaml: str,
    audio: AudioSettings,
    settings: RunSettings,
    say: Callable[[str], None],
) -> RunStart:
    """Writes run.json for a new run, or checks that the existing run.json describes the same run. Then reads the journal.

    Args:
        folder: Run folder, already claimed.
        trainer: Trainer of the run.
        module: Evaluation that the trainer runs.
        command: Command of the run, to be recorded in run.json.
        config_yaml: Content of config.yaml for a new run.
        audio: Settings of the audio files.
        settings: Settings for resuming.
        say: Function that prints a line for the user.

    Raises:
        RunError: The folder contains a different run, run.json lacks values that resuming needs, or too many tracks have failed.
    """
    plan, data = module.data.plan, module.data.settings
    assert plan is not None
    identity = run_identity(module, audio)
    run = folder.run
    if run is not None:
        run = refuse_other_run(folder.path, run, identity, allow_other_machine=settings.allow_other_machine)
    else:
        run = _new_run(module, identity, command=command)
        folder.write("config.yaml", config_yaml)
    settled = run.settled
    if settled is None:
        raise RunError(
            f"run_dir {folder.path} contains a run whose run.json has no entry settled; choose another folder with --run_dir"
        )
    measured = read_measured(folder.journal, plan, data.batch_size, retry_failures=settings.retry_failures)
    _discard_incomplete(folder, plan, measured, batch_size=data.batch_size, audio=audio, say=say)
    number = max(len(run.starts), measured.starts)
    if measured.windows < len(plan.windows):
        (folder.path / "summary.json").unlink(missing_ok=True)  # the old result would lack the windows of this session
        started = start_record(processes=trainer.world_size, windows=len(plan.windows))
        folder.write_run(replace(run, starts=(*run.starts, started)))
    known = [Failure(plan.tracks.ids[row], reason) for row, reason in measured.failed.items()]
    refuse_failures([*plan.failures, *known], data.max_failures)
    return RunStart(
        path=folder.path.absolute(),
        number=number,
        measured=measured,
        constants=RunConstants(settled.threads, settled.arithmetic, run.other_machines),
        machine=identity.machine,
    )


def _new_run(module: MusicGenEvaluation, identity: RunIdentity, *, command: str) -> RunRecord:
    """Returns the record of a new run."""
    return RunRecord(
        command=command,
        seed=module.settings.seed,
        max_frames_from=module.checkpoint.max_frames_from,
        platform=platform.platform(),
        git_commit=git_commit(),
        fingerprint=identity.fingerprint,
        machine=identity.machine,
        settled=SettledValues(threads=module.generation_threads, arithmetic=None),
    )


def _discard_incomplete(
    folder: RunFolder,
    plan: Plan,
    measured: MeasuredBatches,
    *,
    batch_size: int,
    audio: AudioSettings,
    say: Callable[[str], None],
) -> None:
    """Deletes incomplete audio files, and removes from `measured` any batches whose audio files are missing.

    The function also prints the notes on the journal and the number of windows that are already measured.
    """
    for note in measured.notes:
        say(f"journal: {note}")
    if folder.state != "new":
        remove_partial_files(folder.path)
        if plan.task == "continue":
            lost = batches_without_files(folder.path, plan, measured, batch_size=batch_size, audio=audio)
            if lost:
                say(f"journal: files of {len(lost)} batches are missing; these batches are generated again")
            measured.leave_out(lost, len(plan.windows), batch_size)
    if 0 < measured.windows < len(plan.windows):
        say(f"{folder.path}: {measured.windows} of {len(plan.windows)} windows have already been measured")
