import csv
from math import isnan

import pytest
import torch
from torch import Tensor

from musicgen_eval.audio.reader import open_track
from musicgen_eval.data.plan_builder import DEMO_CLIPS
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import TempoAgreement
from musicgen_eval.metrics.tempo_agreement import tempo_scores
from musicgen_eval.metrics.tempo_estimate import TempoEstimate, estimate_tempo
from tests.support.audio_clips import check_merging, check_threads, lossless_pairs, stretched, transposed

# mir_eval 0.8.2, tempo.detection(reference_tempi, reference_weight, estimated_tempi): p_score, one_correct, both_correct.
MIR_EVAL = [
    ((120, 60), 0.7, (120, 60), (1.0, True, True)),
    ((120, 60), 0.7, (60, 30), (0.30000000000000004, True, False)),
    ((120, 60), 0.7, (129.6, 200), (0.7, True, False)),
    ((120, 60), 0.7, (129.7, 200), (0.0, False, False)),
    ((60, 120), 0.6, (120, 40), (0.4, True, False)),
    ((100, 150), 0.55, (92, 138), (1.0, True, True)),
    ((100, 150), 0.55, (91.9, 161.9), (0.44999999999999996, True, False)),
    ((100, 150), 0.55, (50, 75), (0.0, False, False)),
]


def clicks(
    bpm: float, *, duration_s: float = 8.0, rate_hz: int = 16000, jitter_s: float = 0.0, seed: int = 0
) -> Tensor:
    """Returns bursts of noise at a tempo, every fourth of them louder."""
    generator = torch.Generator().manual_seed(seed)
    audio = 1e-3 * torch.randn(1, round(duration_s * rate_hz), generator=generator)
    burst = torch.exp(-torch.arange(rate_hz // 20) / (rate_hz / 100)) * torch.randn(rate_hz // 20, generator=generator)
    for beat in range(int(duration_s * bpm / 60)):
        at = beat * 60 / bpm + jitter_s * torch.rand((), generator=generator).item()
        start = round(at * rate_hz)
        end = min(start + len(burst), audio.shape[1])
        audio[:, start:end] += (0.5 if beat % 4 else 1.0) * burst[: end - start]
    return audio


def tempi(*bpm: float, weight: float = 1.0) -> TempoEstimate:
    return TempoEstimate(bpm, weight, clarity=1.0, is_confident=True)


@pytest.mark.parametrize(("reference", "weight", "estimated", "expected"), MIR_EVAL)
def test_scores_are_those_of_mir_eval(reference, weight, estimated, expected):
    found = tempo_scores(tempi(*reference, weight=weight), tempi(*estimated))
    assert tuple(found[name] for name in ("p_score", "one_correct", "both_correct")) == pytest.approx(
        tuple(map(float, expected))
    )
    assert found["same_tempo"] == (abs(estimated[0] - reference[0]) <= 0.08 * reference[0])


def test_scores_of_single_tempi_are_equal():
    assert tempo_scores(tempi(120), tempi(125)) == dict.fromkeys(
        ("same_tempo", "one_correct", "both_correct", "p_score"), 1
    )
    assert set(tempo_scores(tempi(120), tempi(240)).values()) == {0}
    assert tempo_scores(tempi(120), tempi(125), tolerance=0.04)["same_tempo"] == 0


@pytest.mark.parametrize("bpm", [50, 63, 75, 88, 100, 113.7, 120, 132, 150, 171, 190])
def test_the_tempo_of_clicks_is_found(bpm):
    found = estimate_tempo(clicks(bpm), sample_rate_hz=16000)
    assert found.is_confident
    assert min(abs(tempo / bpm - 1) for tempo in found.tempi_bpm) < 0.01


@pytest.mark.parametrize("rate_hz", [8000, 22050, 32000, 44100, 48000])
def test_the_sample_rate_does_not_matter(rate_hz):
    found = estimate_tempo(clicks(132, rate_hz=rate_hz), sample_rate_hz=rate_hz)
    assert found.tempi_bpm[0] == pytest.approx(132, rel=0.01)


def test_irregular_clicks_and_noise_have_no_confident_tempo(generator):
    for seed in range(10):
        found = estimate_tempo(clicks(120, jitter_s=0.5, seed=seed), sample_rate_hz=16000)
        assert found is None or not found.is_confident
        noise = torch.randn(1, 16000 * (3 + seed), generator=generator)
        found = estimate_tempo(noise, sample_rate_hz=16000)
        assert found is None or not found.is_confident


def test_silence_and_short_clips_have_no_tempo():
    assert estimate_tempo(torch.zeros(1, 16000 * 5), sample_rate_hz=16000) is None
    assert estimate_tempo(torch.ones(1, 16000 * 5), sample_rate_hz=16000) is None
    assert estimate_tempo(clicks(120)[:, : 3 * 16000 - 1], sample_rate_hz=16000) is None
    assert estimate_tempo(clicks(120)[:, : 3 * 16000], sample_rate_hz=16000) is not None
    assert estimate_tempo(torch.zeros(1, 0), sample_rate_hz=16000) is None


def test_channels_do_not_matter():
    audio = clicks(100)
    assert estimate_tempo(audio.expand(2, -1), sample_rate_hz=16000) == estimate_tempo(audio, sample_rate_hz=16000)


def test_blocks_do_not_change_the_estimate(monkeypatch):
    whole = estimate_tempo(clicks(100), sample_rate_hz=16000)
    monkeypatch.setattr("musicgen_eval.metrics.clip_audio.BLOCK_SAMPLES", 1 << 15)
    found = estimate_tempo(clicks(100), sample_rate_hz=16000)
    assert found.tempi_bpm == whole.tempi_bpm
    assert found.clarity == pytest.approx(whole.clarity, rel=1e-12)


def test_a_stretched_clip_is_found_and_a_transposed_clip_has_the_same_tempo():
    clip = lossless_pairs()["halves"][0]  # 125 bpm
    inputs = [
        {"generated": other, "context_decoded": clip, "sample_rate_hz": 32000}
        for other in (clip, transposed(clip, 3), stretched(clip, 1.25), stretched(clip, 1.1), stretched(clip, 0.85))
    ]
    found = [check_merging(TempoAgreement(), [given]) for given in inputs]
    for name in ("same_tempo", "one_correct", "both_correct", "p_score"):
        assert [each[name] for each in found] == pytest.approx([1, 1, 0, 0, 0])
    assert [each["coverage"] for each in found] == [1] * 5
    assert check_merging(TempoAgreement(), inputs)["same_tempo"] == 0.4
    check_threads(TempoAgreement(), inputs[1])


def test_pairs_without_confident_tempi_only_reduce_the_coverage(generator):
    music, noise = clicks(120), torch.randn(1, 80000, generator=generator)
    inputs = [
        {"generated": generated, "context_decoded": context, "sample_rate_hz": 16000}
        for generated, context in ((music, music), (music, noise), (noise, music), (torch.zeros(1, 0), music))
    ]
    found = check_merging(TempoAgreement(), inputs)
    assert (found["same_tempo"], found["p_score"], found["coverage"]) == pytest.approx((1, 1, 0.25))
    assert isnan(check_merging(TempoAgreement(), inputs[1:])["p_score"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "ear"}, "estimator must be one of autocorrelation, beat_this, got 'ear'"),
        ({"tolerance": 0}, "tolerance must be between 0 and 1, got 0"),
        ({"checkpoint": "x.ckpt"}, "checkpoint requires estimator='beat_this'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(MetricError, match=message):
        TempoAgreement(**arguments)


@pytest.mark.slow
def test_the_tempi_of_the_demo_clips_are_right():
    """The texts of the clips state their tempi, which are 94, 125 or 150 bpm. The most salient tempo of each half is right."""
    for row in csv.DictReader((DEMO_CLIPS / "manifest.csv").open()):
        bpm = float(row["text"].split(" , ")[1].split()[1])
        track = open_track(DEMO_CLIPS / row["path"])
        audio = track.read(0, track.num_samples_at(32000), sample_rate_hz=32000, channels=1)
        for half in audio.tensor_split(2, dim=1):
            found = estimate_tempo(half, sample_rate_hz=32000)
            assert found.is_confident
            assert found.tempi_bpm[0] == pytest.approx(bpm, rel=0.01)
