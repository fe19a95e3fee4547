"""Tests that help texts, the version and argument errors do not import torch, Lightning or transformers."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from musicgen_eval.cli import commands
from musicgen_eval.cli.main import lightning_main, main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchaudio", "torchmetrics", "lightning", "transformers", "wandb")
START = f"""
import sys
from musicgen_eval.cli.main import lightning_main, main
try:
    status = (lightning_main if sys.argv[1] == "lightning" else main)(sys.argv[2:])
except SystemExit as stopped:
    status = stopped.code
print("status", status, "imported", [name for name in {HEAVY} if name in sys.modules])
"""
EXAMPLES = [example for examples in commands.EXAMPLES.values() for example in examples]


def start(*arguments: str, folder: Path, command: str = "musicgen-eval") -> tuple[str, str]:
    """Runs a command in a new process. Returns its output, and a line with its exit status and its imports of large libraries."""
    done = subprocess.run(
        [sys.executable, "-c", START, command, *arguments],
        capture_output=True, text=True, check=True, timeout=120, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    *printed, last = done.stdout.splitlines()
    return "\n".join(printed) + done.stderr, last


def write_run(folder: Path, *, command: str) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"command": command}))
    (folder / "config.yaml").write_text("{}")


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--help"], 0, "Exact evaluation of MusicGen checkpoints."),
        (["--version"], 0, f"musicgen-eval {version('musicgen-eval')}"),
        (["evaluate", "--help"], 0, "musicgen-eval evaluate --audio demo"),
        (["generate", "--help"], 0, "musicgen-eval generate --audio demo"),
        (["evalute"], 2, "error: argument subcommand: invalid choice: 'evalute'"),
        (["evaluate"], 2, "error: --audio is required"),
        (
            ["evaluate", "--audio", "x", "--batch_siz", "4"],
            2,
            "--batch_siz is not an option of evaluate; did you mean --batch_size",
        ),
        (
            ["evaluate", "--audio", "x", "--resum", "runs/x"],
            2,
            "--resum is not an option of evaluate; did you mean --resume",
        ),
        (["evaluate", "--audio", "x", "--aud", "y"], 2, "--aud is not an option of evaluate; did you mean --audio"),
        (["evaluate", "--audio", "x", "--batchsize", "4"], 2, "--batchsize is not an option of evaluate; did you mean"),
        (
            ["evaluate", "--contxt_s", "3"],
            2,
            "error: --contxt_s is not an option of evaluate; did you mean --context_s?",
        ),
        (["generate", "--tail", "drop"], 2, "error: --tail is not an option of generate; it applies to evaluate only"),
        (["generate", "--audio", "x", "--top-k", "many"], 2, "error: top_k: expected int"),
        (["generate", "--audio", "x", "--format", "ogg"], 2, "error: format: expected one of 'flac', 'wav', 'mp3'"),
        (["generate", "--audio", "x", "--temperature", "-1"], 1, "error: temperature must be"),
        (["generate", "--audio", "x", "--top-k", "0"], 1, "error: top_k must be at least 1, got 0"),
        (["evaluate", "--audio", "x", "--context", "-1"], 1, "error: context_s must be at least 0, got -1"),
        (["evaluate", "--audio", "x", "--run_dir", ""], 1, "error: run_dir is an empty string; specify a folder"),
        (["evaluate", "--audio", "x", "--limit", "0"], 1, "error: limit must be at least 1, got 0"),
        (["generate", "--audio", "x", "--duration", "3", "--max-new-frames", "9"], 1, "both set the length"),
        (["evaluate", "--audio", "demo", "nowhere.wav"], 1, "error: nowhere.wav: no such file or folder"),
        (
            ["generate", "--audio", "x/y.wav"],
            1,
            "y.wav: no such file or folder (its parent folder x does not exist either)",
        ),
        (
            ["generate", "--audio", "demo", "--checkpoint", "./nowhere"],
            1,
            "checkpoint './nowhere' is not 'demo', an existing folder, or a hub name such as 'facebook/musicgen-small'",
        ),
        (["evaluate", "--resume", "nowhere"], 1, "nowhere: the path does not exist"),
        (["evaluate", "--resume", "x", "--limit", "2"], 2, "error: --resume takes all settings from the run"),
    ],
)
def test_help_and_argument_errors_import_no_large_libraries(tmp_path, arguments, status, expected):
    printed, last = start(*arguments, folder=tmp_path)
    assert expected in printed
    assert last == f"status {status} imported []"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "started_with", "line"),
    [
        ("generate", "evaluate", "musicgen-eval evaluate --resume x"),
        ("generate", "test", "python train_like_eval.py test --resume x"),
        ("generate", "validate", "python train_like_eval.py validate --resume x"),
        ("evaluate", "generate", "musicgen-eval generate --resume x"),
        ("evaluate", "predict", "python train_like_eval.py predict --resume x"),
    ],
)
def test_a_run_of_another_task_is_refused_with_the_command_that_resumes_it(tmp_path, command, started_with, line):
    write_run(tmp_path / "x", command=started_with)
    printed, last = start(command, "--resume", "x", folder=tmp_path)
    assert printed == f"error: the run in x was started with {started_with}; resume it with {line}\n"
    assert last == "status 1 imported []"


@pytest.mark.parametrize(
    ("command", "started_with", "resumed_with"),
    [
        ("evaluate", "evaluate", "test"),
        ("evaluate", "test", "test"),
        ("evaluate", "validate", "test"),
        ("generate", "generate", "predict"),
        ("generate", "predict", "predict"),
    ],
)
def test_a_run_of_the_same_task_is_resumed(tmp_path, command, started_with, resumed_with):
    write_run(tmp_path / "x", command=started_with)
    resumed = commands.parse_command([command, "--resume", str(tmp_path / "x")])
    assert resumed.args[0][0] == resumed_with


def test_a_damaged_run_is_refused_before_large_libraries_are_imported(tmp_path):
    write_run(tmp_path / "x", command="")
    printed, last = start("evaluate", "--resume", "x", folder=tmp_path)
    assert "x/run.json is damaged: the command is missing; restore it from a copy" in printed
    assert last == "status 1 imported []"


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--version"], 0, "musicgen-eval "),
        (["test", "--resume", "nowhere"], 1, "nowhere: the path does not exist"),
        (
            ["tst", "--config", "x.yaml"],
            2,
            "error: argument subcommand: invalid choice: 'tst' (choose from 'validate', ",
        ),
        ([], 2, "error: a command is required, expected one of validate, test, predict"),
    ],
)
def test_version_command_and_run_folder_errors_of_the_lightning_command_import_no_large_libraries(
    tmp_path, arguments, status, expected
):
    printed, last = start(*arguments, folder=tmp_path, command="lightning")
    assert expected in printed
    assert last == f"status {status} imported []"


@pytest.mark.parametrize("command", [main, lightning_main])
def test_the_version_is_that_of_the_installed_package(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        command(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"musicgen-eval {version('musicgen-eval')}\n"


def test_the_help_of_the_lightning_command_names_the_version_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        lightning_main(["--help"])
    assert stopped.value.code == 0
    assert "--version" in capsys.readouterr().out


@pytest.mark.parametrize("command", [main, lightning_main])
def test_an_unknown_version_is_an_error_with_the_install_command(capsys, monkeypatch, command):
    monkeypatch.setattr("importlib.metadata.distribution", not_found)
    assert command(["--version"]) == 1
    assert capsys.readouterr().err == (
        "error: musicgen-eval is not installed, so its version is unknown; run pip install .\n"
    )


def not_found(name: str):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_help_of_a_command_ends_with_its_examples(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    end = capsys.readouterr().out.rpartition("examples:\n")[2]
    assert [line.strip() for line in end.splitlines()] == list(commands.EXAMPLES[name])
    assert all(shlex.split(example)[:2] == ["musicgen-eval", name] for example in commands.EXAMPLES[name])


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_parses(tmp_path, monkeypatch, example):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "song.mp3").touch()
    resumed = re.search(r"--resume (\S+)", example)
    if resumed:
        write_run(Path(resumed[1]), command=shlex.split(example)[1])
    command = commands.parse_command(shlex.split(example)[1:])
    if resumed:
        assert command.args[0][1:] == ["--config", f"{resumed[1]}/config.yaml", "--run_dir", resumed[1]]
    else:
        assert command.keywords["audio"] == [shlex.split(example)[3]]
