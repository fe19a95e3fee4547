"""A metric for the agreement of the key of a continuation with the key of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, pi

import torch
from torch import Tensor

from musicgen_eval.metrics.clip_audio import check_audio, check_sample_rate, hann_window, spectra, to_mono
from musicgen_eval.metrics.clip_means import ClipMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe

TONICS = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
# Mean ratings of the 12 pitch classes after a context in C major and in C minor.
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)

FRAME_S = 0.256
LOWEST_HZ, HIGHEST_HZ = 55.0, 2000.0
MIN_PEAK_IN_FRAME = 1e-3  # relative to the largest magnitude of the frame: -60 dB
MIN_PEAK_IN_CLIP = 1e-4  # relative to the largest peak of the clip: -80 dB
MIN_DURATION_S = 1.0
MIN_CORRELATION = 0.7
MIN_LEAD = 0.03


@dataclass(frozen=True)
class KeyEstimate:
    """The estimated key of a clip.

    Attributes:
        tonic: Semitones of the tonic above C, 0 to 11.
        is_minor: True for a minor key, False for a major key.
        correlation: Correlation of the clip's chroma with the profile of the key, in [-1, 1].
        lead: Difference between `correlation` and the correlation of the second best key.
        tuning: Deviation of the tuning from A4 = 440 Hz in semitones, in [-0.5, 0.5].
    """

    tonic: int
    is_minor: bool
    correlation: float
    lead: float
    tuning: float

    @property
    def is_confident(self) -> bool:
        """True if the correlation is at least 0.7 and the lead is at least 0.03."""
        return self.correlation >= MIN_CORRELATION and self.lead >= MIN_LEAD

    @property
    def name(self) -> str:
        """The name of the key, such as `Eb minor`."""
        return f"{TONICS[self.tonic]} {'minor' if self.is_minor else 'major'}"


class KeyAgreement(ClipMeans):
    """Agreement of the keys of continuations with the keys of their prompts.

    `same_key` is the share of pairs with the same tonic and mode. `weighted_score` is the mean of a score for related keys. The
    score is 1 if the continuation has the key of the prompt, 0.5 if it has the same mode and its tonic is a fifth above, 0.3 for
    the relative and 0.2 for the parallel major or minor key, and otherwise 0. Only pairs in which both keys are confident are
    counted. `coverage` is their share of all pairs. `estimate_key` and `KeyEstimate.is_confident` define the estimate and the
    rule.

    Of the estimates for 5 s of synthetic songs like the demo's clips, 86% were confident. Of these, 83% were right, and most of the
    others were related keys. Music can also change its key. Therefore compare the result with that of the references (`inputs:
    {generated: reference}`). Noise has no confident key. Related keys share most of their notes, so a high `weighted_score` is
    weak evidence for the same key.

    >>> import torch
    >>> times = torch.arange(64000, dtype=torch.float64) / 32000
    >>> def chord(*notes):
    ...     return sum(torch.sin(2 * torch.pi * 440 * 2 ** (note / 12) * times) for note in notes).unsqueeze(0)
    >>> c_major, db_major = chord(3, 7, 10), chord(4, 8, 11)
    >>> metric = KeyAgreement()
    >>> metric.update(c_major, c_major, 32000)
    >>> metric.update(db_major, c_major, 32000)
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'same_key': 0.5, 'weighted_score': 0.5, 'coverage': 1.0}

    Source: Krumhansl, Cognitive foundations of musical pitch (1990), chapter 4, with the profiles of Krumhansl and Kessler (1982);
    mir_eval 0.8.2, `key.weighted_score`, with the prompt as the reference.
    """

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__(("same_key", "weighted_score", "coverage"))

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        return MetricRecipe(
            units={"same_key": "share of pairs", "weighted_score": "score", "coverage": "share of pairs"},
            higher_is_better=True,
            source="Krumhansl-Schmuckler key finding with Krumhansl-Kessler profiles; scores of mir_eval 0.8.2",
            settings={
                "frame_s": FRAME_S,
                "lowest_hz": LOWEST_HZ,
                "highest_hz": HIGHEST_HZ,
                "min_duration_s": MIN_DURATION_S,
                "min_correlation": MIN_CORRELATION,
                "min_lead": MIN_LEAD,
            },
        )

    def update(self, generated: Tensor, context_decoded: Tensor, sample_rate_hz: int) -> None:
        """Adds one continuation and its prompt, each given as (C, N) audio of any length."""
        own, prompt = (estimate_key(audio, sample_rate_hz=sample_rate_hz) for audio in (generated, context_decoded))
        if own is None or prompt is None or not (own.is_confident and prompt.is_confident):
            self.add({"same_key": nan, "weighted_score": nan, "coverage": 0.0})
            return
        score = weighted_key_score(prompt, own)
        self.add({"same_key": float(score == 1), "weighted_score": score, "coverage": 1.0})


def estimate_key(audio: Tensor, *, sample_rate_hz: int) -> KeyEstimate | None:
    """Estimates the key of a clip from the correlations of its chroma with the profiles of the 24 keys.

    Frames of 256 ms start every 128 ms. The local maxima of a frame's magnitude spectrum between 55 and 2000 Hz are its peaks.
    Their frequencies are refined by a parabola through the logarithms of three magnitudes. A peak's weight is the square root of
    its magnitude, divided by the sum over the peaks of the frame, so all frames that contain peaks have the same weight. Peaks 60
    dB below the maximum of the frame or 80 dB below the largest peak of the clip are not used. The tuning is the weighted circular
    mean of the peaks' distances from the nearest semitones. The chroma is the sum of weights per pitch class relative to this
    tuning.

    Args:
        audio: (C, N) floating-point audio, mixed to mono.
        sample_rate_hz: Sample rate of the audio.

    Returns:
        The key with the largest Pearson correlation. None if the audio is shorter than 1 s or has no peaks, such as silence.

    Raises:
        MetricError: If the audio is not (C, N) floating-point audio or contains NaN.
    """
    check_audio("estimate_key", audio=audio)
    check_sample_rate("estimate_key", sample_rate_hz)
    if audio.shape[1] < MIN_DURATION_S * sample_rate_hz:
        return None
    chroma, tuning = _peak_chroma(to_mono(audio), sample_rate_hz)
    if chroma.amax() <= 0:
        return None
    correlations = _normalised(key_profiles().to(chroma.device)) @ _normalised(chroma)
    best, second = correlations.topk(2).values.tolist()
    key = int(correlations.argmax())
    return KeyEstimate(key % 12, key >= 12, correlation=best, lead=best - second, tuning=tuning)


def key_profiles() -> Tensor:
    """Returns the (24, 12) float64 profiles of the 12 major keys and then the 12 minor keys, each from C to B."""
    return torch.stack(
        [torch.tensor(profile, dtype=torch.float64).roll(tonic) for profile in (MAJOR, MINOR) for tonic in range(12)]
    )


def weighted_key_score(reference: KeyEstimate, estimated: KeyEstimate) -> float:
    """Returns the score of an estimated key, in [0, 1], as `mir_eval.key.weighted_score` defines it.

    The score is not symmetric: a tonic a fifth above that of the reference scores 0.5, and a tonic a fifth below scores 0.
    """
    distance = (estimated.tonic - reference.tonic) % 12
    if reference.is_minor == estimated.is_minor:
        return {0: 1.0, 7: 0.5}.get(distance, 0.0)
    to_relative = 3 if reference.is_minor else 9
    return {to_relative: 0.3, 0: 0.2}.get(distance, 0.0)


def _peak_chroma(audio: Tensor, sample_rate_hz: int) -> tuple[Tensor, float]:
    """Returns the (12,) float64 chroma of the spectral peaks of (N,) audio, and the tuning in semitones."""
    frame, semitones, magnitudes = _peaks(audio, sample_rate_hz)
    if len(frame) == 0:
        return torch.zeros(12, dtype=torch.float64, device=audio.device), 0.0
    loud = magnitudes >= MIN_PEAK_IN_CLIP * magnitudes.amax()
    frame, semitones, weights = frame[loud], semitones[loud], magnitudes[loud].sqrt()
    weights = weights / torch.bincount(frame, weights)[frame]
    # Sums over the peaks of each frame, and then over the frames, do not depend on the number of threads.
    real, imag = (
        torch.bincount(frame, weights * part(2 * pi * semitones)).sum().item() for part in (torch.cos, torch.sin)
    )
    tuning = torch.atan2(torch.tensor(imag), torch.tensor(real)).item() / (2 * pi)
    classes = (semitones - tuning).round().long() % 12
    return torch.bincount(classes, weights, minlength=12), tuning


def _peaks(audio: Tensor, sample_rate_hz: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns frame, pitch and magnitude of the spectral peaks of (N,) audio. Pitches are MIDI notes, in fractional semitones."""
    size = 64 * max(1, round(FRAME_S * sample_rate_hz / 64))
    first = max(1, round(LOWEST_HZ * size / sample_rate_hz))
    last = min(size // 2, round(HIGHEST_HZ * size / sample_rate_hz))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    num_frames = 0
    for block in spectra(audio, window=hann_window(size, audio), hop=size // 2):
        magnitudes = block.abs()
        left, centre, right = (magnitudes[:, first + shift : last + shift] for shift in (-1, 0, 1))
        threshold = MIN_PEAK_IN_FRAME * magnitudes.amax(1, keepdim=True)
        rows, columns = ((centre > left) & (centre >= right) & (centre > threshold)).nonzero(as_tuple=True)
        a, b, c = (part[rows, columns].clamp(min=1e-12).log() for part in (left, centre, right))
        bins = first + columns + 0.5 * (a - c) / (a - 2 * b + c).clamp(max=-1e-12)
        found.append((rows + num_frames, 69 + 12 * (bins * sample_rate_hz / size / 440).log2(), centre[rows, columns]))
        num_frames += len(block)
    frame, semitones, magnitude = (torch.cat(column) for column in zip(*found, strict=True))
    return frame, semitones, magnitude


def _normalised(values: Tensor) -> Tensor:
    """Returns (..., 12) values with mean 0 and norm 1, so that products are Pearson correlations. Constant values become 0."""
    centred = values - values.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-12)
