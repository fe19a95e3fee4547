"""The run folder, which contains all files of one run.

    runs/<name>/ config.yaml  run.json  journal/                                           from the first session on
                 summary.json  tracks.csv  windows.csv  (nll.safetensors)  (wandb/)  (audio/)

A *session* is one launch of a run, from start or resume to its end. A run has several sessions if it is interrupted and resumed.

A new run requires a new or empty folder. If a folder contains an unfinished run, the run is resumed. If a folder contains a
finished run, only the result is read. Only one run at a time can claim a folder.
"""

from __future__ import annotations

import errno
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Literal

from musicgen_eval.errors import RunError
from musicgen_eval.files.atomic import atomic_file, is_leftover, remove_leftovers
from musicgen_eval.files.file_names import expanded
from musicgen_eval.files.redaction import redact
from musicgen_eval.results.run_record import RunRecord
from musicgen_eval.runs.folder_lock import LOCK, FolderLock

FolderState = Literal["new", "unfinished", "finished"]
KEEP_AFTER_S = 60.0
"""If a run takes at least this many seconds, the index of the source's audio files is kept even if no batch was measured."""
_FILES_OF_A_START = frozenset({"config.yaml", "run.json", "journal", "wandb"})
"""Files and folders that a run can leave behind if it is killed before its first batch."""


def default_run_dirs(command: str, *, now: datetime | None = None) -> Iterator[Path]:
    """Yields `runs/<date>-<command>`, then the same path with the suffix -2, -3 and so on."""
    plain = Path("runs") / f"{now or datetime.now():%Y%m%d-%H%M%S}-{command}"
    yield plain
    yield from (plain.with_name(f"{plain.name}-{number}") for number in count(2))


class RunFolder:
    """The folder of one run.

    Args:
        path: Path of the folder. The folder is created when it is claimed. A leading `~` stands for the home directory.

    Attributes:
        path: Path of the folder. A default name can change until the folder is claimed.
        state: State of the run in the folder when the folder was claimed.
        begun_with: Command that started the run in the folder, or "" if the run is new or the folder has not been claimed yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded_path(path)
        self.state: FolderState = "new"
        self.begun_with = ""
        self._other_names: Iterator[Path] | None = None
        self._made: list[Path] = []
        self._found: set[str] = set()
        self._claimed_at = 0.0
        self._lock = FolderLock()

    @classmethod
    def with_default_name(cls, command: str) -> RunFolder:
        """Returns a folder with a default name. Claiming the folder changes its name to the first unused default name."""
        names = default_run_dirs(command)
        folder = cls(next(names))
        folder._other_names = names
        return folder

    @property
    def journal(self) -> Path:
        """Path of the journal folder, which stores the records of completed batches."""
        return self.path / "journal"

    @property
    def index(self) -> Path:
        """Path of the file that stores properties of the source's audio files. The first session of the run writes this file."""
        return self.journal / "index.npz"

    @property
    def run(self) -> RunRecord | None:
        """The run that run.json describes, or None if the file does not exist.

        Raises:
            RunError: The file is damaged.
        """
        return RunRecord.read(self.path, remedy="restore it, or choose another folder with --run_dir")

    def claim(self) -> None:
        """Creates and locks the folder. This method must be called before the run starts.

        Raises:
            RunError: The folder contains files that do not belong to a run, the folder is in use by another run, the path is not a
                folder, or the folder cannot be written to.
        """
        if "\0" in str(self.path):
            raise RunError(
                f"run_dir {str(self.path)!a} contains a null character; choose another folder with --run_dir"
            )
        try:
            foreign = self._claim()
        except OSError as error:
            raise RunError(self._refusal(error)) from (None if isinstance(error, BlockingIOError) else error)
        if foreign:
            raise RunError(
                f"run_dir {self.path} is not empty ({', '.join(foreign[:3])}{', ...' * (len(foreign) > 3)}) and contains no run; "
                "choose an empty or new folder with --run_dir"
            )
        if self.begun_with:
            self.state = "finished" if "summary.json" in self._found else "unfinished"

    def write(self, name: str, content: str) -> None:
        """Writes a file to the folder atomically, with secrets redacted.

        Raises:
            RunError: The file cannot be written.
        """
        try:
            with atomic_file(self.path / name) as file:
                file.write(redact(content))
        except OSError as error:
            raise RunError(
                f"run_dir {self.path}: {name} could not be written ({error}); fix the cause and resume the run"
            ) from error

    def write_run(self, run: RunRecord) -> None:
        """Writes `run` to run.json."""
        self.write("run.json", run.to_json())

    def unlock(self) -> None:
        """Unlocks the folder, and keeps its files."""
        if self._lock.is_taken:
            self._lock.release()

    def remove_if_empty(self) -> None:
        """Unlocks the folder, and restores the state that it had before `claim`.

        This method must be called only if the run ended before its first batch. If creating the index of the source's audio files
        took a long time, the index is kept.
        """
        if not self._lock.is_taken:
            return
        if self.index.exists() and monotonic() - self._claimed_at > KEEP_AFTER_S:
            self._lock.release(keep_file=True)  # the lock file shows that the index belongs to this package
            return
        if self.state == "new":
            for name in {"journal", "wandb"} - self._found:
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in {"config.yaml", "run.json"} - self._found:
                with suppress(OSError):
                    (self.path / name).unlink()
        self.unlock()
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return

    def _claim(self) -> list[str]:
        """Creates the folder, and locks it unless it contains files that do not belong to a run.

        Returns:
            Names of the files that do not belong to a run.
        """
        self._make()
        found = {entry.name for entry in self.path.iterdir()}
        run = self.run
        self.begun_with = run.command if run is not None else ""
        foreign = [] if self.begun_with else sorted(_foreign(found))
        if not foreign:
            self._lock.take(self.path)
            self._found = found
            self._claimed_at = monotonic()
            remove_leftovers(self.path)
            remove_leftovers(self.journal)
            self.journal.mkdir(exist_ok=True)
        return foreign

    def _refusal(self, error: OSError) -> str:
        """Returns the message for an error that `_claim` raised."""
        if isinstance(error, BlockingIOError):
            return f"run_dir {self.path} is in use by another run; wait until it ends, or choose another folder with --run_dir"
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return (
                f"run_dir {self.path}: its file system does not support locks ({error.strerror}), which prevent two runs from "
                "using one folder; mount it with support for locks, or choose another folder with --run_dir"
            )
        return f"run_dir {self.path} cannot be used: {error.strerror}; choose another folder with --run_dir"

    def _make(self) -> None:
        """Creates the folder. If a folder with a default name already exists, tries the next default name."""
        while True:
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            try:
                self.path.mkdir(parents=True, exist_ok=self._other_names is None)
                return
            except FileExistsError:
                if self._other_names is None:
                    raise
                self.path = next(self._other_names)


def _foreign(found: set[str]) -> set[str]:
    """Returns the names of the files in a folder that contains no run, excluding files that a killed session left behind."""
    if LOCK not in found:
        return found
    return {name for name in found - _FILES_OF_A_START - {LOCK} if not is_leftover(name)}


def expanded_path(path: str | Path) -> Path:
    """Replaces a leading `~` or `~user` with the home directory, if there is one."""
    return Path(expanded(str(path)))


def resume_line(command: str, path: Path) -> str:
    """Returns the command line that resumes a run."""
    program = "musicgen-eval" if command in ("evaluate", "generate") else "python train_like_eval.py"
    return f"{program} {command} --resume {shlex.quote(str(path))}"


def resumed_arguments(run_dir: str | Path) -> list[str]:
    """Returns the command-line arguments that replace `--resume`: the configuration and the folder of the run.

    Raises:
        RunError: The folder contains no run.
    """
    path = expanded_path(run_dir)
    if not (path / "run.json").is_file() or not (path / "config.yaml").is_file():
        fact = "contains no run" if path.is_dir() else "is not a folder" if path.exists() else "does not exist"
        raise RunError(
            f"--resume {path}: the path {fact}; specify a run folder, which contains run.json and config.yaml"
        )
    return ["--config", str(path / "config.yaml"), "--run_dir", str(path)]
