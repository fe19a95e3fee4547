"""The CLAP embedder is compared with transformers' processor and model, on small random checkpoints."""

import numpy as np
import pytest
import torch
from transformers import ClapModel, ClapProcessor

from musicgen_eval.errors import CheckpointError, MetricError
from musicgen_eval.models.embedders.clap import UNRELATED_TEXTS, load_clap
from tests.support.embedder_checkpoints import edit_json, noise, save_ast, save_clap, save_codec

WINDOW = 1600
TEXT = "calm piano music"


@pytest.fixture(scope="module", params=[False, True], ids=["unfused", "fused"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("clap")
    save_clap(path, fused=request.param)
    return path


@pytest.fixture
def embedder(folder, one_thread):
    return load_clap(folder)


def their_embedding(folder, **inputs) -> torch.Tensor:
    """The embedding of one clip or text, as computed by transformers' processor and model."""
    processor, model = ClapProcessor.from_pretrained(folder), ClapModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if "text" in inputs:
            return model.get_text_features(**processor(**inputs, return_tensors="pt", padding=True)).pooler_output[0]
        features = processor(**inputs, sampling_rate=1600, return_tensors="pt")
        return model.get_audio_features(**features).pooler_output[0]


@pytest.mark.parametrize("num_samples", [WINDOW, WINDOW - 1, 1000, 700, 64, 1])
def test_a_clip_of_at_most_one_window_has_the_embedding_of_transformers_pipeline(embedder, folder, num_samples):
    audio = noise(num_samples)
    theirs = their_embedding(folder, audio=audio.numpy())
    ours = embedder.embed(audio)
    assert (ours.shape, ours.dtype) == ((1, 12), torch.float32)
    assert torch.allclose(ours[0], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", [TEXT, *UNRELATED_TEXTS])
def test_a_text_has_the_embedding_of_transformers_pipeline(embedder, folder, text):
    ours = embedder.embed_text(text)
    assert torch.allclose(ours, their_embedding(folder, text=[text]), rtol=0, atol=1e-6)
    assert float(ours.norm()) == pytest.approx(1)


def test_different_audio_has_different_embeddings_of_length_1(embedder):
    embeddings = torch.cat([embedder.embed(noise(WINDOW, seed=seed) * gain) for seed, gain in ((0, 1), (1, 0.01))])
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2))
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3


def test_longer_audio_is_cut_into_windows_without_random_crops(embedder):
    audio = noise(4 * WINDOW + 900)
    embeddings = embedder.embed(audio)
    starts = [0, WINDOW, 2 * WINDOW, 3 * WINDOW, 3 * WINDOW + 900]
    alone = [embedder.embed(audio[start : start + WINDOW])[0] for start in starts]
    assert torch.equal(embeddings, torch.stack(alone))
    np.random.seed(3)  # noqa: NPY002 - the feature extractor crops with numpy's global generator
    assert torch.equal(embedder.embed(audio), embeddings)


def test_the_hop_can_be_shorter_than_the_window(folder):
    embedder, audio = load_clap(folder, hop_s=0.5), noise(2 * WINDOW)
    assert (embedder.window_s, embedder.hop_s) == (1.0, 0.5)
    alone = [load_clap(folder).embed(audio[start : start + WINDOW])[0] for start in (0, 800, 1600)]
    assert torch.equal(embedder.embed(audio), torch.stack(alone))


def test_the_random_states_of_the_caller_are_not_changed(folder):
    _, keys, *position = np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    load_clap(folder).embed(noise(3 * WINDOW))
    _, keys_after, *position_after = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(keys_after, keys)
    assert position_after == position
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_embeddings_do_not_depend_on_threads_autocast_or_default_dtype(embedder):
    audio = noise(4 * WINDOW)
    alone, text = embedder.embed(audio), embedder.embed_text(TEXT)
    torch.set_num_threads(3)
    assert torch.equal(embedder.embed(audio), alone)
    assert torch.equal(embedder.embed_text(TEXT), text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedder.embed(audio), alone)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(embedder.embed(audio), alone)
    finally:
        torch.set_default_dtype(torch.float32)


def test_silence_has_a_finite_embedding(embedder):
    assert embedder.embed(torch.zeros(WINDOW)).isfinite().all()


def test_a_long_text_is_truncated_to_77_tokens(embedder):
    long = "piano " * 40
    assert (embedder.is_truncated(long), embedder.is_truncated(TEXT)) == (True, False)
    assert torch.equal(embedder.embed_text(long), embedder.embed_text(long[:75]))
    assert not torch.equal(embedder.embed_text(long), embedder.embed_text(long[:74]))


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_blank_text_is_refused(embedder, text):
    with pytest.raises(MetricError, match="the text is blank"):
        embedder.embed_text(text)


def test_the_recipe_states_everything_that_determines_the_embeddings(embedder, folder):
    recipe = embedder.recipe()
    assert (recipe["embedder"], recipe["checkpoint"], recipe["sample_rate_hz"]) == ("clap", str(folder), 1600)
    assert (recipe["window_s"], recipe["hop_s"], recipe["dim"], recipe["max_text_tokens"]) == (1.0, 1.0, 12, 77)
    assert recipe["short_clips"] == "repeatpad"
    assert len(recipe["weights_digest"]) == 64


def test_a_checkpoint_whose_texts_all_have_the_same_embedding_is_refused(tmp_path):
    save_clap(tmp_path, distinct_texts=False)
    with pytest.raises(
        CheckpointError,
        match=r"6 unrelated texts have a mean cosine similarity of 0\.9\d+, but it must be at most 0\.8\. .* converted incorrectly",
    ):
        load_clap(tmp_path)


def test_the_similarity_of_unrelated_texts_is_the_mean_over_pairs(embedder):
    texts = [embedder.embed_text(text).double() for text in UNRELATED_TEXTS]
    pairs = [float(a @ b) for i, a in enumerate(texts) for b in texts[:i]]
    assert embedder.unrelated_cosine == pytest.approx(sum(pairs) / len(pairs))
    assert embedder.unrelated_cosine < 0.8


@pytest.mark.parametrize("save", [save_ast, save_codec])
def test_another_kind_of_checkpoint_is_refused(tmp_path, save):
    save(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has type .* but the type must be 'clap'; choose a checkpoint such as laion/"
    ):
        load_clap(tmp_path)


def test_an_extractor_that_does_not_match_the_model_is_refused(tmp_path):
    save_clap(tmp_path)
    edit_json(tmp_path / "preprocessor_config.json", truncation="fusion")
    with pytest.raises(CheckpointError, match=r"enable_fusion is False .* must be 'rand_trunc' .* got 'fusion'"):
        load_clap(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("preprocessor_config.json", r"has no preprocessor_config\.json"),
        ("tokenizer*", r"has no tokenizer\.json"),
        ("model.safetensors", r"no \.safetensors weights"),
        ("config.json", r"has no config\.json"),
    ],
)
def test_a_missing_file_is_named(tmp_path, pattern, message):
    save_clap(tmp_path)
    for path in tmp_path.glob(pattern):
        path.unlink()
    with pytest.raises(CheckpointError, match=message):
        load_clap(tmp_path)


def test_nan_embeddings_are_refused(tmp_path):
    model = save_clap(tmp_path)
    with torch.no_grad():
        model.audio_projection.linear2.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(MetricError, match=r"2 of 2 windows have NaN or infinite values .* check the weights"):
        load_clap(tmp_path).embed(noise(2 * WINDOW))
