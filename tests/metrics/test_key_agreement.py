import csv
from math import isnan

import pytest
import torch
from torch import Tensor

from musicgen_eval.audio.reader import open_track
from musicgen_eval.data.plan_builder import DEMO_CLIPS
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import KeyAgreement
from musicgen_eval.metrics.key_agreement import TONICS, KeyEstimate, estimate_key, key_profiles, weighted_key_score
from tests.support.audio_clips import check_merging, check_threads, lossless_pairs, stretched, transposed

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 11)}  # major and harmonic minor
CADENCES = {"major": (0, 3, 4, 0), "minor": (0, 3, 4, 0)}  # degrees of the chords: I IV V I
FLATS = {"db": 1, "d": 2, "eb": 3, "e": 4, "f": 5, "gb": 6, "g": 7, "ab": 8, "a": 9, "bb": 10, "b": 11, "c": 0}

# mir_eval 0.8.2, key.weighted_score(reference, estimated): reference and the estimated keys, C to B major and then C to B minor.
MIR_EVAL = {
    (0, False): {0: 1.0, 7: 0.5, 12: 0.2, 21: 0.3},
    (9, True): {0: 0.3, 9: 0.2, 16: 0.5, 21: 1.0},
    (3, True): {3: 0.2, 6: 0.3, 15: 1.0, 22: 0.5},
}


def sound(notes: tuple[int, ...], *, duration_s: float, rate_hz: int, detune: float = 0.0) -> Tensor:
    """Returns notes with six harmonics that decay, given as MIDI notes."""
    times = torch.arange(round(duration_s * rate_hz), dtype=torch.float64) / rate_hz
    tones = [
        torch.sin(2 * torch.pi * 440 * 2 ** ((note + detune - 69) / 12) * k * times) / k**1.5
        for note in notes
        for k in range(1, 7)
    ]
    return torch.stack(tones).sum(0) * torch.exp(-2 * times)


def cadence(tonic: int, mode: str, *, rate_hz: int = 16000, detune: float = 0.0) -> Tensor:
    """Returns the chords I, IV, V and I, with a bass note."""
    scale = [48 + tonic + 12 * octave + step for octave in range(3) for step in SCALES[mode]]
    chords = [(scale[i] - 12, scale[i], scale[i + 2], scale[i + 4]) for i in CADENCES[mode]]
    return torch.cat([sound(chord, duration_s=0.6, rate_hz=rate_hz, detune=detune) for chord in chords]).unsqueeze(0)


def scale(tonic: int, mode: str, *, rate_hz: int = 16000) -> Tensor:
    """Returns the scale upwards and downwards, and the tonic triad at the end."""
    steps = [60 + tonic + step for step in (*SCALES[mode], 12)]
    notes = [sound((note,), duration_s=0.25, rate_hz=rate_hz) for note in (*steps, *steps[-2::-1])]
    triad = sound((steps[0], steps[2], steps[4]), duration_s=1.0, rate_hz=rate_hz)
    return torch.cat([*notes, triad]).unsqueeze(0)


@pytest.mark.parametrize("mode", SCALES)
@pytest.mark.parametrize("tonic", range(12))
def test_the_key_of_cadences_and_scales_is_found(tonic, mode):
    for audio in (cadence(tonic, mode), scale(tonic, mode)):
        found = estimate_key(audio, sample_rate_hz=16000)
        assert found.name == f"{TONICS[tonic]} {mode}"
        assert abs(found.tuning) < 0.05
    assert estimate_key(cadence(tonic, mode), sample_rate_hz=16000).is_confident


@pytest.mark.parametrize("rate_hz", [8000, 22050, 32000, 44100, 48000])
def test_the_sample_rate_does_not_matter(rate_hz):
    assert estimate_key(cadence(3, "minor", rate_hz=rate_hz), sample_rate_hz=rate_hz).name == "Eb minor"


@pytest.mark.parametrize("detune", [-0.4, -0.2, 0.3])
def test_the_tuning_is_found_and_does_not_matter(detune):
    found = estimate_key(cadence(7, "major", detune=detune), sample_rate_hz=16000)
    assert (found.name, found.is_confident) == ("G major", True)
    assert found.tuning == pytest.approx(detune, abs=0.05)


def test_the_profiles_are_those_of_krumhansl_and_kessler():
    profiles = key_profiles()
    assert profiles.shape == (24, 12)
    assert profiles[2, 2] == 6.35  # the tonic of D major
    assert profiles[12 + 9, [9, 0, 4]].tolist() == [6.33, 5.38, 4.75]  # the triad of A minor
    correlations = torch.corrcoef(profiles)
    # Krumhansl and Kessler (1982): correlations of C major with A minor, G major and C minor, from unrounded ratings
    assert correlations[0, [21, 7, 12]].tolist() == pytest.approx([0.651, 0.591, 0.511], abs=2e-3)


@pytest.mark.parametrize("reference", MIR_EVAL)
def test_scores_are_those_of_mir_eval(reference):
    def key(tonic: int, is_minor: bool) -> KeyEstimate:
        return KeyEstimate(tonic, is_minor, correlation=1.0, lead=1.0, tuning=0.0)

    found = [weighted_key_score(key(*reference), key(other % 12, other >= 12)) for other in range(24)]
    assert found == [MIR_EVAL[reference].get(other, 0.0) for other in range(24)]


def test_noise_and_silence_have_no_confident_key(generator):
    for duration_s in (1, 2, 5):
        for _ in range(10):
            noise = torch.randn(1, 16000 * duration_s, generator=generator)
            assert not estimate_key(noise, sample_rate_hz=16000).is_confident
    assert estimate_key(torch.zeros(1, 32000), sample_rate_hz=16000) is None
    assert estimate_key(torch.ones(1, 32000), sample_rate_hz=16000) is None
    assert estimate_key(cadence(0, "major")[:, :15999], sample_rate_hz=16000) is None
    assert estimate_key(torch.zeros(1, 0), sample_rate_hz=16000) is None


def test_gain_and_channels_do_not_matter():
    audio = cadence(5, "major")
    expected = estimate_key(audio, sample_rate_hz=16000)
    for other in (1e-3 * audio, 50 * audio, audio.expand(2, -1)):
        found = estimate_key(other, sample_rate_hz=16000)
        assert found.name == expected.name
        assert found.correlation == pytest.approx(expected.correlation, abs=1e-9)


def test_a_transposed_clip_is_found_and_a_stretched_clip_has_the_same_key():
    clip = lossless_pairs()["halves"][0]  # Db major
    inputs = [
        {"generated": other, "context_decoded": clip, "sample_rate_hz": 32000}
        for other in (clip, stretched(clip, 1.25), transposed(clip, 7), transposed(clip, 1), transposed(clip, -1))
    ]
    found = [check_merging(KeyAgreement(), [given]) for given in inputs]
    assert [each["same_key"] for each in found] == [1, 1, 0, 0, 0]
    assert [each["weighted_score"] for each in found] == [1, 1, 0.5, 0, 0]
    assert [each["coverage"] for each in found] == [1] * 5
    together = check_merging(KeyAgreement(), inputs)
    assert together == {"same_key": 0.4, "weighted_score": 0.5, "coverage": 1}
    check_threads(KeyAgreement(), inputs[1])


def test_pairs_without_confident_keys_only_reduce_the_coverage(generator):
    music, noise = cadence(0, "minor"), torch.randn(1, 40000, generator=generator)
    inputs = [
        {"generated": generated, "context_decoded": context, "sample_rate_hz": 16000}
        for generated, context in ((music, music), (music, noise), (noise, music), (torch.zeros(1, 0), music))
    ]
    assert check_merging(KeyAgreement(), inputs) == {"same_key": 1, "weighted_score": 1, "coverage": 0.25}
    assert isnan(check_merging(KeyAgreement(), inputs[1:])["same_key"])


def test_nan_is_refused():
    with pytest.raises(MetricError, match="estimate_key: audio contains NaN or infinite samples"):
        estimate_key(torch.full((1, 16000), float("nan")), sample_rate_hz=16000)


@pytest.mark.slow
def test_confident_keys_of_the_demo_clips_are_right_or_related():
    """The texts of the clips state their keys. Measured on the halves: 13 of 16 confident, 9 right, 4 a fifth or relative."""
    confident, right = 0, 0
    for row in csv.DictReader((DEMO_CLIPS / "manifest.csv").open()):
        _, key = row["text"].split(" , ")[0].split(" music in ")
        tonic, mode = key.split()
        track = open_track(DEMO_CLIPS / row["path"])
        audio = track.read(0, track.num_samples_at(32000), sample_rate_hz=32000, channels=1)
        halves = [estimate_key(half, sample_rate_hz=32000) for half in audio.tensor_split(2, dim=1)]
        true = KeyEstimate(FLATS[tonic], mode == "minor", correlation=1.0, lead=1.0, tuning=0.0)
        for found in (half for half in halves if half.is_confident):
            confident += 1
            right += (found.tonic, found.is_minor) == (true.tonic, true.is_minor)
            assert max(weighted_key_score(true, found), weighted_key_score(found, true)) >= 0.3
    assert (confident, right) == (13, 9)
