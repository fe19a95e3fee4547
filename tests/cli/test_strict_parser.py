"""Unknown settings are refused, in configuration files and on the command line, even if their value is an empty mapping."""

import json

import pytest
import yaml

from musicgen_eval.cli.main import lightning_main

METRIC = {"class_path": "torchmetrics.MeanMetric"}
BEYOND_THE_PARSER = "no-such-file.wav: no such file or folder"


def message(arguments: list[str], capsys) -> str:
    """Returns the error message of a run of a file that does not exist."""
    assert lightning_main(["test", "--data.source=no-such-file.wav", *arguments]) != 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.fixture(params=["yaml", "command line"])
def as_arguments(request, tmp_path):
    """Returns a function that converts a metric entry to arguments."""

    def convert(entry: dict) -> list[str]:
        if request.param == "command line":
            return [f"--model.metrics.m={json.dumps(entry)}"]
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({"model": {"metrics": {"m": entry}}}))
        return [f"--config={path}"]

    return convert


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"metric": METRIC, "input": {}}, "has the unknown key 'input', expected metric, inputs; did you mean inputs?"),
        (
            {"metric": METRIC, "input": {}, "inputs": {"value": "nll"}},
            "has the unknown key 'input', expected metric, inputs; did you mean inputs?",
        ),
        (
            {"metric": METRIC, "input": {"value": {}}},
            "has the unknown key 'input', expected metric, inputs; did you mean inputs?",
        ),
        (
            {**METRIC, "input": {}},
            "has the unknown key 'input', expected class_path, init_args; to rename inputs, specify {metric: ",
        ),
        (
            {"name": "own", "input": {}},
            "has the unknown key 'input', expected name, init_args, inputs; did you mean inputs?",
        ),
        (
            {**METRIC, "init_args": {"nan_strategie": "warn"}},
            "torchmetrics.MeanMetric: nan_strategie is not a setting; did you mean nan_strategy?",
        ),
        (
            {**METRIC, "init_args": {"nan_strategie": {}}},
            "torchmetrics.MeanMetric: nan_strategie is not a setting; did you mean nan_strategy?",
        ),
        (
            {"metric": {**METRIC, "init_args": {"nan_strategie": {}}}, "inputs": {"value": "nll"}},
            "torchmetrics.MeanMetric: nan_strategie is not a setting; did you mean nan_strategy?",
        ),
    ],
)
def test_an_unknown_key_of_a_metric_entry_is_refused(as_arguments, entry, expected, capsys):
    assert expected in message(as_arguments(entry), capsys)


def test_empty_inputs_rename_nothing(as_arguments, capsys):
    entry = {"metric": {"class_path": "musicgen_eval.metrics.CodebookPerplexity", "init_args": {}}, "inputs": {}}
    assert message(as_arguments(entry), capsys).endswith(BEYOND_THE_PARSER)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model": {"metric": {}}}, "model.metric is not a setting; did you mean model.metrics?"),
        ({"model": {"metric": {"m": {}}}}, "model.metric is not a setting; did you mean model.metrics?"),
        ({"model": {"continuation": {"top": {}}}}, "model.continuation.top is not a setting; did you mean"),
        ({"data": {"contxt_s": 3}}, "data.contxt_s is not a setting; did you mean data.context_s?"),
        ({"trainer": {"device": 1}}, "trainer.device is not a setting; did you mean trainer.devices?"),
        ({"trainer": {"callbacks+": []}}, BEYOND_THE_PARSER),
        ({"dta": {"source": "demo"}}, "dta is not a setting; did you mean data?"),
        ({"dta": {}}, "dta is not a setting; did you mean data?"),
        ({"model": {}, "data": {}}, BEYOND_THE_PARSER),
        ({"model": {"continuation": {}}}, BEYOND_THE_PARSER),
        ({"model": {"metrics": {}}}, "no metric is specified"),
    ],
)
def test_an_unknown_setting_of_a_configuration_is_refused(config, expected, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    assert expected in message([f"--config={path}"], capsys)


def test_an_invalid_configuration_file_is_still_reported_by_the_parser(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("model: {metrics: [")
    assert message([f"--config={path}"], capsys).startswith("Problems parsing config: while parsing")
