"""Loading is thread-safe, does not change the process, and refuses weights that do not match the configuration."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.musicgen import load_model


@pytest.fixture
def folder(oracle, tmp_path) -> Path:
    return Path(shutil.copytree(oracle / "tiny_musicgen", tmp_path / "model"))


def equal(one, other) -> bool:
    return all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip([*one.parameters(), *one.buffers()], [*other.parameters(), *other.buffers()], strict=True)
    )


def configure(folder: Path, part: str, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part].update(values)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_threads_that_load_at_the_same_time_all_get_a_complete_model(folder, tiny_model):
    together = threading.Barrier(4)

    def load(_: int):
        together.wait()
        return load_model(folder)

    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, range(4)))
    assert all(equal(model, tiny_model) for model in [*loaded, load_model(folder)])


@pytest.mark.slow
def test_a_failed_load_does_not_affect_other_loads(folder, tiny_model, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])

    def load(path: Path):
        try:
            return load_model(path)
        except CheckpointError:
            return None

    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, [broken, folder, broken, folder]))
    assert (loaded[0], loaded[2]) == (None, None)
    assert all(equal(model, tiny_model) for model in [loaded[1], loaded[3], load_model(folder)])


@pytest.mark.parametrize(
    ("part", "layers", "named"),
    [
        ("decoder", "num_hidden_layers", r"decoder\.model\.decoder\.layers\.1"),
        ("text_encoder", "num_layers", r"text_encoder\.encoder\.block\.1"),
    ],
)
def test_weights_of_layers_that_are_not_in_the_configuration_are_refused(folder, part, layers, named):
    configure(folder, part, **{layers: 1})
    with pytest.raises(CheckpointError, match=rf"describes a smaller model, which would not use .*{named}"):
        load_model(folder)


def test_weights_of_another_shape_are_refused_in_one_line(folder):
    configure(folder, "decoder", ffn_dim=48)
    with pytest.raises(CheckpointError, match=r"some weights do not have the shape given by config\.json") as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_callers_default_dtype_does_not_affect_the_model(folder, tiny_model, dtype):
    torch.set_default_dtype(dtype)
    try:
        model = load_model(folder)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(model, tiny_model)


def test_loading_does_not_change_the_callers_random_state(folder):
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
