"""Messages of the installed jsonargparse are recognised and shortened. A failure here means that its wording has changed."""

from dataclasses import fields
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from torchmetrics import Metric

from musicgen_eval.cli import parser_messages
from musicgen_eval.cli.commands import parse_command
from musicgen_eval.cli.parser_messages import (
    INSTALLED_METRIC,
    METRIC_ENTRY,
    RENAMING_CLASS,
    one_line,
    unknown_option,
    unknown_setting,
)
from musicgen_eval.metrics.plugin.contract import InstalledMetric, MetricEntry


class Model:
    """A class with metrics, as LightningCLI parses it."""

    def __init__(
        self,
        metrics: dict[str, Metric | MetricEntry | InstalledMetric] | None = None,
        seed: int = 0,
        tail: Literal["score", "drop"] = "score",
    ) -> None:
        self.metrics = metrics


def message_of(arguments: list[str]) -> str:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Model, "model")
    with pytest.raises(ArgumentError) as refused:
        parser.parse_args(arguments)
    return str(refused.value)


def metric(**entry: Any) -> list[str]:
    return [f"--model.metrics={{'m': {entry}}}"]


@pytest.mark.parametrize(
    ("arguments", "explained_by", "expected"),
    [
        (["--model.seed=x"], "_wrong_value", "model.seed: expected int, got 'x'"),
        (["--model.tail=keep"], "_wrong_value", "model.tail: expected one of 'score', 'drop', got 'keep'"),
        (metric(class_path="musicgen_eval.metrics.CodebookPerplexty"), "_unknown_metric",
         "unknown metric class 'musicgen_eval.metrics.CodebookPerplexty' in model.metrics; did you mean "
         "musicgen_eval.metrics.CodebookPerplexity"),
        (metric(class_path="musicgen_eval.metrics.CodebookAccuracy", init_args={"top_k": "x"}), "_class_problem",
         "musicgen_eval.metrics.CodebookAccuracy: "),
        (metric(class_path="torchmetrics.classification.MulticlassConfusionMatrix"), "_class_problem",
         "torchmetrics.classification.MulticlassConfusionMatrix requires num_classes"),
        (metric(nam="nope"), "_metric_entry",
         "model.metrics: {'nam': 'nope'} has the unknown key 'nam', expected name, init_args, inputs; did you mean name?"),
        (metric(name="nope", inputz=3), "_metric_entry", "has the unknown key 'inputz', expected name, init_args, inputs"),
        (metric(metric={"class_path": "musicgen_eval.metrics.TextGain"}, input={"nll": "nll__no_text"}), "_metric_entry",
         "has the unknown key 'input', expected metric, inputs; did you mean inputs?"),
        (metric(metric={"class_path": "torchmetrics.MeanMetric", "inputs": {"value": "nll"}}), "_metric_entry",
         "expected class_path, init_args; to rename inputs, specify {metric: {class_path: ...}, inputs: {...}}"),
        (metric(class_path="torchmetrics.MeanMetric", inputs={"value": "nll"}), "_metric_entry",
         "expected class_path, init_args; to rename inputs, specify {metric: {class_path: ...}, inputs: {...}}"),
        (metric(class_path="musicgen_eval.MetricEntry", init_args={"metric": "torchmetrics.MeanMetric", "input": 3}),
         "_metric_entry", "has the unknown key 'input', expected metric, inputs; did you mean inputs?"),
        (metric(metric={"class_path": "torchmetrics.MeanMetric"}, inputs=3), "_metric_entry",
         "model.metrics: inputs must map parameters of update() to names of inputs, got 3"),
        (metric(name="nope", inputs={"value": 3}), "_metric_entry",
         "model.metrics: inputs must map parameters of update() to names of inputs, got {'value': 3}"),
        (["--model=3"], "_no_mapping", "model: expected a mapping of settings, or the path of a YAML file, got '3'"),
    ],
)  # fmt: skip
def test_messages_of_the_installed_version_are_recognised(arguments, explained_by, expected):
    message = message_of(arguments)
    assert getattr(parser_messages, explained_by)(message) is not None, message
    line = one_line(message)
    assert expected in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"class_path": "musicgen_eval.metrics.CodebookPerplexty"},
            "did you mean musicgen_eval.metrics.CodebookPerplexity",
        ),
        (
            {"class_path": "torchmetrics.MeanMetric", "init_args": {"foo": 3}},
            "model.metrics: torchmetrics.MeanMetric: Option 'foo' is not accepted",
        ),
        (
            {"class_path": "torchmetrics.classification.MulticlassConfusionMatrix"},
            "model.metrics: torchmetrics.classification.MulticlassConfusionMatrix requires num_classes",
        ),
    ],
)
def test_a_problem_of_a_renamed_metric_is_attributed_to_the_metric(given, expected):
    line = one_line(message_of(metric(metric=given, inputs={"value": "nll"})))
    assert expected in line
    assert "MetricEntry" not in line


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_missing_option_is_recognised(command):
    with pytest.raises(ArgumentError) as refused:
        parse_command([command])
    assert one_line(str(refused.value)) == "--audio is required unless --resume specifies a run folder"


def test_an_unknown_option_is_recognised():
    assert unknown_option(message_of(["--model.sed=3", "--other"])) == "model.sed"


def test_an_unknown_setting_of_a_command_is_recognised(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {sed: 3}")
    command = ArgumentParser(exit_on_error=False)
    command.add_argument("--config", action="config")
    command.add_class_arguments(Model, "model")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subcommands().add_subcommand("test", command)
    with pytest.raises(ArgumentError) as refused:
        parser.parse_args(["test", f"--config={tmp_path / 'own.yaml'}"])
    assert unknown_setting(str(refused.value)) == "model.sed"


def test_an_unknown_message_is_printed_in_one_line():
    assert one_line('Parser key "data":\n  something\n  else') == "data: something else"


def test_the_keys_of_metric_entries_are_those_of_their_classes():
    assert f"{MetricEntry.__module__.partition('.')[0]}.{MetricEntry.__name__}" == RENAMING_CLASS
    assert set(METRIC_ENTRY) == {field.name for field in fields(MetricEntry)}
    assert set(INSTALLED_METRIC) == InstalledMetric.__annotations__.keys()
