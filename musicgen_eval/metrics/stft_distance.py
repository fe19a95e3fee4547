"""A metric for the distance between the spectra of a continuation and its reference, at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum, nan, sqrt

from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.clip_audio import check_audio, cut_to_shorter, hann_window, reflect, spectra
from musicgen_eval.metrics.clip_means import ClipMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe

MIN_POWER = 1e-8  # smaller powers are raised to this value: -80 dB relative to a spectral magnitude of 1


@dataclass(frozen=True)
class StftResolution:
    """The settings of one short-time Fourier transform.

    Attributes:
        n_fft: Length of a frame in samples.
        hop: Distance between the centres of neighbouring frames in samples.
        window: Length of the periodic Hann window in samples, at most `n_fft`. It is centred in the frame.
    """

    n_fft: int
    hop: int
    window: int

    def __post_init__(self) -> None:
        if not 0 < self.window <= self.n_fft or self.hop <= 0:
            raise MetricError(
                f"StftResolution: window and hop must be above 0 and window at most n_fft, got {self}; change these settings"
            )


RESOLUTIONS = (StftResolution(1024, 120, 600), StftResolution(2048, 240, 1200), StftResolution(512, 50, 240))


class MultiResolutionSTFTDistance(ClipMeans):
    """Multi-resolution STFT distance between continuations and references, as mean over clips.

    With the magnitudes X of the continuation and Y of the reference, `spectral_convergence` is ||Y - X|| / ||Y|| with Frobenius
    norms over channels, frequencies and frames, and `log_magnitude` is the mean of |ln Y - ln X| in nats. Both are means over three
    resolutions. `distance` is their sum, the usual training loss. All are 0 for equal recordings and have no upper bound.

    The distance compares recordings at the same times. It suits `reference_decoded` or another nearly equal signal. A different
    but equally good continuation has a large distance, usually above 1, so compare it with the distance between unrelated clips.

    Magnitudes below 1e-4 are raised to 1e-4, so `log_magnitude` is finite for silence. `spectral_convergence` and `distance` are
    undefined if the reference is digitally silent. `coverage` is the share of clips that define them. Clips shorter than 1025
    samples (32 ms at 32 kHz) define no value but `coverage`.

    >>> import torch
    >>> audio = torch.sin(torch.arange(32000, dtype=torch.float64) / 10).unsqueeze(0)
    >>> metric = MultiResolutionSTFTDistance()
    >>> metric.update(0.5 * audio, audio)
    >>> round(metric.compute()["spectral_convergence"].item(), 4)
    0.5

    Source: Parallel WaveGAN (arXiv 1910.11480), section 2.2; the defaults of auraloss 0.4.0, `MultiResolutionSTFTLoss`.
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__(("distance", "spectral_convergence", "log_magnitude", "coverage"))

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        return MetricRecipe(
            units={
                "distance": "ratio + nats",
                "spectral_convergence": "ratio",
                "log_magnitude": "nats",
                "coverage": "share of clips",
            },
            higher_is_better=False,
            source="Parallel WaveGAN (arXiv 1910.11480), with the defaults of auraloss 0.4.0",
            settings={"resolutions": [asdict(item) for item in RESOLUTIONS], "min_power": MIN_POWER},
        )

    def update(self, generated: Tensor, reference: Tensor) -> None:
        """Adds one continuation and its reference, given as (C, N) audio. The longer clip is cut to the length of the shorter."""
        convergence, magnitude = stft_distance(generated, reference)
        self.add(
            {
                "distance": convergence + magnitude,
                "spectral_convergence": convergence,
                "log_magnitude": magnitude,
                "coverage": float(convergence == convergence),
            }
        )


def stft_distance(
    generated: Tensor, reference: Tensor, *, resolutions: Sequence[StftResolution] = RESOLUTIONS
) -> tuple[float, float]:
    """Computes the spectral convergence and the log magnitude distance of two recordings, as means over resolutions.

    Frames are centred at multiples of the hop. The audio is extended at both ends by its mirror image of half a frame.

    Args:
        generated: (C, N) floating-point audio.
        reference: (C, N) floating-point audio with as many channels. The longer of the two is cut to the length of the shorter.
        resolutions: Settings of the transforms.

    Returns:
        The spectral convergence, a ratio, which is NaN if the reference is digitally silent; and the log magnitude distance in
        nats. Both are NaN if the clips are not longer than half a frame of every resolution.

    Raises:
        MetricError: If a clip is not (C, N) floating-point audio or contains NaN, or if the numbers of channels differ.
    """
    check_audio("stft_distance", generated=generated, reference=reference)
    first, second = cut_to_shorter(generated, reference)
    if first.shape[1] <= max(resolution.n_fft // 2 for resolution in resolutions):
        return nan, nan
    pairs = [_one_resolution(first, second, resolution) for resolution in resolutions]
    convergence = fsum(pair[0] for pair in pairs) / len(pairs)
    return convergence if second.any() else nan, fsum(pair[1] for pair in pairs) / len(pairs)


def _one_resolution(generated: Tensor, reference: Tensor, resolution: StftResolution) -> tuple[float, float]:
    """Returns the spectral convergence and the log magnitude distance of (C, N) float64 recordings at one resolution."""
    differences: list[float] = []
    energies: list[float] = []
    logs: list[float] = []
    num_values = 0
    window = hann_window(resolution.window, generated, n_fft=resolution.n_fft)
    half = resolution.n_fft // 2
    for channel in range(generated.shape[0]):
        blocks = zip(
            *(
                spectra(reflect(audio[channel], half, half), window=window, hop=resolution.hop)
                for audio in (generated, reference)
            ),
            strict=True,
        )
        for block in blocks:
            x, y = ((part.real.square() + part.imag.square()).clamp(min=MIN_POWER) for part in block)
            # Each row is summed by one thread, so the sums do not depend on the number of threads.
            differences += (y.sqrt() - x.sqrt()).square().sum(-1).tolist()
            energies += y.sum(-1).tolist()
            logs += (y.log() - x.log()).abs().sum(-1).tolist()
            num_values += y.numel()
    return sqrt(fsum(differences) / fsum(energies)), 0.5 * fsum(logs) / num_values
