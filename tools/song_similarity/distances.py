"""Distances between two pieces of audio that do not depend on the order of their frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torchaudio
from torch import Tensor

from musicgen_eval.models.musicgen import MusicGen

SAMPLE_RATE_HZ = 32_000
MEASURES = ("latents", "chroma", "mel")


@dataclass(frozen=True)
class Portrait:
    """The properties of a piece of audio that are compared.

    Attributes:
        latents: (T, D) codebook vectors of the frames.
        chroma: (12,) share of each pitch class, with norm 1; zeros for silence.
        mel: (2, 64) mean and standard deviation of each mel band over time, in dB.
    """

    latents: Tensor
    chroma: Tensor
    mel: Tensor


@torch.inference_mode()
def portraits(model: MusicGen, sounds: Sequence[Tensor]) -> list[Portrait]:
    """Computes the portraits of (1, N) sounds at 32 kHz, each of which is encoded alone."""
    hop = model.spec.hop_samples
    sounds = [sound[:, : sound.shape[1] // hop * hop] for sound in sounds]
    codes = model.encode(sounds)
    return [
        Portrait(_latents(model, row), _mean_chroma(sound[0]), _mel(sound[0]))
        for row, sound in zip(codes, sounds, strict=True)
    ]


def distances(one: Portrait, other: Portrait) -> dict[str, float]:
    """Computes distances between two pieces of audio, independent of the order of their frames.

    Returns:
        Name of a measure -> distance. `latents` is the root mean square distance of each frame to the nearest frame of the other
        piece, averaged over both directions. `chroma` is 1 - cosine similarity of the shares of pitch classes, and 1 for silence.
        `mel` is the root mean square difference of the means and deviations of the bands, in dB.
    """
    apart = torch.cdist(one.latents, other.latents)
    nearest = (apart.amin(1).square().mean().sqrt() + apart.amin(0).square().mean().sqrt()) / 2
    return {
        "latents": float(nearest),
        "chroma": float(1 - one.chroma @ other.chroma),
        "mel": float((one.mel - other.mel).square().mean().sqrt()),
    }


def rank_of_own(portrait: Portrait, songs: Sequence[Portrait], own: int) -> dict[str, int]:
    """Returns the rank of the own song by distance, per measure. Rank 1 is the closest, and ties get the largest rank."""
    found = [distances(portrait, song) for song in songs]
    return {name: sum(song[name] <= found[own][name] for song in found) for name in MEASURES}


def _latents(model: MusicGen, codes: Tensor) -> Tensor:
    codec: Any = model.audio_encoder
    layers = zip(codes, codec.quantizer.layers, strict=False)
    return torch.stack([layer.codebook.embed[row] for row, layer in layers]).sum(0)


def _power(audio: Tensor, fft: int, hop: int) -> Tensor:
    return torch.stft(audio, fft, hop, window=torch.hann_window(fft), return_complex=True).abs().square()


def _mel(audio: Tensor) -> Tensor:
    bank = torchaudio.functional.melscale_fbanks(1_025, 40.0, 16_000.0, 64, SAMPLE_RATE_HZ)
    level = 10 * (bank.t() @ _power(audio, 2_048, 512)).clamp(min=1e-4).log10()
    return torch.stack([level.mean(1), level.std(1)])


def _mean_chroma(audio: Tensor) -> Tensor:
    share = (_pitch_classes() @ _power(audio, 8_192, 1_600)).sqrt().sum(1)
    share = share - share.min()  # drums and noise raise all pitch classes equally
    return share / share.norm() if share.norm() > 1e-3 else torch.zeros(12)


@lru_cache(maxsize=1)
def _pitch_classes() -> Tensor:
    """Returns (12, F) with 1 for the bins from 55 to 1760 Hz that belong to a pitch class, otherwise 0."""
    bins_hz = torch.arange(4_097) * SAMPLE_RATE_HZ / 8_192
    pitch = (12 * (bins_hz.clamp(min=1) / 440).log2()).round().long() % 12
    inside = (bins_hz >= 55) & (bins_hz <= 1_760)
    return (torch.nn.functional.one_hot(pitch, 12).t() * inside).float()


def mean(values: Iterable[float]) -> float:
    """Returns the mean of some numbers."""
    return float(torch.tensor(list(values), dtype=torch.float64).mean())
