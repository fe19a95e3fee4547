"""Weights are read only from safetensors files. Pickles in a checkpoint are never opened."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musicgen_eval.cli.main import lightning_main
from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.musicgen import load_model

ROOT = Path(__file__).parent.parent.parent
PLACES = (
    "pytorch_model.bin", "model.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "model.ckpt", "optimizer.pt",
    "training_args.bin", "tokenizer.pkl", "vocab.pkl", "generation_config.pkl", "codes.npy", "text_encoder/pytorch_model.bin",
    "audio_encoder/pytorch_model.bin", "decoder/pytorch_model.bin", "t5/pytorch_model.bin", "encodec/compression_state_dict.bin",
    "state_dict.bin", "compression_state_dict.bin", "adapter_model.bin",
)  # fmt: skip


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def trapped(oracle, tmp_path, monkeypatch) -> Path:
    """A valid checkpoint with many pickles, which create a file when loaded. Opening a pickle with torch raises an error."""
    folder = shutil.copytree(oracle / "tiny_musicgen", tmp_path / "model")
    for place in PLACES:
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(pickle.dumps(Trap(tmp_path / "mark")))

    def opened(*arguments: object, **settings: object) -> None:
        raise AssertionError(f"a pickle was opened: {arguments}")

    monkeypatch.setattr(torch, "load", opened)
    monkeypatch.setattr(torch.serialization, "load", opened)
    return folder


def test_unpickling_the_trap_creates_the_file(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_pickles_in_the_folder_of_valid_weights_are_not_opened(trapped, tmp_path, tiny_model):
    model = load_model(trapped)
    assert not (tmp_path / "mark").exists()
    for one, other in zip(model.state_dict().values(), tiny_model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_complete_run_opens_no_pickle_of_the_checkpoint(trapped, tmp_path, capsys):
    status = lightning_main(
        ["test", f"--model.checkpoint={trapped}", "--data.source=demo", "--data.limit=1", "--data.context_s=1",
         "--data.target_s=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
         f"--run_dir={tmp_path / 'x'}"]
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("other", [None, "nll.safetensors"])
def test_pickled_weights_are_refused_without_being_opened(trapped, tmp_path, other):
    """This also holds if the folder contains a safetensors file other than the weights."""
    (trapped / "model.safetensors").unlink()
    if other is not None:
        save_file({"song": torch.zeros(2)}, trapped / other)
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(trapped)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("part", ["text_encoder", "audio_encoder", "decoder"])
def test_missing_weights_of_a_part_are_not_read_from_pickles(trapped, tmp_path, part):
    weights = load_file(trapped / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{part}.")}
    assert len(kept) < len(weights)
    save_file(kept, trapped / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weights are missing"):
        load_model(trapped)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../outside.safetensors", "decoder/model.safetensors", 3])
def test_an_index_that_names_other_files_is_refused(trapped, tmp_path, shard):
    weights = load_file(trapped / "model.safetensors")
    (trapped / "model.safetensors").rename(trapped / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (trapped / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors\.index\.json names .* not a \.safetensors file in the same folder"
    ):
        load_model(trapped)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", ["no json", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_refused(trapped, content):
    (trapped / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        load_model(trapped)


@pytest.mark.parametrize("weights", ["x.safetensors.index.json", "other.safetensors", "pytorch_model.bin"])
def test_a_configuration_that_names_other_weights_is_refused(trapped, tmp_path, weights):
    config = json.loads((trapped / "config.json").read_text())
    (trapped / "config.json").write_text(json.dumps({**config, "transformers_weights": weights}))
    (trapped / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"any": "pytorch_model.bin"}}))
    with pytest.raises(CheckpointError, match="sets transformers_weights to"):
        load_model(trapped)
    assert not (tmp_path / "mark").exists()


def test_weights_in_several_files_are_read(trapped, tiny_model):
    weights = load_file(trapped / "model.safetensors")
    (trapped / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
    for shard in set(names.values()):
        part = {name: tensor for name, tensor in weights.items() if names[name] == shard}
        save_file(part, trapped / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (trapped / "model.safetensors.index.json").write_text(json.dumps(index))
    for one, other in zip(load_model(trapped).state_dict().values(), tiny_model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_an_adapter_is_refused(trapped):
    (trapped / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    with pytest.raises(CheckpointError, match="is an adapter"):
        load_model(trapped)


def test_custom_code_of_a_checkpoint_is_not_run(trapped, tmp_path):
    """The user is not asked to allow it either."""
    (trapped / "mine.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    for name, entry in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        settings = json.loads((trapped / name).read_text())
        settings["auto_map"] = {entry: ["mine.Mine", None] if entry == "AutoTokenizer" else "mine.Mine"}
        if entry == "AutoConfig":
            settings["model_type"] = "mine"
        (trapped / name).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="custom code"):
        load_model(trapped)
    assert not (tmp_path / "mark").exists()


def test_no_module_of_the_package_opens_pickles():
    """No module imports `pickle` or a similar library, or calls a function that can read pickles."""
    for path in (ROOT / "musicgen_eval").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                roots = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not roots & {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "torch.hub.load"}, path
                refused = [ast.unparse(given.value) for given in node.keywords if given.arg == "allow_pickle"]
                assert refused == (["False"] if called in {"np.load", "numpy.load"} else []), path
                assert "load_from_checkpoint" not in called, path
            if isinstance(node, ast.keyword):
                assert node.arg != "ckpt_path", path
