"""The AST embedder is compared with transformers' feature extractor and model, on small random checkpoints."""

import pytest
import torch
from transformers import ASTFeatureExtractor, ASTForAudioClassification, pipeline

from musicgen_eval.errors import CheckpointError, MetricError
from musicgen_eval.models.embedders.ast import load_ast
from tests.support.embedder_checkpoints import edit_json, noise, save_ast, save_clap, save_wav2vec2

WINDOW = 16000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ast")
    save_ast(path)
    return path


@pytest.fixture
def embedder(folder, one_thread):
    return load_ast(folder)


def their_outputs(folder, audio) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding and the logits of one clip, as computed by transformers' feature extractor and model."""
    extractor = ASTFeatureExtractor.from_pretrained(folder)
    model = ASTForAudioClassification.from_pretrained(folder).eval()
    features = extractor(audio.numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        return model.audio_spectrogram_transformer(**features).pooler_output[0], model(**features).logits[0]


@pytest.mark.parametrize("num_samples", [WINDOW, WINDOW - 1, 9000, 400])
def test_a_clip_of_at_most_one_window_has_the_outputs_of_transformers_pipeline(embedder, folder, num_samples):
    audio = noise(num_samples)
    embedding, logits = their_outputs(folder, audio)
    assert (embedder.embed(audio).shape, embedder.logits(audio).shape) == ((1, 16), (1, 7))
    assert torch.allclose(embedder.embed(audio)[0], embedding, rtol=0, atol=1e-5)
    assert torch.allclose(embedder.logits(audio)[0], logits, rtol=0, atol=1e-5)


def test_probabilities_equal_those_of_the_classification_pipeline(embedder, folder):
    audio = noise(WINDOW)
    classify = pipeline("audio-classification", model=str(folder))
    theirs = {entry["label"]: entry["score"] for entry in classify(audio.numpy(), top_k=None)}
    ours = dict(zip(embedder.labels, embedder.probabilities(audio)[0].tolist(), strict=True))
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("problem_type", "activation", "expected"),
    [
        (None, None, "softmax"),
        ("single_label_classification", None, "softmax"),
        ("multi_label_classification", None, "sigmoid"),
        ("multi_label_classification", "softmax", "softmax"),
        (None, "sigmoid", "sigmoid"),
    ],
)
def test_the_problem_type_determines_the_activation(tmp_path, problem_type, activation, expected):
    save_ast(tmp_path, problem_type=problem_type)
    embedder, audio = load_ast(tmp_path, activation=activation), noise(2 * WINDOW)
    logits = embedder.logits(audio)
    probabilities = logits.sigmoid() if expected == "sigmoid" else logits.softmax(-1)
    assert torch.allclose(embedder.probabilities(audio), probabilities)
    assert embedder.recipe()["activation"] == embedder.activation == expected
    if expected == "softmax":
        assert torch.allclose(embedder.probabilities(audio).sum(1), torch.ones(2))


def test_a_regression_is_refused(tmp_path):
    save_ast(tmp_path, problem_type="regression")
    with pytest.raises(CheckpointError, match="got 'regression'; set activation to"):
        load_ast(tmp_path)
    assert load_ast(tmp_path, activation="sigmoid").activation == "sigmoid"


def test_the_window_is_the_largest_whole_number_of_seconds(embedder, folder):
    assert (embedder.window_s, embedder.hop_s, embedder.sample_rate_hz, embedder.dim) == (1.0, 1.0, 16000, 16)
    assert load_ast(folder, hop_s=0.5).hop_s == 0.5


def test_longer_audio_is_cut_into_windows(embedder):
    audio = noise(2 * WINDOW + 9000)
    alone = [embedder.embed(audio[start : start + WINDOW])[0] for start in (0, WINDOW, WINDOW + 9000)]
    assert torch.equal(embedder.embed(audio), torch.stack(alone))


def test_results_do_not_depend_on_threads(embedder):
    audio = noise(3 * WINDOW)
    embeddings, logits = embedder.embed(audio), embedder.logits(audio)
    torch.set_num_threads(3)
    assert torch.equal(embedder.embed(audio), embeddings)
    assert torch.equal(embedder.logits(audio), logits)


def test_silence_has_finite_outputs(embedder):
    silence = torch.zeros(WINDOW)
    assert embedder.embed(silence).isfinite().all()
    assert embedder.probabilities(silence).isfinite().all()


def test_a_clip_shorter_than_a_frame_is_refused(embedder):
    for compute in (embedder.embed, embedder.probabilities):
        with pytest.raises(MetricError, match="399 samples, which is less than one frame of 400 samples"):
            compute(noise(399))


def test_invalid_audio_is_refused(embedder):
    with pytest.raises(MetricError, match=r"audio must be \(N,\) float32"):
        embedder.probabilities(noise(WINDOW)[None])


@pytest.mark.parametrize("save", [save_clap, save_wav2vec2])
def test_another_kind_of_checkpoint_is_refused(tmp_path, save):
    save(tmp_path)
    with pytest.raises(CheckpointError, match=r"has type .* but the type must be 'audio-spectrogram-transformer'"):
        load_ast(tmp_path)


def test_a_checkpoint_without_a_classifier_is_refused(tmp_path):
    save_ast(tmp_path).audio_spectrogram_transformer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"4 missing \(classifier\.dense\.bias, classifier\.dense\.weight, "):
        load_ast(tmp_path)


def test_an_extractor_that_does_not_match_the_model_is_refused(tmp_path):
    save_ast(tmp_path)
    edit_json(tmp_path / "preprocessor_config.json", max_length=100)
    with pytest.raises(CheckpointError, match=r"max_length must be the same in .* got 110 and 100"):
        load_ast(tmp_path)


def test_nan_logits_are_refused(tmp_path):
    model = save_ast(tmp_path)
    with torch.no_grad():
        model.classifier.dense.bias[2] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(MetricError, match=r"1 of 1 windows have NaN or infinite values \(first: the logits at 0 s\)"):
        load_ast(tmp_path).probabilities(noise(WINDOW))
