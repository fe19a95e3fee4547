"""Prints notes: one-line messages about circumstances that affect the results but are not errors.

`TrackList.notes` contains the notes about the source, and `Plan.notes` contains all notes of a run. Rank 0 prints them when the run
starts.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from musicgen_eval.files.printable import printable
from musicgen_eval.files.redaction import redact


def print_notes(notes: Iterable[str]) -> None:
    """Prints each note to stderr on one line, with secrets redacted."""
    for note in notes:
        print(f"note: {printable(redact(note))}", file=sys.stderr)


def demo_notes(setting: str, value: object, file: str = "") -> tuple[str, ...]:
    """Returns a note if `demo` is ambiguous because the current folder contains a file or folder of that name.

    Args:
        setting: Name of the setting.
        value: Value of the setting.
        file: File that the folder `demo` must contain to be a valid value. If empty, any file or folder named `demo` is valid.
    """
    is_demo = value == "demo" or (isinstance(value, list) and "demo" in value)
    if not is_demo or not Path("demo", file).exists():
        return ()
    return (f"{setting} demo selects the bundled demo; use ./demo to select the one in the current folder",)
