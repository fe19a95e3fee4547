"""Settings are checked when they are made, and tell which of them determine the numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from musicgen_eval.data.settings import DataSettings
from musicgen_eval.errors import RunError
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.records.settings import NOT_IN_RECIPE, SCORING_ONLY, Settings, check_types
from musicgen_eval.runs.settings import LengthSettings, ModelSettings


@dataclass(frozen=True, kw_only=True)
class Example(Settings):
    """Settings of every type."""

    count: int = 1
    length_s: float | None = None
    name: str = field(default="", metadata=NOT_IN_RECIPE)
    path: str | Path = field(default="", metadata=NOT_IN_RECIPE)
    kind: Literal["a", "b"] = field(default="a", metadata=SCORING_ONLY)
    flag: bool = False
    names: Mapping[str, int] | None = None
    audio: torch.Tensor | None = None


def test_numbers_of_numpy_and_unchecked_types_are_accepted():
    assert (
        Example(count=np.int64(3), length_s=np.float32(0.5), flag=np.True_, path=Path("x"), audio="unchecked").count
        == 3
    )
    assert Example(length_s=2).length_s == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 1.0}, r"count must be a whole number, got 1\.0 \(float\)"),
        ({"count": True}, r"count must be a whole number, got True \(bool\)"),
        ({"length_s": "1"}, r"length_s must be a finite number or None, got '1' \(str\)"),
        ({"length_s": float("nan")}, r"length_s must be a finite number or None, got nan \(float\)"),
        ({"kind": "c"}, r"kind must be one of a, b, got 'c' \(str\)"),
        ({"flag": "no"}, r"flag must be True or False, got 'no' \(str\)"),
        ({"path": 3}, r"path must be a string or a path, got 3 \(int\)"),
        ({"names": [1]}, r"names must be a mapping or None, got \[1\] \(list\)"),
        ({"name": np.zeros((2, 3))}, r"name must be a string, got ndarray of shape \(2, 3\)"),
        ({"count": "x" * 1000}, r"count must be a whole number, got 'x{59}\.\.\. \(str\)"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_setting(wrong, message):
    with pytest.raises(RunError, match=f"^{message}$"):
        Example(**wrong)


def test_names_that_are_not_declared_are_not_checked():
    check_types({"count": int}, {"other": "x"})


def test_the_recipe_holds_the_settings_that_determine_the_numbers_of_a_task():
    example = Example(name="x", kind="b")
    assert example.recipe("score") == {
        "count": 1, "length_s": None, "kind": "b", "flag": False, "names": None, "audio": None,
    }  # fmt: skip
    assert "kind" not in example.recipe("continue")


def test_predict_refuses_settings_that_it_would_ignore():
    Example(name="x", kind="a").refuse_scoring_only("example")
    with pytest.raises(RunError, match=r"example\.kind does not apply to predict; remove it"):
        Example(kind="b").refuse_scoring_only("example")


def test_settings_outside_of_the_recipe_are_named_here():
    """A setting that can change a number must not be in this list. Its resolved value is in the recipe, or it changes no number."""
    left_out = {
        f"{group}.{name}"
        for group, settings in {
            "data": DataSettings(),
            "model": ModelSettings(),
            "continuation": ContinuationSettings(),
        }.items()
        for name in vars(settings).keys() - settings.recipe("score").keys()
    }
    assert left_out == {
        "data.source", "data.num_workers", "data.max_failures",
        "model.checkpoint", "model.revision", "model.max_frames", "model.save_nll",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataSettings("x", batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: DataSettings("x", limit=0), "limit must be at least 1, got 0"),
        (lambda: DataSettings("x", num_workers=-1), "num_workers must be at least 0, got -1"),
        (lambda: DataSettings("x", min_duration_s=-0.5), r"min_duration_s must be at least 0, got -0\.5"),
        (lambda: DataSettings("x", target_s=0.0), r"target_s must be above 0, got 0\.0"),
        (lambda: LengthSettings(duration_s=-1.0), r"duration_s must be above 0, got -1\.0"),
        (lambda: ContinuationSettings(stride_s=0.0), r"stride_s must be above 0, got 0\.0"),
        (lambda: DataSettings("x", max_failures=-1), "max_failures must be at least 0, got -1"),
        (
            lambda: ContinuationSettings(temperature=-1.0),
            r"temperature must be finite and at least 0, got -1\.0",
        ),
        (lambda: ContinuationSettings(top_p=0.0), r"top_p must be above 0 and at most 1, got 0\.0"),
        (lambda: ContinuationSettings(guidance_scale=0.5), r"guidance_scale must be at least 1"),
        (lambda: ContinuationSettings(num_continuations=0), "num_continuations must be at least 1, got 0"),
        (lambda: ContinuationSettings(threads=0), "threads must be at least 1, got 0"),
        (lambda: ContinuationSettings(threads=10_000), "threads must be at most 1024, got 10000"),
        (lambda: ContinuationSettings(temperature=0.0, num_continuations=2), "at temperature 0 all continuations"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(RunError, match=message):
        make()
