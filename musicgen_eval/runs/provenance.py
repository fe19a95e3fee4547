"""Describes the start of a session of a run: the time, the host and the Git commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from typing import Any


def start_record(*, processes: int, windows: int) -> dict[str, Any]:
    """Returns the run.json entry for one session: time, number of processes, host and number of planned windows."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": processes,
        "host": platform.node(),
        "windows": windows,
    }


def git_commit() -> str | None:
    """Returns the commit of the working directory, with `-dirty` appended if tracked files have changed.

    The result is None if the working directory is not in a Git repository.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
