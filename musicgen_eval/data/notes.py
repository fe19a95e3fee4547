"""Notes: one-line messages about what changes a number without being an error, printed when a run starts.

Whoever finds something to say adds a line to `TrackList.notes` (about the source) or `Plan.notes`; rank 0 prints them.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from musicgen_eval.files.printable import printable
from musicgen_eval.files.redaction import redact


def print_notes(notes: Iterable[str]) -> None:
    """Prints each note on stderr, in one line and without secrets."""
    for note in notes:
        print(f"note: {printable(redact(note))}", file=sys.stderr)


def demo_notes(setting: str, value: object, file: str = "") -> tuple[str, ...]:
    """What `demo` means, where a file or folder of that name lies in the current folder.

    Args:
        setting: that was given.
        value: what it was set to.
        file: that the folder must hold, to be what the setting could mean.
    """
    is_demo = value == "demo" or (isinstance(value, list) and "demo" in value)
    if not is_demo or not Path("demo", file).exists():
        return ()
    return (f"{setting} demo is the one that comes with the package; ./demo selects the one in the current folder",)
