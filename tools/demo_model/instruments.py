"""Notes of pitched instruments and strokes of drums, as arrays that always start at the same phase."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SAMPLE_RATE_HZ = 32_000
RELEASE_SAMPLES = 1_600


@dataclass(frozen=True)
class Timbre:
    """A pitched sound.

    Attributes:
        harmonics: Amplitudes of the harmonics, starting with the fundamental.
        attack_s: Time to the full level in seconds.
        decay_s: Time in which the level decreases to 1/e, in seconds. Infinity means a constant level.
        vibrato: Depth of the vibrato relative to the pitch.
    """

    harmonics: tuple[float, ...]
    attack_s: float
    decay_s: float
    vibrato: float = 0.0


TIMBRES = {
    "piano": Timbre((1.0, 0.5, 0.3, 0.15, 0.08, 0.04), 0.004, 0.5),
    "organ": Timbre((1.0, 0.7, 0.0, 0.5, 0.0, 0.0, 0.0, 0.25), 0.01, float("inf")),
    "strings": Timbre((1.0, 0.6, 0.45, 0.3, 0.2, 0.15, 0.1), 0.06, float("inf")),
    "guitar": Timbre((1.0, 0.8, 0.55, 0.45, 0.3, 0.2, 0.15, 0.1), 0.003, 0.25),
    "flute": Timbre((1.0, 0.25, 0.08), 0.03, float("inf")),
    "bell": Timbre((1.0, 0.0, 0.6, 0.0, 0.0, 0.3), 0.002, 0.3),
    "synth": Timbre((1.0, 0.5, 0.33, 0.25, 0.2, 0.17, 0.14), 0.005, 0.8),
    "violin": Timbre((1.0, 0.7, 0.6, 0.4, 0.3, 0.25), 0.04, float("inf"), 0.004),
    "deep": Timbre((1.0, 0.15), 0.01, float("inf")),
    "plucked": Timbre((1.0, 0.6, 0.3, 0.15), 0.004, 0.25),
    "buzzing": Timbre((1.0, 0.5, 0.33, 0.25, 0.2, 0.17, 0.14, 0.12, 0.11, 0.1), 0.005, float("inf")),
}


@lru_cache(maxsize=4096)
def note(name: str, pitch: int, num_samples: int) -> np.ndarray:
    """Returns a note.

    Args:
        name: Key of `TIMBRES`.
        pitch: MIDI number; 69 is 440 Hz.
        num_samples: Length of the note without its release of 50 ms.

    Returns:
        (N + RELEASE_SAMPLES,) float32. The array is cached and must not be changed.
    """
    timbre = TIMBRES[name]
    time_s = np.arange(num_samples + RELEASE_SAMPLES) / SAMPLE_RATE_HZ
    pitch_hz = 440.0 * 2.0 ** ((pitch - 69) / 12)
    phase = (
        2 * np.pi * pitch_hz * (time_s - timbre.vibrato / (2 * np.pi * 5.0) * (np.cos(2 * np.pi * 5.0 * time_s) - 1))
    )
    wave = sum(
        level * np.sin(number * phase)
        for number, level in enumerate(timbre.harmonics, start=1)
        if level and number * pitch_hz < 0.45 * SAMPLE_RATE_HZ
    )
    envelope = np.minimum(time_s / timbre.attack_s, 1.0) * np.exp(-time_s / timbre.decay_s)
    envelope[num_samples:] *= np.linspace(1, 0, RELEASE_SAMPLES)
    return (wave * envelope / np.linalg.norm(timbre.harmonics)).astype(np.float32)


@lru_cache(maxsize=8)
def drum(name: str) -> np.ndarray:
    """Returns a stroke of `kick`, `snare` or `hat`. Its noise is the same in each call.

    Returns:
        (N,) float32. The array is cached and must not be changed.
    """
    rng = np.random.default_rng([len(name), 3])
    if name == "kick":
        time_s = np.arange(8_000) / SAMPLE_RATE_HZ
        pitch_hz = 50 + 100 * np.exp(-time_s * 40)
        wave = np.sin(2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE_HZ) * np.exp(-time_s * 12)
    elif name == "snare":
        time_s = np.arange(5_000) / SAMPLE_RATE_HZ
        wave = (0.7 * rng.standard_normal(5_000) + np.sin(2 * np.pi * 190 * time_s)) * np.exp(-time_s * 25)
    else:
        time_s = np.arange(2_000) / SAMPLE_RATE_HZ
        noise = rng.standard_normal(2_001)
        wave = np.diff(noise) * np.exp(-time_s * 70)
    return (wave * np.linspace(1, 0, len(wave)) ** 0.5).astype(np.float32)
