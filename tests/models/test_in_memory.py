"""A transformers model in memory is evaluated as if it had been saved and loaded, and is not changed."""

import copy

import pytest
import torch
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from musicgen_eval.api import generate, perplexity
from musicgen_eval.errors import CheckpointError, RunError
from musicgen_eval.models.checkpoint import find_checkpoint
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.runs.fingerprint import weights_digest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]


@pytest.fixture
def folder(oracle):
    return oracle / "tiny_musicgen"


@pytest.fixture(scope="module")
def loaded(oracle) -> MusicgenForConditionalGeneration:
    return MusicgenForConditionalGeneration.from_pretrained(oracle / "tiny_musicgen", dtype=torch.float32)


@pytest.fixture
def model(loaded) -> MusicgenForConditionalGeneration:
    """A copy that the test may change."""
    return copy.deepcopy(loaded)


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(12800, generator=torch.Generator().manual_seed(0)) * 0.1


def ppl(noise, checkpoint, **settings) -> float:
    return perplexity(noise, checkpoint, sample_rate_hz=32000, text="slow pads", **settings).ppl


def moved(model: MusicgenForConditionalGeneration) -> MusicgenForConditionalGeneration:
    """Changes some weights of the model, as training would."""
    with torch.no_grad():
        model.decoder.lm_heads[0].weight[::2] += 0.01  # adding to all of them would not change any probability
    return model


def test_a_model_in_memory_has_the_perplexity_of_its_folder(model, folder, noise):
    result = perplexity(noise, model, sample_rate_hz=32000, text="slow pads")
    assert result.ppl == ppl(noise, folder)
    assert result.evaluation.recipe["checkpoint"].startswith("model in memory (")


def test_changed_weights_are_evaluated(model, folder, noise, tmp_path):
    trained = ppl(noise, moved(model))
    assert trained != ppl(noise, folder)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert trained == ppl(noise, tmp_path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_evaluation_does_not_change_the_model(model, noise, precision):
    model.train().half()
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    ppl(noise, model, precision=precision)
    assert (model.training, model.dtype, model.device.type) == (True, torch.float16, "cpu")
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert [type(module) for module in model.modules()] == kinds
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_forward_hooks_of_the_model_are_not_called(model, noise):
    calls = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    ppl(noise, model)
    assert calls == []


def test_a_model_in_memory_generates_the_codes_of_its_folder(model, folder, noise):
    settings = {"sample_rate_hz": 32000, "duration_s": 0.1, "top_k": 50, "text": "slow pads"}
    codes = [generate(noise, checkpoint=given, **settings).continuations[0].codes for given in (model, folder)]
    assert torch.equal(*codes)


def test_max_frames_can_be_set_for_a_model_in_memory(model, noise):
    assert load_model(model, max_frames=20).spec.max_frames == 20
    assert perplexity(noise, model, sample_rate_hz=32000, max_frames=20).evaluation.counts["windows"] == 1
    with pytest.raises(CheckpointError, match="is allowed for hub names only, not for a model in memory"):
        ppl(noise, model, revision="main")


def test_a_tokenizer_can_be_passed_for_a_model_in_memory(model, folder, noise):
    model.config._name_or_path = ""
    model.name_or_path = ""
    with pytest.raises(
        CheckpointError, match=r"its tokenizer is unknown; pass a tokenizer to load_model\(model, tokenizer="
    ):
        ppl(noise, model)
    loaded = load_model(model, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert ppl(noise, loaded) == ppl(noise, folder)


def test_a_missing_or_invalid_tokenizer_is_refused(model, tmp_path, noise):
    model.name_or_path = str(tmp_path / "gone")
    with pytest.raises(
        CheckpointError, match=r"was loaded from '.*gone', whose tokenizer cannot be loaded: .*tokenizer=\.\.\."
    ):
        ppl(noise, model)
    with pytest.raises(CheckpointError, match="must be a tokenizer or a processor from transformers, got str"):
        load_model(model, tokenizer="facebook/musicgen-small")
    with pytest.raises(CheckpointError, match="tokenizer is allowed for a model in memory only"):
        load_model("demo", tokenizer=AutoTokenizer.from_pretrained(find_checkpoint("demo").location))


def test_weights_on_the_meta_device_are_refused(folder):
    with torch.device("meta"):
        model = MusicgenForConditionalGeneration(find_config(folder))
    with pytest.raises(CheckpointError, match="weights on the meta device"):
        load_model(model)


def find_config(folder):
    return MusicgenForConditionalGeneration.config_class.from_pretrained(folder)


def test_a_run_can_be_resumed_only_with_the_same_model(model, noise, tmp_path):
    first = ppl(noise, model, run_dir=tmp_path / "run")
    assert ppl(noise, model, run_dir=tmp_path / "run") == first
    with pytest.raises(RunError, match=r"contains a different run.*(\n.*)*checkpoint was 'model in memory"):
        ppl(noise, moved(model), run_dir=tmp_path / "run")


def test_the_digest_depends_on_weights_and_tokenizer(model, folder):
    one = load_model(model).checkpoint
    assert (one.name, weights_digest(one)) == (load_model(model).checkpoint.name, one.digest)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["glockenspiel"])
    others = [load_model(model, tokenizer=tokenizer).checkpoint, load_model(moved(model)).checkpoint]
    assert len({one.digest, *(other.digest for other in others)}) == 3


def test_a_model_in_memory_cannot_be_loaded_by_its_recorded_name(model):
    with pytest.raises(
        CheckpointError, match="was a model in memory, which cannot be loaded by name; pass the model in Python"
    ):
        find_checkpoint(load_model(model).checkpoint.name)


@pytest.mark.parametrize("part", ["decoder", "text_encoder"])
def test_a_part_of_a_model_is_refused(model, part, noise):
    with pytest.raises(
        CheckpointError, match=r"checkpoint must be 'demo', .* save it with save_pretrained and pass the folder"
    ):
        ppl(noise, getattr(model, part))
