"""Determines the paths of continuation files in a run folder."""

from __future__ import annotations

import re
from hashlib import sha256

from musicgen_eval.files.redaction import redact

NUM_DIGITS = 16
"""Number of digits of a track id's digest. For 100,000 tracks, the probability of equal digests is 3e-10 (8 digits: 0.69)."""
DEVICE_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
"""Names that Windows reserves for devices."""


def continuation_path(track: str, index: int, extension: str) -> str:
    """Returns the path of a continuation file, relative to the run folder."""
    return f"audio/{track_folder(track)}/continuation_{index}.{extension}"


def track_folder(track: str) -> str:
    """Returns the name of a track's folder. The name is readable, safe as a single path component, and different for each track id.

    >>> track_folder("my songs/a.mp3")
    'my_songs_a.mp3-c0d5c51c59cddcf7'
    """
    readable = re.sub(r"[^\w.-]+", "_", redact(track), flags=re.ASCII).strip("._-")[-80:]
    if not readable or readable.partition(".")[0].upper() in DEVICE_NAMES:
        readable = f"track_{readable}".rstrip("_")
    return f"{readable}-{sha256(track.encode('utf-8', 'surrogatepass')).hexdigest()[:NUM_DIGITS]}"
