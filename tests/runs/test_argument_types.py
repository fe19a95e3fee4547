"""A wrong argument from Python is one line of the package's own, which names it."""

import copy
import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from musicgen_eval.api import generate, perplexity
from musicgen_eval.errors import CheckpointError, EvaluationError, RunError
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.runs.argument_types import check_arguments, checked_arguments
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation

AUDIO = torch.zeros(32000) + 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perplexity(AUDIO, sample_rate_hz=32000.0), r"sample_rate_hz must be a whole number or None, got 32000\.0"),
        (lambda: perplexity("demo", text=["a", "b"]), r"text must be a string or None, got \['a', 'b'\] \(list\); a manifest"),
        (lambda: perplexity("demo", text=float("nan")), r"text must be a string or None, got nan \(float\)"),
        (lambda: perplexity("demo", text="\udcc3 techno"), r"text must be valid text, got .* byte that is none at position 0"),
        (lambda: perplexity("demo", context_s="1"), r"context_s must be a finite number or None, got '1' \(str\)"),
        (lambda: perplexity("demo", target_s=float("inf")), r"target_s must be a finite number or None, got inf"),
        (lambda: perplexity("demo", batch_size=8.0), r"batch_size must be a whole number, got 8\.0"),
        (lambda: perplexity("demo", limit=True), r"limit must be a whole number or None, got True \(bool\)"),
        (lambda: perplexity("demo", head="skipped"), r"head must be one of score, skip, got 'skipped'"),
        (lambda: perplexity("demo", allow_beyond_limit="no"), r"allow_beyond_limit must be True or False, got 'no'"),
        (lambda: perplexity("demo", precision=32), r"precision must be one of 32-true, .*, got 32 \(int\)"),
        (lambda: perplexity("demo", run_dir=3), r"run_dir must be a string or a path or None, got 3"),
        (lambda: perplexity("demo", metrics=[]), r"metrics must be a mapping or None, got \[\] \(list\)"),
        (lambda: perplexity("demo", torch.nn.Linear(1, 1)), r"checkpoint must be 'demo', .* got Linear"),
        (lambda: perplexity(np.zeros(9)), r"audio must be a path, a list of paths or a torch tensor, got ndarray"),
        (lambda: generate("demo", text=AUDIO), r"text must be a string or None, got Tensor of shape \(32000,\)"),
        (lambda: generate("demo", seed=1.5), r"seed must be a whole number, got 1\.5"),
        (lambda: generate("demo", temperature=float("nan")), r"temperature must be a finite number, got nan"),
        (lambda: generate("demo", format="aiff"), r"format must be one of flac, wav, mp3, got 'aiff'"),
        (lambda: MusicGenEvaluation(max_frames="500"), r"max_frames must be a whole number or None, got '500'"),
        (lambda: MusicGenEvaluation(tail="all"), r"tail must be one of score, drop, got 'all'"),
        (lambda: MusicGenEvaluation(continuation={}), r"continuation must be ContinuationSettings, got dict"),
        (lambda: WindowDataModule(batch_size="8"), r"batch_size must be a whole number, got '8'"),
        (lambda: load_model("demo", max_frames="500"), r"max_frames must be a whole number of at least 1, got '500'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_in_one_line(call, message):
    with pytest.raises(EvaluationError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def declared(
    count: int, length_s: float | None = None, *, name: str = "", path: str | Path = "", kind: Literal["a", "b"] = "a",
    flag: bool = False, audio: torch.Tensor | None = None,
) -> int:  # fmt: skip
    """Some types."""
    return count


def test_numbers_of_numpy_and_whole_seconds_are_as_good():
    checked = checked_arguments(declared)
    assert checked(np.int64(3), 2, name="x", path=Path("x"), flag=np.True_, kind="b", audio="unchecked") == 3
    assert checked(4, np.float32(0.5)) == 4


def test_arguments_that_python_itself_refuses_are_left_to_it():
    with pytest.raises(TypeError, match=r"declared\(\) got an unexpected keyword argument 'bogus'"):
        checked_arguments(declared)(1, bogus=2)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        checked_arguments(declared)()


def test_a_long_value_is_cut_and_names_can_be_left_out():
    with pytest.raises(RunError, match=r"count must be a whole number, got 'x{59}\.\.\. \(str\)$"):
        check_arguments(declared, {"count": "x" * 1000, "unknown": 3})
    check_arguments(declared, {"count": "x"}, without=("count",))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_loaded_model_that_cannot_be_copied_says_so(oracle, duplicate):
    model = load_model(oracle / "tiny_musicgen")
    with pytest.raises(CheckpointError, match="can be neither copied nor pickled; call load_model again"):
        duplicate(model)
    model.prepare("32-true")
    with pytest.raises(CheckpointError, match="can be neither copied nor pickled"):
        duplicate(model)
