"""Functions take their settings from settings classes, and a wrong argument is an error of one line that names it."""

import copy
import inspect
import pickle
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch

from musicgen_eval.api import generate, perplexity
from musicgen_eval.cli.commands import evaluate_command, generate_command
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.errors import CheckpointError, EvaluationError, RunError
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.records.settings import Settings, field_types, help_texts
from musicgen_eval.records.signatures import takes_settings
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.settings import AudioSettings, LengthSettings, ModelSettings, RunSettings

AUDIO = torch.zeros(32000) + 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perplexity(AUDIO, sample_rate_hz=32000.0), r"sample_rate_hz must be a whole number or None, got 32000\.0"),
        (lambda: perplexity("demo", text=["a", "b"]), r"text must be a string or None, got \['a', 'b'\] \(list\); .* a manifest"),
        (lambda: perplexity("demo", text=float("nan")), r"text must be a string or None, got nan \(float\)"),
        (lambda: perplexity("demo", text="\udcc3 techno"), r"text cannot be decoded: .* an undecodable byte at position 0"),
        (lambda: perplexity("demo", context_s="1"), r"context_s must be a finite number or None, got '1' \(str\)"),
        (lambda: perplexity("demo", target_s=float("inf")), r"target_s must be a finite number or None, got inf"),
        (lambda: perplexity("demo", batch_size=8.0), r"batch_size must be a whole number, got 8\.0"),
        (lambda: perplexity("demo", limit=True), r"limit must be a whole number or None, got True \(bool\)"),
        (lambda: perplexity("demo", head="skipped"), r"head must be one of score, skip, got 'skipped'"),
        (lambda: perplexity("demo", allow_beyond_limit="no"), r"allow_beyond_limit must be True or False, got 'no'"),
        (lambda: perplexity("demo", precision=32), r"precision must be one of 32-true, .*, got 32 \(int\)"),
        (lambda: perplexity("demo", run_dir=3), r"run_dir must be a string or a path or None, got 3"),
        (lambda: perplexity("demo", run_dir=""), r"run_dir is an empty string; specify a folder, or remove run_dir"),
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
        (lambda: load_model("demo", max_frames="500"), r"max_frames must be a positive whole number, got '500'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_in_one_line(call, message):
    with pytest.raises(EvaluationError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


@dataclass(frozen=True, kw_only=True)
class ToneSettings(Settings):
    """Settings of a tone.

    Attributes:
        pitch_hz: Frequency of the tone.
        shape: Waveform.
    """

    pitch_hz: float = 440.0
    shape: Literal["sine", "square"] = "sine"


@dataclass(frozen=True, kw_only=True)
class LoudToneSettings(ToneSettings):
    """Settings of a loud tone.

    Attributes:
        gain_db: Gain of
            the tone.
    """

    gain_db: int = 6


@takes_settings(positional=("path", "gain_db"), without=("shape",))
def play(path: str, tone: LoudToneSettings, *, times: int = 1) -> tuple[str, LoudToneSettings, int]:
    """Plays a tone.

    Args:
        path: File of the tone.
        times: Number of repetitions.

    Returns:
        All arguments.
    """
    return path, tone, times


def test_a_function_takes_the_fields_of_a_settings_class():
    expected = "(path: str, gain_db: int = 6, *, pitch_hz: float = 440.0, times: int = 1)"
    assert str(inspect.signature(play)).startswith(expected)
    assert play("x", 3, pitch_hz=220.0) == ("x", LoudToneSettings(gain_db=3, pitch_hz=220.0), 1)
    assert play(path="x", times=2) == ("x", LoudToneSettings(), 2)


def test_the_docstring_describes_the_fields_in_the_order_of_the_signature():
    described = (
        "Args:\n"
        "    path: File of the tone.\n"
        "    gain_db: Gain of the tone.\n"
        "    pitch_hz: Frequency of the tone.\n"
        "    times: Number of repetitions.\n"
        "\n"
        "Returns:\n"
    )
    assert described in play.__doc__


def test_values_of_fields_and_arguments_are_checked():
    with pytest.raises(RunError, match=r"gain_db must be a whole number, got 1\.5"):
        play("x", gain_db=1.5)
    with pytest.raises(RunError, match="times must be a whole number, got '2'"):
        play("x", times="2")


@pytest.mark.parametrize("arguments", [{"shape": "square"}, {"bogus": 2}])
def test_unknown_arguments_raise_a_type_error(arguments):
    with pytest.raises(TypeError, match=rf"play\(\) got an unexpected keyword argument '{next(iter(arguments))}'"):
        play("x", **arguments)


def test_an_unknown_argument_is_named_with_similar_ones():
    with pytest.raises(TypeError, match=r"^WindowDataModule\(\) got .* 'contextt_s'; did you mean context_s\?"):
        WindowDataModule(contextt_s=3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("make", [lambda: WindowDataModule(limit=3), lambda: MusicGenEvaluation(seed=3)])
def test_modules_can_be_copied_and_pickled(make, duplicate):
    module = make()
    assert duplicate(module).settings == module.settings


def test_a_subclass_of_the_data_module_takes_the_same_settings():
    class Mine(WindowDataModule):
        """A data module of a user."""

    assert Mine("x", limit=2).settings == WindowDataModule("x", limit=2).settings


def test_a_loaded_model_takes_no_settings_of_loading(oracle):
    with pytest.raises(RunError, match="model must be a model from load_model, got int"):
        MusicGenEvaluation.from_loaded(3)
    with pytest.raises(RunError, match="max_frames is set when a model is loaded; pass it to load_model"):
        MusicGenEvaluation.from_loaded(load_model(oracle / "tiny_musicgen"), max_frames=100)


@pytest.mark.parametrize("name", ["pitch", "times", "path"])
def test_a_function_cannot_leave_out_a_name_that_is_not_a_setting(name):
    with pytest.raises(TypeError, match=rf"without contains '{name}', which is not a setting of .*play_quietly\(\)"):

        @takes_settings(without=("shape", name))
        def play_quietly(path: str, tone: ToneSettings, *, times: int = 1) -> None: ...


def test_missing_arguments_raise_a_type_error():
    with pytest.raises(TypeError, match=r"play\(\) missing a required argument: 'path'"):
        play()


def test_a_function_of_one_task_describes_that_task_and_takes_no_settings_of_the_other():
    assert help_texts(DataSettings, "score")["context_s"].startswith("Length of the context before each target")
    assert help_texts(DataSettings, "continue")["context_s"].startswith(
        "Time in the track at which the continuation starts"
    )
    for name in ("context_s", "target_s"):
        for task in ("score", "continue"):
            text = help_texts(DataSettings, task)[name]
            assert re.search(r", in seconds\. Defaults to [^.]+\.$", text)
            assert "When" not in text
    assert "When" not in perplexity.__doc__ + generate.__doc__
    scoring_only = {"head", "tail", "save_nll", "allow_beyond_limit"}
    assert not scoring_only & inspect.signature(generate).parameters.keys()
    assert scoring_only <= inspect.signature(evaluate_command).parameters.keys()


@pytest.mark.parametrize(
    "settings", [DataSettings, ModelSettings, ContinuationSettings, RunSettings, AudioSettings, LengthSettings]
)
def test_every_setting_has_a_help_text(settings):
    assert help_texts(settings).keys() == field_types(settings).keys()
    for text in help_texts(settings).values():
        assert text[0].isupper() or text[0] == "`"
        assert text.endswith(".")


def test_every_setting_is_declared_once():
    owners = [DataSettings, ModelSettings, ContinuationSettings, RunSettings, AudioSettings, LengthSettings]
    names = [name for settings in owners for name in field_types(settings)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("function", "own"),
    [
        (perplexity, {"audio", "checkpoint", "sample_rate_hz", "metrics"}),
        (generate, {"audio", "checkpoint", "sample_rate_hz", "metrics"}),
        (evaluate_command, {"audio"}),
        (generate_command, {"audio"}),
        (MusicGenEvaluation.__init__, {"self", "metrics", "continuation"}),
        (WindowDataModule.__init__, {"self"}),
    ],
)
def test_functions_and_commands_take_types_and_defaults_from_the_settings(function, own):
    owners = [DataSettings, ModelSettings, ContinuationSettings, RunSettings, AudioSettings, LengthSettings]
    declared = {name: (kind, owner) for owner in owners for name, kind in field_types(owner).items()}
    parameters = inspect.signature(function).parameters
    assert parameters.keys() >= own
    for name in parameters.keys() - own:
        kind, owner = declared[name]
        assert (parameters[name].annotation, parameters[name].default) == (kind, getattr(owner(), name))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_loaded_model_that_cannot_be_copied_says_so(oracle, duplicate):
    model = load_model(oracle / "tiny_musicgen")
    with pytest.raises(CheckpointError, match="can be neither copied nor pickled; call load_model again"):
        duplicate(model)
    model.prepare("32-true")
    with pytest.raises(CheckpointError, match="can be neither copied nor pickled"):
        duplicate(model)
