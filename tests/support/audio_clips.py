"""Pairs of audio from the demo clips, altered audio, and checks of metrics that are updated with audio."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from fractions import Fraction
from typing import Any

import soundfile
import torch
from torch import Tensor
from torchaudio.functional import phase_vocoder, resample
from torchmetrics import Metric

from musicgen_eval.data.plan_builder import DEMO_CLIPS
from musicgen_eval.metrics.plugin.states import compute_in_place, is_sum_metric, merge_states, window_state

N_FFT = 2048


def lossless_pairs() -> dict[str, tuple[Tensor, Tensor, int]]:
    """Returns pairs of (C, N) float32 clips and a nominal sample rate, by name. Both files are lossless, so all decoders agree."""
    dreamy = torch.from_numpy(soundfile.read(DEMO_CLIPS / "dreamy_01.wav", dtype="float32")[0])  # 8 s at 32 kHz
    tense = torch.from_numpy(soundfile.read(DEMO_CLIPS / "tense_12.flac", dtype="float32")[0])  # 8 s at 44.1 kHz
    halves = torch.stack([dreamy[:128000], tense[:128000]]), torch.stack([tense[128000:256000], dreamy[128000:]])
    return {
        "halves": (dreamy[None, :128000], dreamy[None, 128000:], 32000),
        "halves_44100": (tense[None, :176400], tense[None, 176400:], 44100),
        "songs": (dreamy[None, :100000], tense[None, :100000], 32000),
        "short": (dreamy[None, :10001], dreamy[None, 20000:30001], 32000),
        "stereo": (*halves, 32000),
    }


def stretched(audio: Tensor, rate: float) -> Tensor:
    """Plays (C, N) audio faster by a factor without changing its pitch, with a phase vocoder."""
    window = torch.hann_window(N_FFT, dtype=torch.float64)
    spectra = torch.stft(audio.double(), N_FFT, N_FFT // 4, window=window, return_complex=True)
    advance = torch.linspace(0, torch.pi * N_FFT // 4, N_FFT // 2 + 1, dtype=torch.float64).unsqueeze(1)
    faster = phase_vocoder(spectra, rate, advance)
    return torch.istft(faster, N_FFT, N_FFT // 4, window=window, length=round(audio.shape[1] / rate)).float()


def transposed(audio: Tensor, semitones: float) -> Tensor:
    """Raises the pitch of (C, N) audio without changing its tempo."""
    ratio = Fraction(2 ** (semitones / 12)).limit_denominator(50)  # 18 / 17 for a semitone, 1% of a semitone too low
    return resample(stretched(audio, float(1 / ratio)), ratio.numerator, ratio.denominator)


def check_merging(metric: Metric, inputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Checks that merging single states gives the same result as updating one metric, and returns the result."""
    assert is_sum_metric(metric)
    together = deepcopy(metric)
    for given in inputs:
        together.update(**given)
    merged = compute_in_place(deepcopy(metric), merge_states(metric, [window_state(metric, given) for given in inputs]))
    found = {key: value.item() for key, value in together.compute().items()}
    torch.testing.assert_close(found, merged, rtol=1e-12, atol=0, equal_nan=True)
    backwards = deepcopy(metric)
    for given in reversed(inputs):
        backwards.update(**given)
    again = {key: value.item() for key, value in backwards.compute().items()}
    torch.testing.assert_close(found, again, rtol=1e-12, atol=0, equal_nan=True)
    return found


def check_threads(metric: Metric, inputs: Mapping[str, Any]) -> None:
    """Checks that the state after an update is bit-identical with one and with two threads."""
    found = torch.get_num_threads()
    states = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            states.append(window_state(metric, inputs))
    finally:
        torch.set_num_threads(found)
    for name, value in states[0].items():
        assert torch.equal(value.nan_to_num(nan=-1.0), states[1][name].nan_to_num(nan=-1.0))
