"""Checkpoints of embedders are found in folders and in the hub cache, and only safetensors weights are read."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.embedders.clap import load_clap
from musicgen_eval.models.embedders.pretrained import source_of
from musicgen_eval.models.in_memory import copy_model
from tests.support.embedder_checkpoints import noise, save_clap

NAME, COMMIT = "someone/tiny-clap", "a" * 40


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """The folder of a cached hub checkpoint, without a connection to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v1").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    save_clap(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return folder


def test_a_hub_checkpoint_is_loaded_from_the_cache(cached, tmp_path):
    embedder = load_clap(NAME, revision="v1")
    assert (embedder.checkpoint, embedder.revision, embedder.commit) == (NAME, "v1", COMMIT)
    assert embedder.licence.is_non_commercial is True
    assert embedder.recipe()["weights_digest"] is None
    save_clap(tmp_path / "folder")
    assert torch.equal(embedder.embed(noise(1600)), load_clap(tmp_path / "folder").embed(noise(1600)))


def test_a_hub_checkpoint_that_is_not_cached_is_refused(cached):
    with pytest.raises(CheckpointError, match=r"neither on the hub .* nor in the local cache"):
        load_clap("someone/else")


def test_a_hub_checkpoint_without_safetensors_is_refused(cached):
    (cached / "model.safetensors").unlink()
    absent = cached.parent.parent / ".no_exist" / COMMIT
    absent.mkdir(parents=True)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (absent / name).touch()
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is missing; .* set revision to a pull request that adds"
    ):
        load_clap(NAME)


@pytest.mark.parametrize("name", ["clap", "./nowhere/at/all"])
def test_a_name_that_refers_to_nothing_is_refused(name):
    with pytest.raises(
        CheckpointError, match=r"is not an existing folder, or a hub name such as 'laion/clap-htsat-unfused'"
    ):
        load_clap(name)


def test_a_revision_of_a_folder_is_refused(tmp_path):
    save_clap(tmp_path)
    with pytest.raises(CheckpointError, match="is a folder, but revision is 'main'"):
        load_clap(tmp_path, revision="main")


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_pickles_are_never_opened(tmp_path):
    save_clap(tmp_path)
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    load_clap(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors weights \(pickle files are not loaded"):
        load_clap(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_an_index_that_names_a_pickle_is_refused(tmp_path):
    save_clap(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"any": "pytorch_model.bin"}}))
    with pytest.raises(CheckpointError, match=r"names 'pytorch_model\.bin', which is not a \.safetensors file"):
        load_clap(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_configuration_is_refused(tmp_path, content):
    save_clap(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_clap(tmp_path)


def test_a_damaged_weight_file_is_refused(tmp_path):
    save_clap(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_clap(tmp_path)


def test_loading_does_not_change_the_model_when_the_default_dtype_differs(tmp_path):
    save_clap(tmp_path)
    audio = noise(1600)
    expected = load_clap(tmp_path).embed(audio)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(load_clap(tmp_path).embed(audio), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_source_of_a_model_in_memory_has_a_digest_and_no_licence(oracle):
    from transformers import AutoTokenizer, MusicgenForConditionalGeneration

    model = MusicgenForConditionalGeneration.from_pretrained(oracle / "tiny_musicgen")
    checkpoint, _ = copy_model(model, tokenizer=AutoTokenizer.from_pretrained(oracle / "tiny_musicgen"))
    source = source_of(checkpoint)
    assert (source.digest, source.licence.name) == (checkpoint.digest, "unknown")
    assert source_of(checkpoint, licence="mit").licence.is_non_commercial is False
