"""How far a reconstruction is from its original: mel distance in dB and chroma cosine."""

from __future__ import annotations

from functools import lru_cache

import torch
import torchaudio

SAMPLE_RATE_HZ = 32_000
FLOOR_DB = 60.0


def mel_distance_db(audio: torch.Tensor, other: torch.Tensor) -> float:
    """Mean absolute difference of log-mel spectra, down to 60 dB below the loudest band of the first.

    Args:
        audio: (N,) the original at 32 kHz.
        other: (N,) what it is compared with.

    Returns:
        dB, over 64 bands from 40 Hz to 16 kHz and frames of 64 ms every 16 ms.
    """
    mine, theirs = (_mel_db(signal) for signal in (audio, other))
    floor = mine.max() - FLOOR_DB
    return float((mine.clamp(min=floor) - theirs.clamp(min=floor)).abs().mean())


def chroma_cosine(audio: torch.Tensor, other: torch.Tensor) -> float:
    """Mean cosine of the pitch classes' energies, over the frames within 40 dB of the loudest; 1: the same harmony.

    Args:
        audio: (N,) the original at 32 kHz.
        other: (N,) what it is compared with.
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
    """(12, F) which of the bins from 55 to 1760 Hz belong to which pitch class."""
    bins_hz = torch.arange(4_097) * SAMPLE_RATE_HZ / 8_192
    pitch = (12 * (bins_hz.clamp(min=1) / 440).log2()).round().long() % 12
    inside = (bins_hz >= 55) & (bins_hz <= 1_760)
    return (torch.nn.functional.one_hot(pitch, 12).t() * inside).float()


def _chroma(audio: torch.Tensor) -> torch.Tensor:
    return _pitch_classes() @ _power(audio, 8_192, 1_600)
