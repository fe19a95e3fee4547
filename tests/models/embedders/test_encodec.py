"""The codec embedder is compared with the encoder of transformers, on a small random codec."""

import pytest
import torch

from musicgen_eval.errors import CheckpointError, MetricError
from musicgen_eval.models.embedders.encodec import encodec_of, load_encodec
from tests.support.embedder_checkpoints import noise, save_clap, save_codec

HOP, RATE_HZ, FRAME_RATE_HZ = 40, 800, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("codec")
    save_codec(path)
    return path


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return save_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture
def embedder(folder, one_thread):
    return load_encodec(folder)


def their_latents(codec, audio):
    with torch.no_grad():
        return codec.encoder(audio[None, None])[0].t()


def test_the_attributes_describe_the_codec(embedder, folder):
    assert (embedder.name, embedder.sample_rate_hz, embedder.dim) == ("encodec", RATE_HZ, 8)
    assert (embedder.window_s, embedder.hop_s) == (0.5, 0.5)
    assert (embedder.checkpoint, embedder.revision, embedder.commit) == (str(folder), None, None)
    assert (embedder.licence.name, embedder.licence.is_non_commercial) == ("unknown", None)


@pytest.mark.parametrize("num_frames", [1, 3, 10, 99, 600])
def test_latents_equal_those_of_transformers_encoder(embedder, codec, num_frames):
    audio = noise(num_frames * HOP)
    theirs = their_latents(codec, audio)
    ours = embedder.latents(audio)
    assert ours.shape == (num_frames, 8)
    assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()


def test_an_embedding_is_the_mean_over_the_frames_of_a_window(embedder, codec):
    audio = noise(37 * HOP)
    theirs = their_latents(codec, audio)
    expected = torch.stack([theirs[0:10].mean(0), theirs[10:20].mean(0), theirs[20:30].mean(0), theirs[27:37].mean(0)])
    assert torch.allclose(embedder.embed(audio), expected, rtol=0, atol=2e-6 * float(theirs.abs().max()))


def test_a_window_of_one_frame_keeps_all_latents(folder):
    embedder, audio = load_encodec(folder, window_s=0.05), noise(37 * HOP)
    assert torch.equal(embedder.embed(audio), embedder.latents(audio))


def test_a_clip_that_is_shorter_than_a_window_is_averaged_without_padding(embedder, codec):
    audio = noise(4 * HOP + 39)
    expected = their_latents(codec, audio[: 4 * HOP]).mean(0, keepdim=True)
    assert torch.allclose(embedder.embed(audio), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_frames", "cuts"), [(610, [0, 600]), (609, [0]), (1300, [0, 600, 1200])])
def test_long_audio_is_encoded_in_segments_of_30_s(embedder, codec, num_frames, cuts):
    audio = noise(num_frames * HOP)
    bounds = zip(cuts, [*cuts[1:], num_frames], strict=True)
    theirs = torch.cat([their_latents(codec, audio[low * HOP : high * HOP]) for low, high in bounds])
    assert (embedder.latents(audio) - theirs).abs().max() < 2e-6 * theirs.abs().max()


def test_embeddings_do_not_depend_on_threads(embedder):
    audio = noise(1300 * HOP)
    alone = embedder.embed(audio)
    torch.set_num_threads(3)
    assert torch.equal(embedder.embed(audio), alone)


def test_silence_has_a_finite_embedding(embedder):
    assert embedder.embed(torch.zeros(20 * HOP)).isfinite().all()


def test_a_codec_with_two_channels_receives_the_audio_in_both(tmp_path):
    stereo = save_codec(tmp_path, audio_channels=2)
    audio = noise(10 * HOP)
    with torch.no_grad():
        theirs = stereo.encoder(audio.expand(1, 2, -1))[0].t()
    assert torch.allclose(load_encodec(tmp_path).latents(audio), theirs, rtol=0, atol=1e-5)


def test_the_encoder_of_a_musicgen_model_is_used(tiny_model, oracle):
    embedder = encodec_of(tiny_model)
    audio = noise(50 * 640)
    with torch.no_grad():
        theirs = tiny_model.audio_encoder.encoder(audio[None, None])[0].t()
    assert (embedder.latents(audio) - theirs).abs().max() < 2e-6 * theirs.abs().max()
    assert embedder.checkpoint == str(oracle / "tiny_musicgen")
    assert torch.equal(load_encodec(oracle / "tiny_musicgen").embed(audio), embedder.embed(audio))


def test_the_recipe_states_window_weights_and_licence(embedder):
    recipe = embedder.recipe()
    assert recipe["window_s"] == recipe["hop_s"] == 0.5
    assert (recipe["segment_s"], recipe["dtype"], recipe["dim"]) == (30.0, "float32", 8)
    assert len(recipe["weights_digest"]) == 64
    assert recipe["licence"] == {"name": "unknown", "is_non_commercial": None}
    assert load_encodec("demo").recipe()["licence"] == {"name": "apache-2.0", "is_non_commercial": False}


def test_other_weights_change_the_digest_in_the_recipe(tmp_path, embedder):
    save_codec(tmp_path, num_filters=2)
    assert load_encodec(tmp_path).recipe()["weights_digest"] != embedder.recipe()["weights_digest"]


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(1, 80), r"audio must be \(N,\) float32, got \(1, 80\) float32"),
        (torch.zeros(80, dtype=torch.float64), "float64; mix the channels to mono and convert"),
        (torch.zeros(0), "at least one sample"),
        (torch.zeros(HOP - 1), "39 samples, which is less than one frame of 40 samples"),
        (torch.full((80,), float("nan")), "NaN or infinite samples"),
    ],
)
def test_invalid_audio_is_refused(embedder, audio, message):
    with pytest.raises(MetricError, match=message):
        embedder.embed(audio)


def test_nan_latents_are_refused(embedder, monkeypatch):
    latents = torch.zeros(30, 8)
    latents[12, 3] = float("nan")
    monkeypatch.setattr(embedder._encoder, "latents", lambda segments: [latents])
    with pytest.raises(
        MetricError, match=r"1 of 3 windows have NaN or infinite values \(first: the embedding at 0.5 s\)"
    ):
        embedder.embed(noise(30 * HOP))


@pytest.mark.parametrize("changes", [{"normalize": True}, {"chunk_length_s": 1.0, "overlap": 0.01}])
def test_a_codec_that_normalises_or_cuts_the_audio_is_refused(tmp_path, changes):
    save_codec(tmp_path, **changes)
    with pytest.raises(CheckpointError, match="normalises the audio or encodes it in chunks"):
        load_encodec(tmp_path)


def test_another_kind_of_checkpoint_is_refused(tmp_path):
    save_clap(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has type 'clap' and class .* but the type must be 'encodec' or 'musicgen'"
    ):
        load_encodec(tmp_path)


def test_a_window_shorter_than_a_frame_is_refused(folder):
    with pytest.raises(MetricError, match=r"window_s must be at least one frame \(0.05 s\) and finite, got 0.01"):
        load_encodec(folder, window_s=0.01)
