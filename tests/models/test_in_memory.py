"""A transformers model in memory is evaluated as if it had been saved and loaded, and is not changed."""

import pytest
import torch
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from musicgen_eval.api import generate, perplexity
from musicgen_eval.errors import CheckpointError, RunError
from musicgen_eval.models.checkpoint import find_checkpoint
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.runs.fingerprint import weights_digest


@pytest.fixture
def folder(oracle):
    return oracle / "tiny_musicgen"


@pytest.fixture
def model(folder) -> MusicgenForConditionalGeneration:
    return MusicgenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(12800, generator=torch.Generator().manual_seed(0)) * 0.1


def ppl(noise, checkpoint, **settings) -> float:
    return perplexity(noise, checkpoint, sample_rate_hz=32000, text="slow pads", **settings).ppl


def moved(model: MusicgenForConditionalGeneration) -> MusicgenForConditionalGeneration:
    """The same model after something like a step of training."""
    with torch.no_grad():
        model.decoder.lm_heads[0].weight[::2] += 0.01  # not all of them: that would change no probability
    return model


def test_it_has_the_number_of_its_folder(model, folder, noise):
    result = perplexity(noise, model, sample_rate_hz=32000, text="slow pads")
    assert result.ppl == ppl(noise, folder)
    assert result.evaluation.recipe["checkpoint"].startswith("model in memory (")


def test_what_was_trained_counts(model, folder, noise, tmp_path):
    trained = ppl(noise, moved(model))
    assert trained != ppl(noise, folder)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert trained == ppl(noise, tmp_path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_it_is_not_changed(model, noise, precision):
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


def test_hooks_of_the_caller_do_not_run(model, noise):
    calls = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    ppl(noise, model)
    assert calls == []


def test_it_continues_music_as_its_folder_does(model, folder, noise):
    settings = {"sample_rate_hz": 32000, "duration_s": 0.1, "top_k": 50, "text": "slow pads"}
    codes = [generate(noise, checkpoint=given, **settings).continuations[0].codes for given in (model, folder)]
    assert torch.equal(*codes)


def test_a_limit_can_be_given(model, noise):
    assert load_model(model, max_frames=20).spec.max_frames == 20
    assert perplexity(noise, model, sample_rate_hz=32000, max_frames=20).evaluation.counts["windows"] == 1
    with pytest.raises(CheckpointError, match="goes with a hub name, not with a model in memory"):
        ppl(noise, model, revision="main")


def test_a_tokenizer_can_be_given(model, folder, noise):
    model.config._name_or_path = ""
    model.name_or_path = ""
    with pytest.raises(
        CheckpointError, match=r"does not say where its tokenizer is; pass one to load_model\(model, tokenizer="
    ):
        ppl(noise, model)
    loaded = load_model(model, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert ppl(noise, loaded) == ppl(noise, folder)


def test_a_tokenizer_that_is_gone_or_none_is_refused(model, tmp_path, noise):
    model.name_or_path = str(tmp_path / "gone")
    with pytest.raises(
        CheckpointError, match=r"was loaded from '.*gone', whose tokenizer cannot be taken: .*tokenizer=\.\.\."
    ):
        ppl(noise, model)
    with pytest.raises(CheckpointError, match="must be a tokenizer or a processor of transformers, got str"):
        load_model(model, tokenizer="facebook/musicgen-small")
    with pytest.raises(CheckpointError, match="goes with a model in memory"):
        load_model("demo", tokenizer=AutoTokenizer.from_pretrained(find_checkpoint("demo").location))


def test_weights_that_are_not_in_memory_are_refused(folder):
    with torch.device("meta"):
        model = MusicgenForConditionalGeneration(find_config(folder))
    with pytest.raises(CheckpointError, match="weights that are not in memory"):
        load_model(model)


def find_config(folder):
    return MusicgenForConditionalGeneration.config_class.from_pretrained(folder)


def test_a_run_resumes_with_the_same_model_only(model, noise, tmp_path):
    first = ppl(noise, model, run_dir=tmp_path / "run")
    assert ppl(noise, model, run_dir=tmp_path / "run") == first
    with pytest.raises(RunError, match=r"holds another run.*(\n.*)*checkpoint was 'model in memory"):
        ppl(noise, moved(model), run_dir=tmp_path / "run")


def test_models_are_told_apart_by_weights_and_tokenizer(model, folder):
    one = load_model(model).checkpoint
    assert (one.name, weights_digest(one)) == (load_model(model).checkpoint.name, one.digest)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["glockenspiel"])
    others = [load_model(model, tokenizer=tokenizer).checkpoint, load_model(moved(model)).checkpoint]
    assert len({one.digest, *(other.digest for other in others)}) == 3


def test_a_recorded_name_is_no_checkpoint(model):
    with pytest.raises(
        CheckpointError, match="was a model in memory, which no run can load again; pass the model itself"
    ):
        find_checkpoint(load_model(model).checkpoint.name)


@pytest.mark.parametrize("part", ["decoder", "text_encoder"])
def test_a_part_of_a_model_is_no_checkpoint(model, part, noise):
    with pytest.raises(
        CheckpointError, match=r"checkpoint must be 'demo', .* saved with save_pretrained and given as a folder"
    ):
        ppl(noise, getattr(model, part))
