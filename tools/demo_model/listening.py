"""Measures of the difference between a reconstruction and its original: mel distance in dB and chroma cosine."""

from __future__ import annotations

from functools import lru_cache

import torch
import torchaudio

SAMPLE_RATE_HZ = 32_000
RANGE_DB = 60.0


def mel_distance_db(audio: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the mean absolute difference of log-mel spectra, down to 60 dB below the loudest band of the original.

    Args:
        audio: (N,) original at 32 kHz.
        other: (N,) reconstruction.

    Returns:
        Difference in dB, over 64 bands from 40 Hz to 16 kHz, and frames of 64 ms at intervals of 16 ms.
    """
    mine, theirs = (_mel_db(signal) for signal in (audio, other))
    lowest = mine.max() - RANGE_DB
    return float((mine.clamp(min=lowest) - theirs.clamp(min=lowest)).abs().mean())


def chroma_cosine(audio: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the mean cosine similarity of the energies of pitch classes, over the frames within 40 dB of the loudest.

    Args:
        audio: (N,) original at 32 kHz.
        other: (N,) reconstruction.

    Returns:
        Similarity, which is 1 for the same harmony.
    """
    mine, theirs = (_chroma(signal) for signal in (audio, other))
    loud = mine.sum(0) > mine.sum(0).max() * 1e-4
    return float(torch.cosine_similarity(mine[:, loud], theirs[:, loud], dim=0).mean())


def _mel_db(audio: torch.Tensor) -> torch.Tensor:
    power = _power(audio, 2_048, 512)
    bank = torchaudio.functional.melscale_fbanks(1_025, 40.0, 16_000.0, 64, SAMPLE_RATE_HZ)
    return 10 * (bank.t() @ power).clamp(min=1e-10).log10()


def _power(audio: torch.Tensor, fft: int, hop: int) -> torch.Tensor:
    return torch.stft(audio, fft, hop, window=torch.hann_window(fft), return_complex=True).abs().square()


@lru_cache(maxsize=1)
def _pitch_classes() -> torch.Tensor:
    """Returns (12, F) with 1 for the bins from 55 to 1760 Hz that belong to a pitch class, otherwise 0."""
    bins_hz = torch.arange(4_097) * SAMPLE_RATE_HZ / 8_192
    pitch = (12 * (bins_hz.clamp(min=1) / 440).log2()).round().long() % 12
    inside = (bins_hz >= 55) & (bins_hz <= 1_760)
    return (torch.nn.functional.one_hot(pitch, 12).t() * inside).float()


def _chroma(audio: torch.Tensor) -> torch.Tensor:
    return _pitch_classes() @ _power(audio, 8_192, 1_600)
