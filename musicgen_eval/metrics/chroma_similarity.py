"""A metric for the agreement of the strongest pitch classes of a continuation and its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from musicgen_eval.metrics.clip_audio import (
    check_audio,
    check_sample_rate,
    cut_to_shorter,
    hann_window,
    reflect,
    spectra,
    to_mono,
)
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.metrics.plugin.metric_internals import DtypeKeepingMetric

N_FFT = 1 << 14  # samples: 512 ms at 32 kHz
HOP = 1 << 12
NUM_CHROMA = 12
A_440_HZ = 440.0
CENTRE_OCTAVE = 5.0  # octaves above 27.5 Hz: 880 Hz
WIDTH_OCTAVES = 2.0


class ChromaSimilarity(DtypeKeepingMetric):
    """Mean cosine similarity of the chroma of continuations and references, as audiocraft computes it.

    Each chroma vector is a one-hot vector of the strongest of 12 pitch classes, so the cosine of two vectors is 1 if the pitch
    classes are equal, and 0 otherwise. `similarity` is therefore the share of frames in which both recordings have the same
    strongest pitch class, in [0, 1]. It is the mean over all frames of all clips, so longer clips have a larger weight.

    Music in the same key that plays other notes scores low, and equal bass notes are sufficient for a high score. Independent
    music scores about 1/12, or more in a common key. `silent` is the share of frames in which at least one of the recordings is
    digitally silent. Such a frame has the pitch class C, as in audiocraft, so two silent frames count as equal.

    >>> import torch
    >>> times = torch.arange(64000, dtype=torch.float64) / 32000
    >>> a4, a5, b4 = (torch.sin(2 * torch.pi * pitch * times).unsqueeze(0) for pitch in (440, 880, 493.9))
    >>> metric = ChromaSimilarity()
    >>> metric.update(a4, a5, 32000)
    >>> metric.compute()["similarity"].item()
    1.0
    >>> metric.update(a4, b4, 32000)
    >>> metric.compute()["similarity"].item()
    0.5

    Source: audiocraft 1.3.0, `ChromaCosineSimilarityMetric` and `ChromaExtractor`, with the settings of
    `config/solver/musicgen/default.yaml` (radix2_exp 14, argmax); MusicGen paper (arXiv 2306.05284), section 3.5.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")  # equal and silent frames
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        return MetricRecipe(
            units={"similarity": "share of frames", "silent": "share of frames"},
            higher_is_better=True,
            source="audiocraft 1.3.0, ChromaCosineSimilarityMetric (arXiv 2306.05284)",
            settings={
                "n_fft": N_FFT,
                "hop": HOP,
                "window": "periodic Hann of n_fft samples",
                "padding": "reflection by n_fft / 2",
                "num_chroma": NUM_CHROMA,
                "spectrum": "power",
                "tuning_hz": A_440_HZ,
                "argmax": True,
            },
        )

    def update(self, generated: Tensor, reference: Tensor, sample_rate_hz: int) -> None:
        """Adds one continuation and its reference, given as (C, N) audio. The longer clip is cut to the length of the shorter."""
        equal, silent, num_frames = chroma_similarity(generated, reference, sample_rate_hz=sample_rate_hz)
        self.total = self.total + torch.tensor([equal, silent], device=self.total.device)
        self.count = self.count + num_frames

    def compute(self) -> dict[str, Tensor]:
        """Returns `similarity` and `silent` as float64 tensors. Both are NaN if there were no frames."""
        similarity, silent = self.total.double() / self.count
        return {"similarity": similarity, "silent": silent}


def chroma_similarity(generated: Tensor, reference: Tensor, *, sample_rate_hz: int) -> tuple[int, int, int]:
    """Counts the frames in which two recordings have the same strongest pitch class.

    The first ceil(N / 4096) frames are compared, as in audiocraft. See `strongest_pitch_classes` for the frames.

    Args:
        generated: (C, N) floating-point audio, mixed to mono.
        reference: (C, N) floating-point audio, mixed to mono. The longer of the two is cut to the length of the shorter.
        sample_rate_hz: Sample rate of both. The number of samples per frame does not depend on it.

    Returns:
        The number of frames with equal pitch classes, the number of frames in which one or both recordings are digitally silent,
        and the number of compared frames.

    Raises:
        MetricError: If a clip is not (C, N) floating-point audio or contains NaN, or if the numbers of channels differ.
    """
    check_audio("chroma_similarity", generated=generated, reference=reference)
    check_sample_rate("chroma_similarity", sample_rate_hz)
    pair = [to_mono(audio) for audio in cut_to_shorter(generated, reference)]
    num_frames = -(-pair[0].shape[0] // HOP)
    (first, first_silent), (second, second_silent) = (
        strongest_pitch_classes(audio, sample_rate_hz=sample_rate_hz, num_frames=num_frames) for audio in pair
    )
    return int((first == second).sum()), int((first_silent | second_silent).sum()), num_frames


def strongest_pitch_classes(audio: Tensor, *, sample_rate_hz: int, num_frames: int) -> tuple[Tensor, Tensor]:
    """Returns the pitch class with the largest chroma in each of the first frames.

    Audio that is shorter than 2^14 samples is padded with zeros at both ends to this length. Then frame i is centred at sample
    i * 2^12, and the audio is extended at both ends by its mirror image. The chroma of a frame is `chroma_filters` times its power
    spectrum. audiocraft divides the power by the energy of the window, and each chroma vector by its maximum. Neither changes the
    largest component.

    Args:
        audio: (N,) float64 audio.
        sample_rate_hz: Sample rate of the audio.
        num_frames: Number of frames.

    Returns:
        (T,) int64 pitch classes, where 0 is C and 11 is B, and (T,) bools that are True if the frame is digitally silent. A silent
        frame has the pitch class 0.
    """
    if num_frames == 0:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    missing = max(0, N_FFT - audio.shape[0])
    padded = torch.nn.functional.pad(audio, (missing // 2, missing - missing // 2))
    filters = chroma_filters(sample_rate_hz).to(audio.device)
    blocks = spectra(reflect(padded, N_FFT // 2, N_FFT // 2), window=hann_window(N_FFT, audio), hop=HOP)
    chroma = torch.cat([(block.real.square() + block.imag.square()) @ filters.T for block in blocks])[:num_frames]
    return chroma.argmax(-1), chroma.amax(-1) == 0


def chroma_filters(sample_rate_hz: int) -> Tensor:
    """Returns the weight of each frequency of a spectrum in each pitch class.

    A frequency contributes to pitch classes by a Gaussian of its distance in semitones from them. The standard deviation is a half
    of the distance between neighbouring frequencies, or half a semitone if that is more. The weights of one frequency have a
    Euclidean norm of 1. They are then multiplied by a Gaussian around 880 Hz with a standard deviation of 2 octaves. The tuning is
    A4 = 440 Hz.

    Args:
        sample_rate_hz: Sample rate of the audio.

    Returns:
        (12, 8193) float64 weights. Row 0 is C.

    Source: librosa 0.11.0, `librosa.filters.chroma` with tuning=0 (Ellis, Chroma feature analysis and synthesis, 2007).
    """
    frequencies = torch.arange(1, N_FFT, dtype=torch.float64) * sample_rate_hz / N_FFT
    semitones = NUM_CHROMA * (frequencies / (A_440_HZ / 16)).log2()  # above A0
    semitones = torch.cat([semitones[:1] - 1.5 * NUM_CHROMA, semitones])  # stands in for the logarithm of 0 Hz
    widths = torch.cat([semitones.diff().clamp(min=1.0), torch.ones(1, dtype=torch.float64)])
    half = NUM_CHROMA // 2
    distances = (semitones - torch.arange(NUM_CHROMA, dtype=torch.float64).unsqueeze(1) + half) % NUM_CHROMA - half
    weights = torch.exp(-0.5 * (2 * distances / widths) ** 2)
    weights = weights / weights.norm(dim=0)
    weights = weights * torch.exp(-0.5 * ((semitones / NUM_CHROMA - CENTRE_OCTAVE) / WIDTH_OCTAVES) ** 2)
    return weights.roll(-3, dims=0)[:, : N_FFT // 2 + 1]
