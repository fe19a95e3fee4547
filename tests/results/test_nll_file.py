"""nll.safetensors, read track by track."""

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from musicgen_eval.errors import RunError
from musicgen_eval.results.nll_file import NllFile


def test_curves_are_those_that_the_library_wrote(tmp_path):
    generator = np.random.default_rng(0)
    curves = {
        name: generator.normal(size=(4, T)).astype(np.float32) for name, T in (("a", 7), ("b/ü", 1), ("empty", 0))
    }
    curves["a"][2, 3:] = np.nan
    save_file(curves, tmp_path / "nll.safetensors", metadata={"made": "here"})
    found = NllFile(tmp_path / "nll.safetensors", remedy="resume it")
    assert found.keys() == curves.keys()
    for track, curve in curves.items():
        assert (found[track].dtype, found[track].shape) == (np.float32, curve.shape)
        assert found[track].tobytes() == curve.tobytes()
    with pytest.raises(KeyError):
        found["c"]


@pytest.mark.parametrize(
    "held",
    [
        save({"a": np.zeros((4, 3))}),
        save({"a": np.zeros((4, 3, 2), np.float32)}),
        save({"a": np.zeros((4, 3), np.float32)})[:-4],
        b"\2" + bytes(7) + b"[]",
        b"\2" + bytes(7) + b"{",
    ],
    ids=["float64", "three dimensions", "cut", "a list", "no json"],
)
def test_another_file_is_refused(tmp_path, held):
    (tmp_path / "nll.safetensors").write_bytes(held)
    with pytest.raises(RunError, match=r"nll\.safetensors cannot be read or is damaged \(.*\); resume it"):
        NllFile(tmp_path / "nll.safetensors", remedy="resume it")["a"]


def test_a_file_that_is_cut_later_is_named(tmp_path):
    path = tmp_path / "nll.safetensors"
    save_file({"a": np.zeros((4, 3), np.float32)}, path)
    found = NllFile(path, remedy="resume it")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunError, match="is damaged"):
        found["a"]
