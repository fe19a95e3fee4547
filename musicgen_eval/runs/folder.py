"""The run folder: one run's from its first start to its result, however often it is started in between.

    runs/<name>/ config.yaml  run.json  journal/                       from the start on
                 summary.json  tracks.csv  windows.csv  (nll.safetensors)  (wandb/)  (audio/)

A folder that is empty gets a run, one that holds an unfinished run goes on with it, one that holds a finished run is only read. One
process at a time holds it, by a lock that ends with the process. Knows names and locks; nothing of what is measured.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from time import monotonic
from typing import IO, Any, Literal

from musicgen_eval.errors import RunError
from musicgen_eval.files.atomic import atomic_file, is_leftover, remove_leftovers
from musicgen_eval.files.redaction import redact
from musicgen_eval.results.files import to_json

FolderState = Literal["new", "unfinished", "finished"]
LOCK = ".musicgen_eval.lock"  # stays where a process was killed, and says then whose folder it is
KEEP_AFTER_S = 60.0  # of work before anything was measured, such as opening files
_held_here: set[Path] = set()  # by this process
_OF_A_START = frozenset({"config.yaml", "run.json", "journal", "wandb"})  # what a run that measured nothing leaves


def default_run_dirs(command: str, *, now: datetime | None = None) -> Iterator[Path]:
    """Yields `runs/<date>-<command>`, then the same name with -2, -3 and so on."""
    plain = Path("runs") / f"{now or datetime.now():%Y%m%d-%H%M%S}-{command}"
    yield plain
    yield from (plain.with_name(f"{plain.name}-{number}") for number in count(2))


class RunFolder:
    """A folder for one run.

    Args:
        path: the folder, created when it is claimed; a leading `~` is the home directory.

    Attributes:
        path: the folder. A default name can still change until the folder is claimed.
        state: what it held when it was claimed.
        begun_with: the command that began the run, known once the folder is claimed; "" for a new run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded_path(path)
        self.state: FolderState = "new"
        self.begun_with = ""
        self._other_names: Iterator[Path] | None = None
        self._made: list[Path] = []
        self._found: set[str] = set()
        self._claimed_at = 0.0
        self._lock: IO[bytes] | None = None

    @classmethod
    def with_default_name(cls, command: str) -> RunFolder:
        """A folder of its own for a run of this command: claiming it takes the first default name that is free."""
        names = default_run_dirs(command)
        folder = cls(next(names))
        folder._other_names = names
        return folder

    @property
    def journal(self) -> Path:
        """Where what has been measured is kept."""
        return self.path / "journal"

    @property
    def index(self) -> Path:
        """Where it is kept what the files of the source held when the run began."""
        return self.journal / "index.npz"

    @property
    def run(self) -> dict[str, Any]:
        """What run.json says; {} before it is written."""
        try:
            found: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'run.json'} cannot be read ({error}); choose another run_dir") from error
        return found

    def claim(self) -> None:
        """Makes the folder and keeps others out of it, before anything is measured.

        Raises:
            RunError: it holds something that is no run, another process works in it, it is no folder, or it cannot be written to.
        """
        if "\0" in str(self.path):
            raise RunError(f"run_dir {str(self.path)!a} holds a null character; choose another with --run_dir")
        try:
            self._make()
            held = {entry.name for entry in self.path.iterdir()}
            self.begun_with = str(self.run.get("command", ""))
            foreign = [] if self.begun_with else sorted(_foreign(held))
            if not foreign:
                self._take_lock()
                self._found = held
                self._claimed_at = monotonic()
                remove_leftovers(self.path)
                remove_leftovers(self.journal)
                self.journal.mkdir(exist_ok=True)
        except BlockingIOError:
            raise RunError(
                f"run_dir {self.path} belongs to a run that is going on; wait for its end, or choose another with --run_dir"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise RunError(
                    f"run_dir {self.path}: its file system has no locks ({error.strerror}), without which two runs could not be "
                    "kept apart; mount it with locks, or choose another with --run_dir"
                ) from error
            raise RunError(
                f"run_dir {self.path} cannot be used: {error.strerror}; choose another with --run_dir"
            ) from error
        if foreign:
            raise RunError(
                f"run_dir {self.path} holds {', '.join(foreign[:3])}{', ...' * (len(foreign) > 3)} and no run; choose an empty or "
                "new folder with --run_dir"
            )
        if self.run:
            self.state = "finished" if "summary.json" in held else "unfinished"

    def write(self, name: str, content: str) -> None:
        """Writes a file of the run, whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        try:
            with atomic_file(self.path / name) as file:
                file.write(redact(content))
        except OSError as error:
            raise RunError(f"run_dir {self.path}: {name} could not be written ({error})") from error

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Writes run.json."""
        self.write("run.json", to_json(run))

    def unlock(self) -> None:
        """Lets others have the folder, which keeps all that it holds."""
        if self._lock is None:
            return
        with suppress(OSError):  # the folder may have become read-only; the lock ends all the same
            (self.path / LOCK).unlink()
        self._let_go()

    def remove_if_empty(self) -> None:
        """The folder as it was found, where a run ended before it had measured anything."""
        if self._lock is None:
            return
        if self.index.exists() and monotonic() - self._claimed_at > KEEP_AFTER_S:
            self._let_go()  # the lock file stays, and says that what was learnt of the files is ours
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

    def _make(self) -> None:
        """Creates the folder, which may exist already unless its name is a default one."""
        while True:
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            try:
                self.path.mkdir(parents=True, exist_ok=self._other_names is None)
                return
            except FileExistsError:
                if self._other_names is None:
                    raise
                self.path = next(self._other_names)

    def _let_go(self) -> None:
        assert self._lock is not None
        self._lock.close()
        self._lock = None
        _held_here.discard(self.path.resolve())

    def _take_lock(self) -> None:
        """A POSIX lock: it ends with the process, however that ends, and forked workers do not inherit it.

        It does not keep a process from itself, and opening the file once more would end it; hence `_held_here`.
        """
        if self.path.resolve() in _held_here:
            raise BlockingIOError
        lock = (self.path / LOCK).open("ab")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError:  # as some file systems say it
            lock.close()
            raise BlockingIOError from None
        except OSError:
            lock.close()
            raise
        if not _is_same_file(lock, self.path / LOCK):  # another process had it, and removed it as it ended
            lock.close()
            self._take_lock()
            return
        self._lock = lock
        _held_here.add(self.path.resolve())


def _foreign(held: set[str]) -> set[str]:
    """What of a folder without a run is not of a start that was killed before there was one."""
    if LOCK not in held:
        return held
    return {name for name in held - _OF_A_START - {LOCK} if not is_leftover(name)}


def _is_same_file(opened: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def expanded_path(path: str | Path) -> Path:
    """A path whose leading `~` or `~user` is replaced by that home directory, if there is one."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises where there is no home directory


def resume_line(command: str, path: Path) -> str:
    """How a run is resumed, for the user."""
    door = "musicgen-eval" if command in ("evaluate", "generate") else "python train_like_eval.py"
    return f"{door} {command} --resume {shlex.quote(str(path))}"


def resumed_arguments(run_dir: str | Path) -> list[str]:
    """What stands for `--resume`: the configuration that a run left, and its folder.

    Raises:
        RunError: there is no run.
    """
    path = expanded_path(run_dir)
    if not (path / "run.json").is_file() or not (path / "config.yaml").is_file():
        left = "" if path.is_dir() else ", which is no folder" if path.exists() else ", which does not exist"
        raise RunError(f"--resume {path}{left}: no run that could go on; give the folder that holds its run.json")
    return ["--config", str(path / "config.yaml"), "--run_dir", str(path)]


def run_record(*, command: str, seed: int, max_frames_from: str) -> dict[str, Any]:
    """What run.json says of the circumstances: machine, commit, time."""
    return {
        "command": command,
        "seed": seed,
        "max_frames_from": max_frames_from,
        "platform": platform.platform(),
        "git_commit": git_commit(),
        "starts": [],
    }


def start_record(*, processes: int, windows: int) -> dict[str, Any]:
    """Returns the entry of run.json for one start: time, number of processes, host and number of planned windows."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": processes,
        "host": platform.node(),
        "windows": windows,
    }


def git_commit() -> str | None:
    """The commit of the working directory, with `-dirty` where files differ from it; None outside of a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
