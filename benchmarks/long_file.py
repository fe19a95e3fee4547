"""Measures peak memory and time of evaluating long and short files.

    python benchmarks/long_file.py --minutes 1 120
    python benchmarks/long_file.py --minutes 10 20 40 80 120 --format m4a

Memory must not grow with the length of a track, and time must grow at most in proportion, also for m4a, which cannot be read from
the middle. `read s` is the time to read the audio of all windows without a model. `total s` is the time of the whole evaluation.
Each length runs in its own process, with the demo model on a CPU. The file is synthesised block by block.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 44_100
MEASURE = """
import resource, sys, time
import musicgen_eval
from musicgen_eval.audio.reader import open_track

start = time.perf_counter()
track = open_track(sys.argv[1])
probe_s = time.perf_counter() - start
num_samples = track.num_samples_at(32_000)
for first in range(0, num_samples, 15 * 32_000):
    track.read(first, min(30 * 32_000, num_samples - first), sample_rate_hz=32_000, channels=1)
read_s = time.perf_counter() - start - probe_s
start = time.perf_counter()
result = musicgen_eval.perplexity(sys.argv[1], accelerator="cpu")
peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(result.evaluation.windows), peak_kb / 1024, probe_s, read_s, time.perf_counter() - start)
"""


def main() -> None:
    """Measures the requested lengths and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 120.0])
    parser.add_argument("--format", choices=["wav", "flac", "ogg", "mp3", "m4a"], default="flac")
    arguments = parser.parse_args()
    print("minutes  windows  peak MB  above shortest MB  probe s  read s  total s")
    shortest: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        for minutes in sorted(arguments.minutes):
            path = Path(folder) / f"{minutes:g}.{arguments.format}"
            write_song(path, minutes)
            command = [sys.executable, "-c", MEASURE, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            windows, *numbers = done.stdout.split()[-5:]
            peak_mb, probe_s, read_s, total_s = map(float, numbers)
            shortest = peak_mb if shortest is None else shortest
            print(
                f"{minutes:7g}  {windows:>7}  {peak_mb:7.0f}  {peak_mb - shortest:17.0f}  "
                f"{probe_s:7.2f}  {read_s:6.2f}  {total_s:7.1f}",
                flush=True,
            )
            path.unlink()


def write_song(path: Path, minutes: float) -> None:
    """Writes a stereo file with chords and noise, second by second; m4a files are mono."""
    if path.suffix == ".m4a":
        write_m4a(path, minutes)
        return
    with soundfile.SoundFile(path, "w", RATE_HZ, 2) as file:
        for second in song(minutes):
            file.write(second)


def write_m4a(path: Path, minutes: float) -> None:
    """Writes the left channel of the song, encoded as AAC."""
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=RATE_HZ, layout="mono")
        for number, second in enumerate(song(minutes)):
            left = np.ascontiguousarray(second[:, 0], np.float32)[None]
            frame = av.AudioFrame.from_ndarray(left, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE_HZ, number * RATE_HZ
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def song(minutes: float) -> Iterator[np.ndarray]:
    """Yields the song in seconds of (N, 2) float64."""
    generator = np.random.default_rng(0)
    seconds = np.arange(RATE_HZ) / RATE_HZ
    for _ in range(round(minutes * 60)):
        chord = sum(np.sin(2 * np.pi * 110 * 2 ** (note / 12) * seconds) for note in generator.integers(0, 36, 3))
        left = 0.1 * chord + generator.normal(0, 0.02, RATE_HZ)
        yield np.stack([left, 0.8 * left], axis=1)


if __name__ == "__main__":
    main()
