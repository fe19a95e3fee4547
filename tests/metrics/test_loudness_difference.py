from math import isnan

import pytest
import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import LoudnessDifference
from musicgen_eval.metrics.loudness_difference import integrated_loudness, k_weighted, k_weighting
from tests.support.audio_clips import check_merging, check_threads, lossless_pairs

# pyloudnorm 0.2.0, Meter(rate, filter_class="DeMan"), on dreamy_01.wav, tense_12.flac (at 44.1 kHz), the first 14400 samples of
# dreamy_01.wav, and a stereo clip of the first 256000 samples of both.
PYLOUDNORM = {
    "dreamy": -15.832021671415143,
    "tense": -14.66262596392799,
    "dreamy 0.45 s": -15.566868855383756,
    "stereo": -12.582419441989974,
}


def clips() -> dict[str, tuple[Tensor, int]]:
    pairs = lossless_pairs()
    dreamy, tense = (torch.cat(pairs[name][:2], dim=1) for name in ("halves", "halves_44100"))
    return {
        "dreamy": (dreamy, 32000),
        "tense": (tense, 44100),
        "dreamy 0.45 s": (dreamy[:, :14400], 32000),
        "stereo": (torch.cat([dreamy, tense[:, :256000]]), 32000),
    }


def tone(*parts: tuple[float, float], rate_hz: int = 48000, pitch_hz: float = 1000, channels: int = 2) -> Tensor:
    """Returns a tone with parts of (peak level in dBFS, duration in s)."""
    levels = torch.cat([torch.full((round(duration_s * rate_hz),), 10 ** (level / 20)) for level, duration_s in parts])
    times = torch.arange(len(levels), dtype=torch.float64) / rate_hz
    return (levels * torch.sin(2 * torch.pi * pitch_hz * times)).expand(channels, -1)


@pytest.mark.parametrize("name", PYLOUDNORM)
def test_the_loudness_is_that_of_pyloudnorm(name):
    audio, rate_hz = clips()[name]
    assert integrated_loudness(audio, sample_rate_hz=rate_hz) == pytest.approx(PYLOUDNORM[name], abs=1e-9)


@pytest.mark.parametrize("rate_hz", [32000, 48000])
@pytest.mark.parametrize(
    ("parts", "loudness"),
    [  # EBU Tech 3341 (2016), table 1, cases 1 to 5
        ([(-23, 20)], -23),
        ([(-33, 20)], -33),
        ([(-36, 10), (-23, 60), (-36, 10)], -23),
        ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23),
        ([(-26, 20), (-20, 20.1), (-26, 20)], -23),
    ],
)
def test_the_test_signals_of_the_ebu_have_their_loudness(parts, loudness, rate_hz):
    assert integrated_loudness(tone(*parts, rate_hz=rate_hz), sample_rate_hz=rate_hz) == pytest.approx(
        loudness, abs=0.1
    )


def test_a_full_scale_tone_in_one_channel_has_the_loudness_that_the_standard_states():
    audio = tone((0, 5), pitch_hz=997, channels=1)
    assert integrated_loudness(audio, sample_rate_hz=48000) == pytest.approx(-3.01, abs=0.002)
    audio = tone((0, 5), pitch_hz=997, channels=1, rate_hz=32000)
    assert integrated_loudness(audio, sample_rate_hz=32000) == pytest.approx(-3.01, abs=0.02)


def test_the_filters_at_48_khz_are_those_of_the_standard():
    shelf, high_pass = k_weighting(48000)
    assert shelf[0] == pytest.approx([1.53512485958697, -2.69169618940638, 1.19839281085285], abs=1e-13)
    assert shelf[1] == pytest.approx([1, -1.69065929318241, 0.73248077421585], abs=1e-13)
    assert high_pass[0] == (1, -2, 1)
    assert high_pass[1] == pytest.approx([1, -1.99004745483398, 0.99007225036621], abs=1e-13)


def test_the_filter_equals_its_recursion(generator):
    audio = torch.randn(1, 300, generator=generator)
    expected = audio[0].double().tolist()
    for b, a in k_weighting(32000):
        given, expected = [0.0, 0.0, *expected], [0.0, 0.0]
        for n in range(2, len(given)):
            fed = b[0] * given[n] + b[1] * given[n - 1] + b[2] * given[n - 2]
            expected.append(fed - a[1] * expected[n - 1] - a[2] * expected[n - 2])
        expected = expected[2:]
    assert k_weighted(audio, sample_rate_hz=32000)[0].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_gain_changes_the_loudness_by_its_decibels_beyond_full_scale():
    audio, rate_hz = clips()["dreamy"]
    for gain_db in (-20, 12, 40):
        loudness = integrated_loudness(audio * 10 ** (gain_db / 20), sample_rate_hz=rate_hz)
        assert loudness == pytest.approx(PYLOUDNORM["dreamy"] + gain_db, abs=1e-4)


def test_quiet_parts_are_gated():
    rate_hz = 32000
    loud = tone((-20, 3), rate_hz=rate_hz)
    silence = torch.zeros(2, 20 * rate_hz)
    expected = integrated_loudness(loud, sample_rate_hz=rate_hz)
    assert integrated_loudness(torch.cat([loud, silence], 1), sample_rate_hz=rate_hz) == pytest.approx(
        expected, abs=0.5
    )


@pytest.mark.parametrize("rate_hz", [8000, 11025, 32000])
def test_silence_and_short_clips_are_undefined(rate_hz):
    num_samples = round(0.4 * rate_hz)
    audio = tone((-20, 1), rate_hz=rate_hz)
    assert not isnan(integrated_loudness(audio[:, :num_samples], sample_rate_hz=rate_hz))
    for undefined in (audio[:, : num_samples - 1], audio[:, :0], torch.zeros(1, rate_hz), 1e-5 * audio):
        assert isnan(integrated_loudness(undefined, sample_rate_hz=rate_hz))


def test_differences_are_means_over_the_clips_that_define_them():
    audio, rate_hz = clips()["dreamy"]
    silence = torch.zeros(1, rate_hz)
    inputs = [
        {"generated": generated, "reference": audio, "context_decoded": context, "sample_rate_hz": rate_hz}
        for generated, context in ((2 * audio, audio[:, :rate_hz]), (0.5 * audio, silence), (silence, silence))
    ]
    found = check_merging(LoudnessDifference(), inputs)
    assert found["minus_reference"] == pytest.approx(0, abs=1e-4)
    assert found["distance_to_reference"] == pytest.approx(6.0206, abs=1e-4)
    to_prompt = integrated_loudness(2 * audio, sample_rate_hz=rate_hz) - integrated_loudness(
        audio[:, :rate_hz], sample_rate_hz=rate_hz
    )
    assert found["minus_prompt"] == pytest.approx(to_prompt, abs=1e-9)
    assert (found["coverage_reference"], found["coverage_prompt"]) == pytest.approx((2 / 3, 1 / 3))
    check_threads(LoudnessDifference(), inputs[0])


def test_three_channels_are_refused():
    with pytest.raises(MetricError, match="has 3 channels, expected 1 or 2"):
        integrated_loudness(torch.zeros(3, 32000), sample_rate_hz=32000)


def test_the_recipe_has_a_unit_for_each_value():
    recipe = LoudnessDifference().recipe
    assert [recipe.unit(name) for name in LoudnessDifference().names] == ["LU"] * 4 + ["share of clips"] * 2
