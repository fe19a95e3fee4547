"""Creates and prints notes, which are one-line messages about conditions that affect the results but are not errors.

`TrackList.notes` contains the notes about the source. `Plan.notes` contains all notes of a run, which rank 0 prints when the run
starts.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from musicgen_eval.files.printable import printable
from musicgen_eval.files.redaction import redact


def print_notes(notes: Iterable[str]) -> None:
    """Prints each note on one line to stderr, with secrets redacted."""
    for note in notes:
        print(f"note: {printable(redact(note))}", file=sys.stderr)


def demo_notes(setting: str, value: object, file: str = "") -> tuple[str, ...]:
    """Returns a note if the value `demo` is ambiguous because the current folder contains a file or a folder named `demo`.

    Args:
        setting: Name of the setting.
        value: Value of the setting.
        file: Name of a file that the folder `demo` must contain for the value to be ambiguous. By default, any file or folder named
            `demo` makes the value ambiguous.
    """
    is_demo = value == "demo" or (isinstance(value, list) and "demo" in value)
    if not is_demo or not Path("demo", file).exists():
        return ()
    return (
        f"{setting} demo selects the bundled demo; use ./demo to select the file or folder of that name in the current folder",
    )
