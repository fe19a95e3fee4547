"""Finds parts of a continuation that repeat earlier audio exactly."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from musicgen_eval.metrics.clip_audio import check_audio, check_sample_rate

BLOCK_S = 0.5
MIN_CORRELATION = 0.999
SILENCE_RMS = 1e-3  # -60 dBFS
MIN_ENERGY_RATIO = 1e-4  # earlier audio that is 40 dB quieter than a block is no repetition of it
CHUNKS_AT_ONCE = 64


def repeated_share(audio: Tensor, before: Tensor, *, sample_rate_hz: int) -> float:
    """Computes the share of a clip that repeats earlier audio, sample by sample.

    The clip is divided into blocks of 0.5 s. Blocks whose root mean square is at most -60 dBFS are not counted, nor is an
    incomplete block at the end. A block is a repetition if its correlation with some earlier audio of the same length, which ends
    before the block starts, is at least 0.999. The energy of the difference is then below 0.2% of the energy of the block, after a
    change of gain. Earlier audio may start at any sample of `before` or of the clip. Channels are correlated together.
    Correlations are sums of products without subtraction of the mean, divided by the root of the product of the energies.

    Args:
        audio: (C, N) floating-point audio.
        before: (C, N) floating-point audio that ends where `audio` starts.
        sample_rate_hz: Sample rate of both.

    Returns:
        The share of counted blocks that are repetitions, in [0, 1]. NaN if no block is counted.

    Raises:
        MetricError: If a clip is not (C, N) floating-point audio or contains NaN, or if the numbers of channels differ.
    """
    check_audio("repeated_share", audio=audio, before=before)
    check_sample_rate("repeated_share", sample_rate_hz)
    size = max(1, round(BLOCK_S * sample_rate_hz))
    whole = torch.cat([before.double(), audio.double()], dim=1)
    starts = range(before.shape[1], whole.shape[1] - size + 1, size)
    search = _Search(whole, size)
    loud = [start for start in starts if search.energy[start] > SILENCE_RMS**2 * size * whole.shape[0]]
    if not loud:
        return nan
    return sum(search.largest_correlation(start) >= MIN_CORRELATION for start in loud) / len(loud)


class _Search:
    """Correlates a block of audio with all earlier audio.

    The audio is cut into overlapping chunks, whose spectra are computed once (overlap-save method).

    Args:
        audio: (C, N) float64 audio.
        size: Length of a block in samples.
    """

    def __init__(self, audio: Tensor, size: int) -> None:
        self.audio = audio
        self.size = size
        self.fft_size = 1 << (4 * size - 1).bit_length()
        self.hop = self.fft_size - size + 1  # number of correlations per chunk
        num_chunks = -(-max(1, audio.shape[1]) // self.hop)
        padded = torch.nn.functional.pad(audio, (0, num_chunks * self.hop + size - 1 - audio.shape[1]))
        self.spectra = torch.fft.rfft(padded.unfold(1, self.fft_size, self.hop))  # (C, chunks, frequencies)
        sums = torch.nn.functional.pad(audio.square().sum(0).cumsum(0), (1, 0))
        self.energy = sums[size:] - sums[:-size]  # of the audio that starts at each sample

    def largest_correlation(self, start: int) -> float:
        """Returns the largest correlation of the block that starts at a sample with audio that ends before it, or -1 if none."""
        num_places = start - self.size + 1
        if num_places <= 0:
            return -1.0
        block = torch.fft.rfft(self.audio[:, start : start + self.size], self.fft_size).conj().unsqueeze(1)
        needed = -(-num_places // self.hop)
        products = [
            torch.fft.irfft((spectra * block).sum(0), self.fft_size)[:, : self.hop].flatten()
            for spectra in self.spectra[:, :needed].split(CHUNKS_AT_ONCE, dim=1)
        ]
        energy = self.energy[start]
        earlier = self.energy[:num_places].clamp(min=MIN_ENERGY_RATIO * energy.item())
        return (torch.cat(products)[:num_places] / (earlier * energy).sqrt()).amax().item()
