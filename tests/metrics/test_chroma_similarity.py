import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MusicgenMelodyFeatureExtractor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import ChromaSimilarity
from musicgen_eval.metrics.chroma_similarity import chroma_filters, chroma_similarity, strongest_pitch_classes
from tests.support.audio_clips import check_merging, check_threads, lossless_pairs, stretched, transposed

# audiocraft 1.3.0, ChromaCosineSimilarityMetric(sample_rate, 12, 14, True) with librosa 0.11.0, on `lossless_pairs()`:
# (similarity, number of frames).
AUDIOCRAFT = {
    "halves": (0.75, 32),
    "halves_44100": (0.0, 44),
    "songs": (0.0, 25),
    "short": (1.0, 3),
    "stereo": (0.375, 32),
}


@pytest.mark.parametrize("name", AUDIOCRAFT)
def test_the_similarity_is_that_of_audiocraft(name):
    generated, reference, rate_hz = lossless_pairs()[name]
    equal, silent, num_frames = chroma_similarity(generated, reference, sample_rate_hz=rate_hz)
    assert (equal / num_frames, num_frames) == AUDIOCRAFT[name]
    assert silent == 0


@pytest.mark.parametrize(
    ("rate_hz", "total", "squares", "a", "c"),
    [
        # librosa 0.11.0, filters.chroma(n_fft=16384, tuning=0, dtype=float64): sum, sum of squares, [9, 225] and [0, 134]
        (32000, 4159.942826115046, 1747.1203741009233, 0.8661476328227106, 0.6699196393875432),
        (44100, 3281.1551522717627, 1285.1145667374092, 3.0101611969352614e-27, 1.3664212341719662e-27),
    ],
)
def test_the_filters_are_those_of_librosa(rate_hz, total, squares, a, c):
    filters = chroma_filters(rate_hz)
    assert filters.shape == (12, 8193)
    found = [filters.sum().item(), filters.square().sum().item(), filters[9, 225].item(), filters[0, 134].item()]
    assert found == pytest.approx([total, squares, a, c], rel=1e-11, abs=0)


def test_pitch_classes_are_those_of_transformers_chroma(generator):
    """The feature extractor of MusicGen Melody in transformers is a reimplementation of audiocraft's extractor."""
    extractor = MusicgenMelodyFeatureExtractor(sampling_rate=32000)
    audio = torch.randn(1, 70001, generator=generator)
    expected = extractor._torch_extract_fbank_features(audio)[0]
    found, silent = strongest_pitch_classes(audio[0].double(), sample_rate_hz=32000, num_frames=100)
    assert found.tolist() == np.argmax(expected, axis=-1).tolist()
    assert not silent.any()


def tone(pitch_hz: float, duration_s: float = 2.0, rate_hz: int = 32000) -> Tensor:
    times = torch.arange(round(duration_s * rate_hz), dtype=torch.float64) / rate_hz
    return torch.sin(2 * torch.pi * pitch_hz * times).unsqueeze(0)


@pytest.mark.parametrize("rate_hz", [22050, 32000, 48000])
def test_all_notes_of_three_octaves_have_their_pitch_class(rate_hz):
    for note in range(48, 84):
        audio = tone(440 * 2 ** ((note - 69) / 12), rate_hz=rate_hz)
        classes, _ = strongest_pitch_classes(audio[0], sample_rate_hz=rate_hz, num_frames=4)
        assert classes.tolist() == [note % 12] * 4


def test_a_transposed_and_a_stretched_clip_are_found():
    clip = lossless_pairs()["halves"][0]

    def similarity(other: Tensor) -> float:
        equal, _, num_frames = chroma_similarity(other, clip, sample_rate_hz=32000)
        return equal / num_frames

    assert similarity(clip) == 1.0
    assert similarity(0.2 * clip) == 1.0
    assert similarity(transposed(clip, 0)) > 0.9
    for semitones in (1, 3, -2):
        assert similarity(transposed(clip, semitones)) < 0.3
    assert similarity(stretched(clip, 1.25)) < 0.75


def test_silence_has_pitch_class_c_and_is_counted_as_silent():
    silence, c4 = torch.zeros(1, 40960), tone(261.63)[:, :40960]
    assert chroma_similarity(silence, silence, sample_rate_hz=32000) == (10, 10, 10)
    equal, silent, num_frames = chroma_similarity(silence, c4, sample_rate_hz=32000)
    assert (equal, silent, num_frames) == (10, 10, 10)
    assert chroma_similarity(silence, tone(440), sample_rate_hz=32000) == (0, 10, 10)


@pytest.mark.parametrize(("num_samples", "num_frames"), [(0, 0), (1, 1), (4096, 1), (4097, 2), (16384, 4), (16385, 5)])
def test_the_first_frames_of_short_clips_are_compared(num_samples, num_frames):
    audio = tone(440)[:, :num_samples]
    assert chroma_similarity(audio, tone(440), sample_rate_hz=32000)[2] == num_frames


def test_long_audio_in_blocks_equals_short_pieces(monkeypatch):
    audio = lossless_pairs()["halves"][0][0].double()
    whole, _ = strongest_pitch_classes(audio, sample_rate_hz=32000, num_frames=32)
    monkeypatch.setattr("musicgen_eval.metrics.clip_audio.BLOCK_SAMPLES", 1 << 15)
    blocks, _ = strongest_pitch_classes(audio, sample_rate_hz=32000, num_frames=32)
    assert torch.equal(whole, blocks)


def test_results_are_means_over_frames_also_after_merging():
    pairs = lossless_pairs()
    inputs = [
        dict(zip(("generated", "reference", "sample_rate_hz"), pairs[name], strict=True))
        for name in ("halves", "songs", "short")
    ]
    found = check_merging(ChromaSimilarity(), inputs)
    assert found["similarity"] == pytest.approx((24 + 0 + 3) / (32 + 25 + 3))
    assert found["silent"] == 0
    check_threads(ChromaSimilarity(), inputs[0])
    assert all(value.isnan() for value in ChromaSimilarity().compute().values())


@pytest.mark.parametrize(
    ("generated", "reference", "message"),
    [
        (torch.zeros(900), torch.zeros(1, 900), r"generated has shape \(900,\) .*expected floating-point \(C, N\)"),
        (torch.zeros(1, 900, dtype=torch.int16), torch.zeros(1, 900), "dtype torch.int16"),
        (torch.zeros(2, 900), torch.zeros(1, 900), "expected the same number"),
        (torch.zeros(1, 900), torch.full((1, 900), float("nan")), "reference contains NaN or infinite samples"),
    ],
)
def test_other_audio_is_refused(generated, reference, message):
    with pytest.raises(MetricError, match=message):
        chroma_similarity(generated, reference, sample_rate_hz=32000)


def test_a_sample_rate_of_0_is_refused():
    with pytest.raises(MetricError, match="sample_rate_hz must be above 0, got 0"):
        chroma_similarity(torch.zeros(1, 9), torch.zeros(1, 9), sample_rate_hz=0)
