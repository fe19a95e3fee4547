"""Notes: one-line messages about what changes a number without being an error, printed when a run starts.

Whoever finds something to say adds a line to `TrackList.notes` (about the source) or `Plan.notes`; rank 0 prints them.
"""

import sys
from collections.abc import Iterable

from musicgen_eval.audio.one_line import printable
from musicgen_eval.redaction import redact


def print_notes(notes: Iterable[str]) -> None:
    """Prints each note on stderr, in one line and without secrets."""
    for note in notes:
        print(f"note: {printable(redact(note))}", file=sys.stderr)
