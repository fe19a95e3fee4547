"""A metric for the distance between the mel spectra of a continuation and its reference."""

from __future__ import annotations

from math import fsum, nan

from torch import Tensor
from torch.nn.functional import pad
from torchaudio.functional import melscale_fbanks

from musicgen_eval.metrics.clip_audio import (
    check_audio,
    check_sample_rate,
    cut_to_shorter,
    hann_window,
    reflect,
    spectra,
)
from musicgen_eval.metrics.clip_means import ClipMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe

N_FFT = 1024  # samples: 32 ms at 32 kHz
HOP = 256
NUM_MELS = 64
LOWEST_HZ = 64.0
FLOOR = 1e-5  # is added to each mel power: -50 dB relative to 1
PADDING = (N_FFT - HOP) // 2


class MelDistance(ClipMeans):
    """Mean absolute difference between the log mel spectra of continuations and references, as mean over clips.

    `distance` is the mean of |log10(X + 1e-5) - log10(Y + 1e-5)| over channels, 64 mel bands and frames. X and Y are the mel powers
    of the continuation and the reference. A distance of 0.1 means that powers differ by 1 dB (a factor of 1.26) on average. Equal
    recordings have a distance of 0, and there is no upper bound.

    The metric compares recordings at the same times, so it measures the loss of a codec well (`reference` and `reference_decoded`).
    A different but equally good continuation has a large distance. Compare it with the distance between unrelated clips.

    The term 1e-5 makes the result finite for silence: two silent clips have a distance of 0. `coverage` is the share of clips that
    define the distance. Clips shorter than 385 samples (12 ms at 32 kHz) do not.

    >>> import torch
    >>> audio = torch.sin(torch.arange(32000, dtype=torch.float64) / 10).unsqueeze(0)
    >>> metric = MelDistance()
    >>> metric.update(audio, audio, 32000)
    >>> metric.compute()["distance"].item()
    0.0

    Source: audiocraft 1.3.0, `MelSpectrogramL1Loss` with the settings `mel` of `config/solver/compression/default.yaml`.
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__(("distance", "coverage"))

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        return MetricRecipe(
            units={"distance": "log10 of power", "coverage": "share of clips"},
            higher_is_better=False,
            source="audiocraft 1.3.0, MelSpectrogramL1Loss with the settings of its compression solver",
            settings={
                "n_fft": N_FFT,
                "hop": HOP,
                "window": "periodic Hann of n_fft samples",
                "num_mels": NUM_MELS,
                "mel_scale": "htk, triangles of height 1",
                "lowest_hz": LOWEST_HZ,
                "highest_hz": "half of the sample rate",
                "floor": FLOOR,
            },
        )

    def update(self, generated: Tensor, reference: Tensor, sample_rate_hz: int) -> None:
        """Adds one continuation and its reference, given as (C, N) audio. The longer clip is cut to the length of the shorter."""
        distance = mel_distance(generated, reference, sample_rate_hz=sample_rate_hz)
        self.add({"distance": distance, "coverage": float(distance == distance)})


def mel_distance(generated: Tensor, reference: Tensor, *, sample_rate_hz: int) -> float:
    """Computes the mean absolute difference between the log mel spectra of two recordings.

    The audio is extended at both ends by its mirror image of 384 samples, and at the end by zeros up to a whole number of hops.
    Frame i then starts at sample i * 256 - 384, and there are ceil(N / 256) frames. The mel bands are triangles of height 1 on the
    HTK scale, between 64 Hz and half of the sample rate.

    Args:
        generated: (C, N) floating-point audio.
        reference: (C, N) floating-point audio with as many channels. The longer of the two is cut to the length of the shorter.
        sample_rate_hz: Sample rate of both. It only determines the mel bands.

    Returns:
        The mean difference of log10 mel powers, at least 0. It is NaN if the clips are not longer than 384 samples.

    Raises:
        MetricError: If a clip is not (C, N) floating-point audio or contains NaN, or if the numbers of channels differ.
    """
    check_audio("mel_distance", generated=generated, reference=reference)
    check_sample_rate("mel_distance", sample_rate_hz)
    first, second = cut_to_shorter(generated, reference)
    if first.shape[1] <= PADDING:
        return nan
    sums: list[float] = []
    for channel in range(first.shape[0]):
        pair = [_log_mels(audio[channel], sample_rate_hz) for audio in (first, second)]
        for x, y in zip(*pair, strict=True):
            sums += (x - y).abs().mean(-1).tolist()
    return fsum(sums) / len(sums)


def _log_mels(audio: Tensor, sample_rate_hz: int) -> list[Tensor]:
    """Returns the (T, 64) log10 mel powers of (N,) float64 audio, in blocks of frames."""
    bands = melscale_fbanks(
        N_FFT // 2 + 1, LOWEST_HZ, float(sample_rate_hz // 2), NUM_MELS, sample_rate_hz, norm=None, mel_scale="htk"
    ).to(audio)
    padded = pad(reflect(audio, PADDING, PADDING), (0, -audio.shape[0] % HOP))
    blocks = spectra(padded, window=hann_window(N_FFT, audio), hop=HOP)
    return [(FLOOR + (block.real.square() + block.imag.square()) @ bands).log10() for block in blocks]
