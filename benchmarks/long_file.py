"""Peak memory of evaluating a long file, beside that of a short one: it must not grow with a track's length.

    python benchmarks/long_file.py --minutes 1 120

Each length runs in a process of its own, with the demo model on a CPU; the file is synthesised block by block.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 44_100
MEASURE = """
import resource, sys
import musicgen_eval
result = musicgen_eval.perplexity(sys.argv[1], accelerator="cpu")
peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(result.evaluation.windows), peak_kb / 1024, result.ppl)
"""


def main() -> None:
    """Measures every length asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 120.0])
    parser.add_argument("--format", choices=["wav", "flac", "ogg", "mp3"], default="flac")
    arguments = parser.parse_args()
    print("minutes  windows  peak MB  over the shortest MB")
    shortest: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        for minutes in sorted(arguments.minutes):
            path = Path(folder) / f"{minutes:g}.{arguments.format}"
            write_song(path, minutes)
            command = [sys.executable, "-c", MEASURE, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            windows, peak_mb, _ = done.stdout.split()[-3:]
            shortest = float(peak_mb) if shortest is None else shortest
            print(f"{minutes:7g}  {windows:>7}  {float(peak_mb):7.0f}  {float(peak_mb) - shortest:20.0f}", flush=True)
            path.unlink()


def write_song(path: Path, minutes: float) -> None:
    """Stereo chords and noise, a second at a time."""
    generator = np.random.default_rng(0)
    seconds = np.arange(RATE_HZ) / RATE_HZ
    with soundfile.SoundFile(path, "w", RATE_HZ, 2) as file:
        for _ in range(round(minutes * 60)):
            chord = sum(np.sin(2 * np.pi * 110 * 2 ** (note / 12) * seconds) for note in generator.integers(0, 36, 3))
            left = 0.1 * chord + generator.normal(0, 0.02, RATE_HZ)
            file.write(np.stack([left, 0.8 * left], axis=1))


if __name__ == "__main__":
    main()
