"""Estimates the tempo of a clip from its onsets, without weights of a model."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor

from musicgen_eval.metrics.clip_audio import check_audio, check_sample_rate, hann_window, spectra, to_mono

FRAME_RATE_HZ = 100
FRAME_S = 0.046
NUM_BANDS = 24
LOWEST_HZ, HIGHEST_HZ = 40.0, 16000.0
COMPRESSION = 10.0  # magnitudes far below 0.1 of a full-scale sine are not compressed
MIN_BPM, MAX_BPM = 40.0, 240.0
CENTRE_BPM = 120.0
MULTIPLES = (1, 2, 3, 4)
LAG_STEP = 0.25  # frames: 2.5 ms
MIN_DURATION_S = 3.0
MIN_CLARITY = 0.2
MIN_CLARITY_S = 1.0  # the clarity of noise is about half of this value, divided by the duration
DIFFERENT = 0.08  # relative difference from which two tempi are different


@dataclass(frozen=True)
class TempoEstimate:
    """The estimated tempi of a clip. Music has several metrical levels, so there are up to two tempi, often a factor of 2 apart.

    Attributes:
        tempi_bpm: The most salient tempo in beats per minute, and the second tempo if there is one.
        weight: Salience of the first tempo relative to the sum of both, in [0.5, 1].
        clarity: Strength of the pulse, at most 1. Each estimator defines its own scale.
        is_confident: Whether the estimate is reliable, by a rule that each estimator defines.
    """

    tempi_bpm: tuple[float, ...]
    weight: float
    clarity: float
    is_confident: bool


def estimate_tempo(audio: Tensor, *, sample_rate_hz: int) -> TempoEstimate | None:
    """Estimates the tempi of a clip from the autocorrelation of its onset strength.

    The autocorrelation is divided by the number of products of each lag and by its value at lag 0. The clarity of a lag is the
    mean autocorrelation at 1, 2, 3 and 4 times the lag, as far as these are not longer than half of the clip. The salience of a
    tempo between 40 and 240 bpm is its clarity times exp(-log2(tempo / 120)^2 / 2), because listeners prefer tempi near 120 bpm.
    The first tempo is the maximum of the salience. The second tempo is the largest local maximum that differs by more than 8%.

    The estimate is confident if the clarity of the first tempo is at least 0.2, and at least 1 s divided by the duration of the
    clip. The clarity of noise is inversely proportional to the duration and stays below this limit.

    Args:
        audio: (C, N) floating-point audio, mixed to mono.
        sample_rate_hz: Sample rate of the audio.

    Returns:
        The estimate. None if the audio is shorter than 3 s, or if the salience has no maximum above 0, as in silence.

    Raises:
        MetricError: If the audio is not (C, N) floating-point audio or contains NaN.

    Source: Ellis, Beat tracking by dynamic programming (2007), section 3.2; comb filters as in Scheirer (1998).
    """
    check_audio("estimate_tempo", audio=audio)
    check_sample_rate("estimate_tempo", sample_rate_hz)
    if audio.shape[1] < MIN_DURATION_S * sample_rate_hz:
        return None
    strength, frame_rate_hz = onset_strength(to_mono(audio), sample_rate_hz=sample_rate_hz)
    correlation = _autocorrelation(strength)
    if correlation is None:
        return None
    max_lag = len(correlation) - 2
    last = min(frame_rate_hz * 60 / MIN_BPM, max_lag)
    lags = torch.arange(frame_rate_hz * 60 / MAX_BPM, last, LAG_STEP, dtype=torch.float64, device=strength.device)
    clarity = _clarity(correlation, lags, max_lag)
    bpm = 60 * frame_rate_hz / lags
    salience = clarity.clamp(min=0) * torch.exp(-0.5 * (bpm / CENTRE_BPM).log2().square())
    min_clarity = max(MIN_CLARITY, MIN_CLARITY_S * sample_rate_hz / audio.shape[1])
    return _chosen(bpm, clarity, salience, min_clarity=min_clarity)


def onset_strength(audio: Tensor, *, sample_rate_hz: int) -> tuple[Tensor, float]:
    """Computes how much the energy of a clip rises, at 100 frames per second.

    Magnitude spectra of frames of 46 ms are reduced to the root of the energy in 24 bands of equal width in octaves between 40 Hz
    and 16 kHz, or half of the sample rate. A full-scale sine has a magnitude of 1. The strength is the mean over bands of the
    increases of ln(1 + 10 * magnitude) from one frame to the next, minus its mean over the surrounding second.

    Args:
        audio: (N,) float64 audio.
        sample_rate_hz: Sample rate of the audio.

    Returns:
        (T,) float64 strengths with mean 0, and the exact number of frames per second.
    """
    hop = max(1, round(sample_rate_hz / FRAME_RATE_HZ))
    size = 32 * max(1, round(FRAME_S * sample_rate_hz / 32))
    bands = _bands(size, sample_rate_hz).to(audio.device)
    increases: list[Tensor] = []
    previous: Tensor | None = None
    for block in spectra(audio, window=hann_window(size, audio), hop=hop):
        energy = (block.real.square() + block.imag.square()) @ bands
        logs = torch.log1p(COMPRESSION * energy.sqrt() / (size / 4))
        logs = logs if previous is None else torch.cat([previous, logs])
        previous = logs[-1:]
        increases.append(logs.diff(dim=0).clamp(min=0).mean(1))
    strength = torch.cat(increases)
    around = torch.hann_window(FRAME_RATE_HZ + 1, periodic=False, dtype=torch.float64, device=audio.device)
    extended = torch.nn.functional.pad(strength.view(1, 1, -1), (FRAME_RATE_HZ // 2, FRAME_RATE_HZ // 2), "replicate")
    strength = strength - extended.flatten().unfold(0, len(around), 1) @ (around / around.sum())
    return strength - strength.mean(), sample_rate_hz / hop


def _bands(size: int, sample_rate_hz: int) -> Tensor:
    """Returns (frequencies, bands) float64 weights, 1 if the frequency of a spectrum lies in a band. Empty bands are removed."""
    highest = min(HIGHEST_HZ, sample_rate_hz / 2)
    edges = torch.logspace(log2(LOWEST_HZ), log2(highest), NUM_BANDS + 1, base=2, dtype=torch.float64)
    frequencies = torch.arange(size // 2 + 1, dtype=torch.float64).unsqueeze(1) * sample_rate_hz / size
    weights = ((frequencies >= edges[:-1]) & (frequencies < edges[1:])).double()
    return weights[:, weights.any(0)]


def _autocorrelation(strength: Tensor) -> Tensor | None:
    """Returns the normalised autocorrelation up to half of the length, or None if the strength is constant."""
    num = len(strength)
    spectrum = torch.fft.rfft(strength, 1 << ceil(log2(2 * num)))
    lags = torch.arange(num // 2 + 2, device=strength.device)
    products = torch.fft.irfft(spectrum.real.square() + spectrum.imag.square())[: len(lags)] / (num - lags)
    return products / products[0] if products[0] > 1e-12 else None


def _clarity(correlation: Tensor, lags: Tensor, max_lag: int) -> Tensor:
    """Returns the mean autocorrelation at the multiples of each lag that are at most `max_lag`, interpolated linearly."""
    total, count = torch.zeros_like(lags), torch.zeros_like(lags)
    for multiple in MULTIPLES:
        within = (lags * multiple <= max_lag).double()
        places = (lags * multiple).clamp(max=max_lag)
        below = places.floor().long()
        share = places - below
        total += within * (correlation[below] * (1 - share) + correlation[below + 1] * share)
        count += within
    return total / count


def _chosen(bpm: Tensor, clarity: Tensor, salience: Tensor, *, min_clarity: float) -> TempoEstimate | None:
    """Returns the estimate for the two most salient tempi, or None if the salience has no local maximum above 0."""
    middle = salience[1:-1]
    places = 1 + ((middle > salience[:-2]) & (middle >= salience[2:])).nonzero().flatten()
    ordered = places[salience[places].argsort(descending=True, stable=True)].tolist()
    if not ordered:
        return None
    first = ordered[0]
    others = [place for place in ordered[1:] if abs(bpm[place] / bpm[first] - 1) > DIFFERENT]
    chosen = [first, *others[:1]]
    return TempoEstimate(
        tempi_bpm=tuple(bpm[chosen].tolist()),
        weight=(salience[first] / salience[chosen].sum()).item(),
        clarity=clarity[first].item(),
        is_confident=clarity[first].item() >= min_clarity,
    )
