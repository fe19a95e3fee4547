"""Metrics of installed packages, given by the names of their entry points: in YAML, on the command line and in Python."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from musicgen_eval import MetricEntry, perplexity
from musicgen_eval.cli.main import lightning_main
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import CodebookAccuracy
from musicgen_eval.metrics.plugin.entries import metric_entries
from musicgen_eval.metrics.plugin.installed import installed_metrics

pytestmark = pytest.mark.usefixtures("cheap_runs")

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"
MODULE = """
from torchmetrics import MeanMetric
from musicgen_eval.metrics import CodebookAccuracy

class TopShare(CodebookAccuracy):
    pass

class Keyed(MeanMetric):
    def __init__(self, **settings):
        super().__init__(**settings)

not_a_metric = 3
"""
ENTRY_POINTS = """
[musicgen_eval.metrics]
top_share = metric_package_of_the_test:TopShare
keyed = metric_package_of_the_test:Keyed
constant = metric_package_of_the_test:not_a_metric
missing = metric_package_of_the_test:Missing
"""
GIVEN = {"name": "top_share", "init_args": {"top_k": 3}, "inputs": {"rank": "rank__no_text"}}


def install(folder: Path, name: str, entry_points: str) -> None:
    """Writes the files of an installed package."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """Adds a folder with an installed package that declares metrics."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "metric_package_of_the_test.py").write_text(MODULE)
    install(folder, "metric_package", ENTRY_POINTS)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("metric_package_of_the_test", None)


@pytest.fixture
def expected() -> dict[str, float]:
    """Returns the values of the same metric, given as an object."""
    entry = MetricEntry(CodebookAccuracy(top_k=3), {"rank": "rank__no_text"})
    result = perplexity("demo", limit=1, context_s=5.0, target_s=5.0, metrics={"share": entry})
    return {key: value.value for key, value in result.evaluation.metrics["share"].items()}


def test_installed_metrics_are_listed_without_importing_their_code(site):
    assert installed_metrics()["top_share"] == "metric_package_of_the_test:TopShare"
    assert "metric_package_of_the_test" not in sys.modules


def test_a_python_caller_names_an_installed_metric(site, expected):
    result = perplexity("demo", limit=1, context_s=5.0, target_s=5.0, metrics={"share": GIVEN})
    assert {key: value.value for key, value in result.evaluation.metrics["share"].items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("place", ["yaml", "command line"])
def test_train_like_eval_names_an_installed_metric(site, expected, tmp_path, capsys, place):
    if place == "yaml":
        config = yaml.safe_load(DEMO.read_text())
        config["model"]["metrics"]["share"] = GIVEN
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
        arguments = ["--config", str(tmp_path / "own.yaml")]
    else:
        arguments = ["--config", str(DEMO), f"--model.metrics.share={json.dumps(GIVEN)}"]
    run = tmp_path / "run"
    assert lightning_main(["test", *arguments, "--data.limit=1", f"--run_dir={run}"]) == 0
    values = json.loads((run / "summary.json").read_text())["metrics"]["share"]
    assert {key: value["value"] for key, value in values.items()} == expected
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["metrics"]["share"] == GIVEN
    assert lightning_main(["test", f"--resume={run}"]) == 0


def test_an_unknown_name_is_refused_at_the_command_line_with_near_matches(site, capsys):
    status = lightning_main(["test", "--config", str(DEMO), "--model.metrics.share={name: top_shares}"])
    printed = capsys.readouterr().err
    assert status == 1
    assert printed.startswith(
        "error: metric 'share': no installed package declares a metric 'top_shares'; did you mean top_share?"
    )
    assert "known: constant, keyed, missing, top_share" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "top_shares"}, r"no installed package declares a metric 'top_shares'; did you mean top_share\? known: "),
        ({"name": "fad"}, "no installed package declares a metric 'fad'; known: constant, keyed, missing, top_share"),
        ({"name": "constant"}, "constant = .*:not_a_metric must be a subclass of torchmetrics.Metric, got 3"),
        ({"name": "missing"}, r"missing = .*:Missing cannot be imported: AttributeError.*; reinstall its package"),
        ({"name": "top_share", "init_args": {"topk": 3}}, r"init_args contains 'topk', which TopShare.*; did you mean top_k\?"),
        ({"name": "top_share", "init_args": {"top_k": 0}}, r"cannot be created with init_args {'top_k': 0}: .*at least 1"),
        ({"name": "keyed", "init_args": {"foo": 0}}, r"Keyed cannot be created with init_args {'foo': 0}: "),
        ({"name": "top_share", "input": {}}, r"the unknown key 'input', expected name, init_args, inputs; did you mean inputs\?"),
        ({"class_path": "torchmetrics.MeanMetric"}, "has the unknown key 'class_path', expected name.* pass .* as an object"),
        ({"name": "top_share", "init_args": [3]}, r"name must be a string and init_args a mapping, got 'top_share' and \[3\]"),
        ({"init_args": {}}, "name must be a string and init_args a mapping, got None"),
        ({"name": "top_share", "inputs": {"rank": 3}}, "inputs must map parameters"),
    ],
)  # fmt: skip
def test_wrong_names_and_arguments_are_refused_with_the_remedy(site, given, message):
    with pytest.raises(MetricError, match=f"metric 'm'.*{message}"):
        metric_entries({"m": given})


def test_a_name_of_two_packages_is_refused_with_both(site):
    install(site, "other_package", "[musicgen_eval.metrics]\ntop_share = other:Share\n")
    owners = r"metric_package_of_the_test:TopShare \(metric_package\), other:Share \(other_package\)"
    message = f"several installed packages declare a metric 'top_share': {owners}; specify class_path instead of name"
    with pytest.raises(MetricError, match=message):
        metric_entries({"m": {"name": "top_share"}})


def test_without_installed_metrics_the_error_names_the_group(monkeypatch):
    monkeypatch.setattr("musicgen_eval.metrics.plugin.installed.entry_points", lambda **_: ())
    with pytest.raises(
        MetricError, match=r"no metrics are installed \(entry points in the group musicgen_eval.metrics\)"
    ):
        metric_entries({"m": {"name": "fad"}})
