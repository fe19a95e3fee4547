"""Songs of noise, and manifests that list them."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE_HZ = 32_000


def write_noise(
    path: Path, num_samples: int, *, seed: int = 0, num_channels: int = 1, nan_at: int | None = None
) -> np.ndarray:
    """Writes noise to a wav file of float samples at 32 kHz.

    Args:
        path: Path of the file.
        num_samples: Length of the noise.
        seed: Seed of the noise.
        num_channels: Number of channels.
        nan_at: Index of a sample that is replaced by NaN, if given.

    Returns:
        The samples, (N,), or (N, C) for more than one channel.
    """
    shape = (num_samples,) if num_channels == 1 else (num_samples, num_channels)
    noise = np.random.default_rng(seed).normal(0, 0.2, shape).astype(np.float32)
    if nan_at is not None:
        noise[nan_at] = np.nan
    soundfile.write(path, noise, SAMPLE_RATE_HZ, subtype="FLOAT")
    return noise


def write_songs(
    folder: Path,
    num_samples: Mapping[str, int],
    *,
    texts: Mapping[str, str | None] | None = None,
    num_channels: int = 1,
    further_rows: Sequence[tuple[str, str, str]] = (),
) -> Path:
    """Writes songs of noise and their manifest, `songs.csv`.

    Args:
        folder: Existing folder of the files.
        num_samples: Length per name. The song `a` is in `a.wav`, and its id is `song a`.
        texts: Text per name. Other songs have no text.
        num_channels: Number of channels of every song.
        further_rows: File name, id and text of tracks that the caller writes.

    Returns:
        Path of the manifest.
    """
    for seed, (name, length) in enumerate(num_samples.items()):
        write_noise(folder / f"{name}.wav", length, seed=seed, num_channels=num_channels)
    rows = [(f"{name}.wav", f"song {name}", (texts or {}).get(name)) for name in num_samples]
    return write_manifest(folder / "songs.csv", [*rows, *further_rows])


def write_manifest(path: Path, rows: Sequence[tuple[str, str, str | None]]) -> Path:
    """Writes a manifest of (file name, id, text) rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "id", "text"])
        table.writerows([name, track, text or ""] for name, track, text in rows)
    return path
