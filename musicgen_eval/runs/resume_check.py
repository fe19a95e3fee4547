"""Checks whether the run in a folder may be resumed, and which of its batches must be measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L

from musicgen_eval.data.batches import batch_rows
from musicgen_eval.data.plan import Plan
from musicgen_eval.errors import RunError
from musicgen_eval.results.files import to_json
from musicgen_eval.results.record_store import MeasuredBatches
from musicgen_eval.results.run_record import RunRecord
from musicgen_eval.runs.audio_paths import continuation_path
from musicgen_eval.runs.context import RunConstants
from musicgen_eval.runs.continuation_table import written_continuations
from musicgen_eval.runs.fingerprint import differences, machine, metric_settings, weights_digest
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.processes.rank_messages import decide_on_rank_0, gather_on_rank_0
from musicgen_eval.runs.settings import AudioSettings

OTHER_MACHINE = (
    "{runs} on another machine, so results may differ in the last bits; pass --allow_other_machine to continue anyway (the result "
    "records both machines). Differences:"
)
NOT_IN_FINGERPRINT = ("source", "arithmetic", "other_machines", "resamplers", "notes")
"""Parts of the recipe that may differ when a run is resumed. The same tracks may come from a different source, and the other parts
follow from the rest of the recipe or are checked separately."""


@dataclass(frozen=True)
class RunIdentity:
    """The values that identify a run when it is resumed, converted to plain JSON values.

    Attributes:
        fingerprint: Settings, checkpoint, data and metrics. All of these must be identical when the run is resumed.
        machine: Device and library versions. These must also be identical unless `allow_other_machine` is set.
    """

    fingerprint: dict[str, Any]
    machine: dict[str, Any]


def run_identity(module: MusicGenEvaluation, audio: AudioSettings) -> RunIdentity:
    """Returns the identity of the run that a module is about to start."""
    return RunIdentity(_as_json(_fingerprint(module, audio)), _as_json(machine(module.device)))


def refuse_other_run(run_dir: Path, run: RunRecord, asked: RunIdentity, *, allow_other_machine: bool) -> RunRecord:
    """Compares the run in a folder with the run that is about to start.

    Args:
        run_dir: Path of the run folder.
        run: Record of the run in the folder.
        asked: Identity of the run that is about to start.
        allow_other_machine: Whether to accept and record a different machine.

    Returns:
        The record of the run. If the machine is different and accepted, the record includes this machine.

    Raises:
        RunError: The runs differ. The message lists the differences.
    """
    if not run.fingerprint:
        raise RunError(
            f"run_dir {run_dir} contains a run whose run.json has no fingerprint; choose another folder with --run_dir"
        )
    lines = differences(run.fingerprint, asked.fingerprint)
    if lines:
        refusal = (
            f"run_dir {run_dir} contains a different run, which was started with {run.command}; choose another folder with "
            "--run_dir, or use the same settings. Differences:"
        )
        raise RunError("\n  ".join([refusal, *lines]))
    if asked.machine in (run.machine, *run.other_machines):
        return run
    if not allow_other_machine:
        lines = differences(run.machine, asked.machine)
        raise RunError("\n  ".join([f"run_dir {run_dir} {OTHER_MACHINE.format(runs='was started')}", *lines]))
    return replace(run, other_machines=(*run.other_machines, asked.machine))


def refuse_other_ranks(
    trainer: L.Trainer,
    module: MusicGenEvaluation,
    *,
    run_dir: Path,
    machine_of_rank_0: Mapping[str, Any],
    allow_other_machine: bool,
) -> None:
    """Rejects a run if its folder is not visible on every rank, or if the machine of any rank differs from that of rank 0.

    Raises:
        RunError: The folder is not visible on some rank, or the machine of some rank is different and `allow_other_machine` is
            False. The error is raised on every rank.
    """
    own = _as_json(machine(module.device))
    ranks = gather_on_rank_0(trainer, ((run_dir / "run.json").is_file(), own))

    def refuse() -> None:
        for rank, (sees, found) in enumerate(ranks or []):
            if not sees:
                raise RunError(
                    f"run_dir {run_dir} does not exist on rank {rank}; choose a folder on a file system that all ranks share"
                )
            if found != machine_of_rank_0 and not allow_other_machine:
                lines = differences(machine_of_rank_0, found)
                raise RunError("\n  ".join([f"rank {rank} {OTHER_MACHINE.format(runs='runs')}", *lines]))

    decide_on_rank_0(trainer, refuse)


def batches_without_files(
    run_dir: Path, plan: Plan, measured: MeasuredBatches, *, batch_size: int, audio: AudioSettings
) -> set[int]:
    """Returns the batch numbers of measured batches for which an audio file or a row of continuations.csv is missing."""
    written = written_continuations(run_dir)
    lost = set()
    for number in measured.batches:
        for row in batch_rows(number, len(plan.windows), batch_size):
            window = plan.windows.window(row, plan.tracks.ids)
            has_failed = int(plan.windows.track[row]) in measured.failed
            if not has_failed and continuation_path(window.track, window.index, audio.format) not in written:
                lost.add(number)
    return lost


def _fingerprint(module: MusicGenEvaluation, audio: AudioSettings) -> dict[str, Any]:
    recipe, plan = module.recipe(RunConstants()), module.data.plan
    assert plan is not None
    readings = [replace(reading, change=None) for reading in module.bank.readings]
    return {
        **{name: value for name, value in recipe.items() if name not in NOT_IN_FINGERPRINT},
        "threads": module.continuation.threads,
        "weights": weights_digest(module.checkpoint),
        "tracks": len(plan.tracks),
        "data": plan.source_digest,
        "save_nll": module.settings.save_nll,
        "readings": {reading.name: asdict(reading) for reading in readings},
        "metrics": metric_settings(module.bank),
        **({"audio": asdict(audio)} if plan.task == "continue" else {}),
    }


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values to plain JSON values, so that they can be compared with values read from a JSON file."""
    read: dict[str, Any] = json.loads(to_json(values))
    return read
