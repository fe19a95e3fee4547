"""The auto embedder is compared with transformers' feature extractors and models, on small random checkpoints."""

import sys

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel, BertConfig, BertModel

from musicgen_eval.errors import CheckpointError, MetricError
from musicgen_eval.models.embedders.auto import load_auto
from tests.support.embedder_checkpoints import (
    edit_json,
    noise,
    save_ast,
    save_clap,
    save_hubert,
    save_wav2vec2,
    save_whisper,
)

WINDOW = 1600
SAVE = {"wav2vec2": save_wav2vec2, "hubert": save_hubert}


@pytest.fixture(scope="module", params=SAVE)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    SAVE[request.param](path)
    return path


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Uses one thread, because the models are too small to benefit from several."""


def load(folder, **settings):
    return load_auto(folder, **{"layer": 2, "window_s": 1.0, **settings})


def their_states(folder, audio) -> tuple[torch.Tensor, ...]:
    """The hidden states of one clip, as computed by transformers' feature extractor and model."""
    extractor, model = AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    features = extractor(audio.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    with torch.no_grad():
        return model(**features, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("num_samples", [WINDOW, WINDOW - 1, 700, 90])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_an_embedding_is_the_mean_of_the_hidden_states_of_transformers_pipeline(folder, layer, num_samples):
    audio = noise(num_samples)
    expected = their_states(folder, audio)[layer][0].mean(0)
    embedding = load(folder, layer=layer).embed(audio)
    assert embedding.shape == (1, 16)
    assert torch.allclose(embedding[0], expected, rtol=0, atol=1e-5)


def test_a_negative_layer_counts_from_the_end(folder):
    embedder = load(folder, layer=-1)
    assert embedder.recipe()["layer"] == embedder.layer == 3
    assert torch.equal(embedder.embed(noise(WINDOW)), load(folder, layer=3).embed(noise(WINDOW)))


def test_a_layer_can_be_named(folder):
    audio = noise(3 * WINDOW)
    named = load(folder, layer="encoder.layers.1")
    assert torch.allclose(named.embed(audio), load(folder, layer=2).embed(audio), rtol=0, atol=1e-6)
    assert (named.dim, named.recipe()["layer"]) == (16, "encoder.layers.1")


def test_a_module_inside_a_layer_can_be_named(folder):
    embedder, audio = load(folder, layer="encoder.layers.1.feed_forward.intermediate_dense"), noise(WINDOW)
    assert (embedder.dim, embedder.embed(audio).shape) == (24, (1, 24))


def test_longer_audio_is_cut_into_windows_and_does_not_depend_on_threads(folder):
    audio = noise(3 * WINDOW + 1000)
    for layer in (1, "encoder.layers.2"):
        embedder = load(folder, layer=layer)
        starts = (0, WINDOW, 2 * WINDOW, 2 * WINDOW + 1000)
        alone = torch.stack([embedder.embed(audio[start : start + WINDOW])[0] for start in starts])
        torch.set_num_threads(3)
        assert torch.equal(embedder.embed(audio), alone)
        torch.set_num_threads(1)


def test_another_transformers_model_of_audio_is_embedded(tmp_path):
    save_ast(tmp_path)
    audio = noise(16000)
    embedder = load_auto(tmp_path, layer=1, window_s=1.0, ignored_keys=["classifier."])
    extractor, model = AutoFeatureExtractor.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        features = extractor(audio.numpy(), sampling_rate=16000, return_tensors="pt")
        expected = model(**features, output_hidden_states=True).hidden_states[1][0].mean(0)
    assert torch.allclose(embedder.embed(audio)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_samples", [16000, 9000])
def test_the_encoder_of_a_model_with_a_decoder_is_used(tmp_path, num_samples):
    model, audio = save_whisper(tmp_path), noise(num_samples)
    embedder = load_auto(tmp_path, layer=1, window_s=1.0)
    with torch.no_grad():
        features = AutoFeatureExtractor.from_pretrained(tmp_path)(
            audio.numpy(), sampling_rate=16000, return_tensors="pt"
        )
        expected = model.get_encoder()(**features, output_hidden_states=True).hidden_states[1][0].mean(0)
    assert torch.allclose(embedder.embed(audio)[0], expected, rtol=0, atol=1e-5)
    assert embedder.recipe()["model"] == "WhisperEncoder"


def test_the_attention_mask_of_the_feature_extractor_is_passed_to_the_model(tmp_path):
    save_wav2vec2(tmp_path, feat_extract_norm="layer", do_stable_layer_norm=True)
    edit_json(tmp_path / "preprocessor_config.json", return_attention_mask=True)
    audio = noise(1000)
    assert "attention_mask" in load(tmp_path).extract_features(audio)
    expected = their_states(tmp_path, audio)[2][0].mean(0)
    assert torch.allclose(load(tmp_path).embed(audio)[0], expected, rtol=0, atol=1e-5)


def test_silence_has_a_finite_embedding(folder):
    assert load(folder).embed(torch.zeros(WINDOW)).isfinite().all()


def test_the_recipe_states_layer_class_and_remote_code(folder):
    recipe = load(folder, name="mert").recipe()
    assert (recipe["embedder"], recipe["layer"], recipe["remote_code"]) == ("mert", 2, False)
    assert recipe["model"] in ("Wav2Vec2Model", "HubertModel")
    assert recipe["pooling"] == "mean over time"


def test_a_clip_shorter_than_the_receptive_field_is_refused(folder):
    with pytest.raises(MetricError, match=r"a clip of 10 samples cannot be processed, probably because it is shorter"):
        load(folder).embed(noise(10))


def test_every_weight_that_is_not_used_is_named(tmp_path):
    save_hubert(tmp_path, with_head=True)
    with pytest.raises(
        CheckpointError,
        match=r"not loaded: 2 not used \(lm_head\.bias, lm_head\.weight\)\. .* or set ignored_keys to",
    ):
        load(tmp_path)
    embedder = load(tmp_path, ignored_keys=["lm_head."])
    assert embedder.recipe()["ignored_keys"] == ["lm_head."]


def test_every_weight_that_is_missing_is_named(tmp_path):
    save_wav2vec2(tmp_path, num_hidden_layers=2)
    edit_json(tmp_path / "config.json", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match="weights were not loaded: 32 missing") as refused:
        load(tmp_path)
    assert all(f"encoder.layers.{i}.attention.q_proj.weight" in str(refused.value) for i in (2, 3))


def test_a_weight_of_another_shape_is_refused(tmp_path):
    save_wav2vec2(tmp_path)
    edit_json(tmp_path / "config.json", intermediate_size=20)
    with pytest.raises(CheckpointError, match="not loaded: 9 of another shape ") as refused:
        load(tmp_path, ignored_keys=["encoder."])
    named = [f"encoder.layers.{i}.feed_forward.intermediate_dense.bias" for i in range(3)]
    assert all(name in str(refused.value) for name in named)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (4, "layer must be from 0 to 3, got 4"),
        (-5, "layer must be from 0 to 3, got -5"),
        ("encoder.layer.1", r"has no layer 'encoder\.layer\.1'; did you mean "),
        ("", "has no layer ''"),
        ("encoder.layers.0.attention.q", "has no layer"),
        ("masked", "has no layer 'masked'"),
    ],
)
def test_an_unknown_layer_is_refused(folder, layer, message):
    with pytest.raises(CheckpointError, match=message):
        load(folder, layer=layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 1.0}, "layer must be a number or the name of a module, got 1.0"),
        ({"layer": True}, "layer must be a number or the name of a module, got True"),
        ({"ignored_keys": "lm_head."}, r"ignored_keys must be a list of prefixes, got 'lm_head\.'"),
        ({"window_s": float("nan")}, "window_s must be at least one sample .* and finite, got nan"),
        ({"hop_s": 0.0}, r"hop_s must be at least one sample \(0\.000625 s\) and finite, got 0"),
    ],
)
def test_an_invalid_setting_is_refused(folder, settings, message):
    with pytest.raises(MetricError, match=message):
        load(folder, **settings)


def test_a_window_shorter_than_the_receptive_field_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"cannot process 0\.01 s of audio .* or a longer window_s"):
        load(folder, window_s=0.01)


def test_a_text_model_is_refused(tmp_path):
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        load(tmp_path)


def test_a_model_that_also_needs_text_is_refused(tmp_path):
    save_clap(tmp_path)
    with pytest.raises(CheckpointError, match="ClapModel cannot process 1 s of audio"):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    save_wav2vec2(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors weights \(pickle files are not loaded"):
        load(tmp_path)


CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class MyConfig(PreTrainedConfig):
    model_type = "my_audio_model"
    hidden_size = 4

class MyModel(PreTrainedModel):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(8, 4)
        self.post_init()

    def forward(self, input_values, output_hidden_states=False, return_dict=True):
        states = self.layer(input_values.unflatten(-1, (-1, 8)))
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,))
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A checkpoint with its own code. Transformers copies the code to a folder of its own, from which Python imports it."""
    cache = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", [str(cache), *sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "mine.py").write_text(CODE)
    sys.path.insert(0, str(tmp_path))
    from mine import MyConfig, MyModel

    folder = tmp_path / "model"
    save_wav2vec2(folder)
    MyModel(MyConfig()).save_pretrained(folder)
    (folder / "mine.py").write_text(CODE)
    edit_json(folder / "config.json", auto_map={"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"})
    yield folder
    del sys.modules["mine"]


def test_code_of_a_checkpoint_is_run_only_if_the_user_trusts_it(own_code):
    with pytest.raises(CheckpointError, match="custom code"):
        load(own_code, layer=0)
    embedder = load(own_code, layer=0, trust_remote_code=True)
    assert embedder.recipe()["remote_code"] is True
    assert embedder.embed(noise(WINDOW)).shape == (1, 4)
    (own_code / "mine.py").write_text(CODE + "\n")
    changed = load(own_code, layer=0, trust_remote_code=True)
    assert changed.recipe()["weights_digest"] != embedder.recipe()["weights_digest"]


def test_trust_has_no_effect_on_a_checkpoint_without_code(folder):
    assert load(folder, trust_remote_code=True).recipe() == load(folder).recipe()


def test_code_of_another_repository_is_refused(own_code):
    edit_json(own_code / "config.json", auto_map={"AutoModel": "other/model--mine.MyModel"})
    with pytest.raises(CheckpointError, match=r"uses code of another repository \(other/model--mine\.MyModel\)"):
        load(own_code, layer=0, trust_remote_code=True)
