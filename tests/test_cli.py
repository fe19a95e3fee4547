import json
from pathlib import Path

import pytest

from musicgen_eval.cli import lightning_main, main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DEMO = ["test", "--config", str(ROOT / "configs" / "demo.yaml")]


def refusal(capsys, *arguments: str, door=lightning_main) -> str:
    """What a door says when it refuses; never a page."""
    status = door(list(arguments))
    said = capsys.readouterr()
    assert status != 0
    assert "usage:" not in said.err
    assert said.err.startswith("error: ")
    return said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.foo=3"], "unrecognized arguments: --data.foo=3"),
        (["--model.tail=keep"], "Expected a typing.Literal['score', 'drop']. Got value: keep"),
        (
            ["--model.metrics.x=musicgen_eval.metrics.CodebookPerplexty"],
            "did you mean musicgen_eval.metrics.CodebookPerplexity",
        ),
        (["--model.metrics.x=TextGian"], "did you mean musicgen_eval.metrics.TextGain"),
        (["--model.metrics.x.class_path=torchmetrics.MeanMetrik"], "did you mean torchmetrics.MeanMetric"),
        (["--ckpt_path=some.ckpt"], "unrecognized arguments: --ckpt_path=some.ckpt"),
        (["--trainer.precision=16-mixed"], "16-mixed needs a GPU"),
        (["--trainer.use_distributed_sampler=true"], "would score windows twice"),
        (["--trainer.limit_test_batches=2"], "use data.limit"),
        (["--trainer.limit_test_batches=0"], "use data.limit"),
        (["--trainer.fast_dev_run=true"], "use data.limit"),
        (["--trainer.devices=0"], "devices"),
        (["--trainer.strategy=foo"], "foo"),
        (["--data.context_s=9"], "is 700 frames, over the checkpoint's limit of 500 (10 s)"),
        (["--data.context_s=0.33"], "context_s=0.33 s is 16.5 frames"),
        (["--data.batch_size=0"], "batch_size must be at least 1"),
        (["--data.limit=0"], "limit must be at least 1"),
        (["--data.max_failures=-1"], "max_failures must be at least 0"),
        (["--data.source="], "an empty source"),
        (["--data.num_workers=-1"], "num_workers must be at least 0"),
        (["--data.source=/nowhere"], "/nowhere"),
        (["--model.checkpoint=demmo"], "did you mean demo?"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *DEMO, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_fit(capsys):
    assert "invalid choice: 'fit'" in refusal(capsys, "fit")


def test_an_unknown_key_of_a_config_is_named(capsys, tmp_path):
    (tmp_path / "my.yaml").write_text("data:\n  sauce: x.wav\n")
    assert "sauce" in refusal(capsys, "test", "--config", str(tmp_path / "my.yaml"))


def test_a_run_dir_that_holds_something_is_refused(capsys, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    assert "holds precious.txt" in refusal(capsys, *DEMO, f"--run_dir={tmp_path}")
    assert (tmp_path / "precious.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "audio"),
        (["evaluate", "--audio", "/nowhere.wav"], "/nowhere.wav"),
        (["evalute"], "invalid choice: 'evalute'"),
        (["evaluate", "--audio", "x", "--foo", "1"], "unrecognized arguments: --foo 1"),
    ],
)
def test_the_everyday_door_refuses_in_a_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *arguments, door=main)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", CONFIGS, ids=[str(path.relative_to(ROOT)) for path in CONFIGS])
def test_every_shipped_config_parses_and_names_real_settings(capsys, config):
    base = [] if config.parent.name == "configs" else DEMO[1:]
    with pytest.raises(SystemExit) as stopped:
        lightning_main(["test", *base, "--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    assert "checkpoint:" in capsys.readouterr().out


def test_evaluate_prints_a_table_and_writes_a_run(capsys, tmp_path, oracle):
    clip = next((ROOT / "musicgen_eval" / "demo" / "clips").glob("*.wav"))
    status = main(
        ["evaluate", "--audio", str(clip), "--text", "drums", "--checkpoint", str(oracle / "tiny_musicgen"),
         "--context_s", "2", "--target_s", "2", "--run_dir", str(tmp_path / "x")]
    )  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "bits/s" in said.out
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert summary["counts"]["tracks_ok"] == 1
    assert f"{summary['metrics']['perplexity']['ppl']['value']:.2f}" in said.out
    assert str(tmp_path / "x" / "summary.json") in said.out.replace("\n", "")
    config = (tmp_path / "x" / "config.yaml").read_text()
    assert str(clip) in config


def test_a_runs_config_gives_the_run_again(capsys, tmp_path, oracle):
    arguments = [
        *DEMO, f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--data.limit=1", "--data.context_s=2",
        "--data.target_s=2", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    assert lightning_main([*arguments, f"--run_dir={tmp_path / 'a'}"]) == 0, capsys.readouterr().err
    again = ["test", "--config", str(tmp_path / "a" / "config.yaml"), f"--run_dir={tmp_path / 'b'}"]
    assert lightning_main(again) == 0, capsys.readouterr().err
    assert (tmp_path / "a" / "summary.json").read_bytes() == (tmp_path / "b" / "summary.json").read_bytes()
