"""Writes the held-out clips with various formats, sample rates and channels, and their manifest."""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from demo_model import music

HELD_OUT_FROM = 1_000_000


@dataclass(frozen=True)
class Clip:
    """A clip to write.

    Attributes:
        number: Number of the song, `HELD_OUT_FROM` or above, because these songs are not used for training.
        format: File suffix.
        duration_s: Length in seconds.
        sample_rate_hz: Sample rate of the file.
        channels: Number of channels, 1 or 2.
        compression: Compression level for ogg and mp3, from 0 (best quality) to 1 (smallest file).
    """

    number: int
    format: str
    duration_s: float
    sample_rate_hz: int
    channels: int
    compression: float | None = None


CLIPS = (
    Clip(1_000_001, "wav", 8.0, 32_000, 1),
    Clip(1_000_012, "flac", 8.0, 44_100, 1),
    Clip(1_000_003, "mp3", 12.0, 44_100, 2, 0.8),
    Clip(1_000_008, "mp3", 15.0, 44_100, 1, 0.8),
    Clip(1_000_004, "ogg", 20.0, 32_000, 1, 0.7),
    Clip(1_000_009, "mp3", 22.5, 44_100, 1, 0.85),
    Clip(1_000_010, "ogg", 25.0, 48_000, 2, 1.0),
    Clip(1_000_006, "ogg", 45.0, 48_000, 1, 1.0),
)


def write_clips(folder: Path) -> None:
    """Writes all clips and `manifest.csv` (path, id, text) to a temporary folder, which then replaces the folder."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    rows = []
    for clip in CLIPS:
        song = music.draw_song(clip.number, on_grid=True)
        name = f"{song.mood}_{song.number - HELD_OUT_FROM:02d}"
        num_samples = round(clip.duration_s * music.HOP_SAMPLES * 50)
        audio = resampled(music.render(song, num_samples=num_samples, stereo=clip.channels == 2), clip.sample_rate_hz)
        _write(beside / f"{name}.{clip.format}", audio, clip)
        rows.append((f"{name}.{clip.format}", name, song.text))
    with (beside / "manifest.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "id", "text"), *rows])
    for path in beside.iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _write(path: Path, audio: np.ndarray, clip: Clip) -> None:
    """Writes (C, N) audio in blocks of a second, since the ogg encoder of libsndfile overflows its stack on long blocks."""
    options = {} if clip.compression is None else {"compression_level": clip.compression}
    with soundfile.SoundFile(path, "w", clip.sample_rate_hz, clip.channels, **options) as file:
        for at in range(0, audio.shape[1], clip.sample_rate_hz):
            file.write(audio[:, at : at + clip.sample_rate_hz].T)


def resampled(audio: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Resamples (C, N) audio from 32 kHz to another sample rate."""
    if sample_rate_hz == 32_000:
        return audio
    return torchaudio.functional.resample(
        torch.from_numpy(audio), 32_000, sample_rate_hz, lowpass_filter_width=24, rolloff=0.945
    ).numpy()
