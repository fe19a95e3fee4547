"""The content of run.json, which describes a run and its sessions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from musicgen_eval.errors import RunError
from musicgen_eval.records.settings import check_types
from musicgen_eval.results.files import to_json

FILE_NAME = "run.json"


@dataclass(frozen=True, kw_only=True)
class SettledValues:
    """Values that the first session of a run determines and that all later sessions use.

    Attributes:
        threads: Number of CPU threads for generating codes and decoding audio in predict. None means that the run does not
            generate codes.
        arithmetic: Implementation of the decoder's matrix products. None means that no session has loaded the model yet.
    """

    threads: int | None
    arithmetic: str | None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Description of a run, which the first session of the run writes to run.json.

    Attributes:
        command: Command that started the run: `test`, `validate`, `predict`, `evaluate` or `generate`.
        seed: Seed of the run.
        max_frames_from: Origin of the checkpoint's `max_frames`, as in `Checkpoint`.
        platform: Operating system of the first session.
        git_commit: Commit of the working directory, with `-dirty` appended if tracked files have changed. None outside a Git
            repository.
        starts: One entry per session, with the time, the number of processes, the host and the number of planned windows.
        fingerprint: Settings, checkpoint, data and metrics. All of these must be identical when the run is resumed.
        machine: Device and library versions of the first session.
        settled: Values that the first session determines and that all later sessions use. None means that run.json does not
            contain these values, and that the run cannot be resumed.
        other_machines: Other machines on which parts of the run were measured.
        wandb_run_id: Id of the W&B run, or None if the run is not logged to W&B.
    """

    command: str
    seed: int | None = None
    max_frames_from: str | None = None
    platform: str | None = None
    git_commit: str | None = None
    starts: tuple[Mapping[str, Any], ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    settled: SettledValues | None = None
    other_machines: tuple[Mapping[str, Any], ...] = ()
    wandb_run_id: str | None = None

    @classmethod
    def read(cls, folder: Path, *, remedy: str) -> RunRecord | None:
        """Reads the record of the run in a folder, or returns None if the folder has no run.json.

        Args:
            folder: Run folder.
            remedy: Advice to add to the error message if the file is damaged.

        Raises:
            RunError: The file is damaged.
        """
        path = folder / FILE_NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); {remedy}") from error
        if problem := _problem(found):
            raise RunError(f"{path} is damaged: {problem}; {remedy}")
        known: dict[str, Any] = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        if "settled" in known:
            known["settled"] = SettledValues(**{name: known["settled"][name] for name in _SETTLED_TYPES})
        return cls(**known)

    def to_json(self) -> str:
        """Returns the content of run.json."""
        content = asdict(self)
        for name in ("settled", "other_machines", "wandb_run_id"):
            if not content[name]:
                del content[name]
        return to_json(content)

    @property
    def num_windows_planned(self) -> int | None:
        """Number of windows in the plan of the last session, or None if there was no session."""
        planned: int | None = self.starts[-1].get("windows") if self.starts else None
        return planned


_TYPES = get_type_hints(RunRecord)
_SETTLED_TYPES = get_type_hints(SettledValues)


def _problem(found: Any) -> str:
    """Returns the reason why the content of a file is not a valid record, or "" if it is valid."""
    if not isinstance(found, dict):
        return f"expected a JSON object, got {type(found).__name__}"
    if not (isinstance(found.get("command"), str) and found["command"]):
        return "the command is missing"
    for name in ("fingerprint", "machine", "settled"):
        if not isinstance(found.get(name, {}), dict):
            return f"{name} must be a JSON object, got {type(found[name]).__name__}"
    for name in ("starts", "other_machines"):
        entries = found.get(name, [])
        if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
            return f"{name} must be a list of JSON objects"
    try:
        check_types(_TYPES, found)
        for entry in found.get("starts", []):
            check_types({"windows": int | None}, entry)
        return _problem_of_settled(found["settled"]) if "settled" in found else ""
    except RunError as error:
        return str(error)


def _problem_of_settled(found: Mapping[str, Any]) -> str:
    """Returns the reason why the values of `settled` are not valid, or "" if they are valid.

    Raises:
        RunError: A value does not have its declared type.
    """
    missing = [name for name in _SETTLED_TYPES if name not in found]
    if missing:
        return f"settled.{missing[0]} is missing"
    check_types(
        {f"settled.{name}": kind for name, kind in _SETTLED_TYPES.items()},
        {f"settled.{name}": value for name, value in found.items()},
    )
    threads = found["threads"]
    return f"settled.threads must be at least 1, got {threads}" if threads is not None and threads < 1 else ""
