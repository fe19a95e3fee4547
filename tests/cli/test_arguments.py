"""Flags without a value and the value `None` are converted to the form that the parsers accept."""

import pytest
import yaml

from musicgen_eval.cli.arguments import FLAGS, NULLABLE, with_values
from musicgen_eval.cli.commands import parse_command
from musicgen_eval.cli.lightning import EvaluationCLI
from musicgen_eval.cli.main import LIGHTNING_COMMANDS, lightning_main


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--save_nll"], ["--save_nll=true"]),
        (["--save_nll", "--limit", "3"], ["--save_nll=true", "--limit", "3"]),
        (["--save_nll", "yes"], ["--save_nll", "yes"]),
        (["--save_nll", "false"], ["--save_nll", "false"]),
        (["--save_nll=no"], ["--save_nll=no"]),
        (["--data.allow_beyond_limit", "-c", "x.yaml"], ["--data.allow_beyond_limit=true", "-c", "x.yaml"]),
        (["--model.save_nll"], ["--model.save_nll=true"]),
        (["--audio.originals", "--retry_failures"], ["--audio.originals=true", "--retry_failures=true"]),
        (["--top_k", "None"], ["--top_k", "null"]),
        (["--top_k=none", "--limit=None"], ["--top_k=null", "--limit=null"]),
        (["--model.continuation.top_p", "None"], ["--model.continuation.top_p", "null"]),
        (["--text", "None", "--run_dir=None"], ["--text", "None", "--run_dir=None"]),
        (["--batch_size", "None"], ["--batch_size", "None"]),
    ],
)
def test_flags_and_none_are_converted(arguments, expected):
    assert with_values(arguments) == expected


def test_the_options_have_the_prefixes_of_both_commands():
    assert {"--save_nll", "--model.save_nll", "--data.allow_beyond_limit", "--retry_failures"} <= FLAGS
    assert {"--top_k", "--model.continuation.top_k", "--duration_s", "--data.limit", "--max_frames"} <= NULLABLE
    assert NULLABLE.isdisjoint({"--text", "--revision", "--run_dir", "--batch_size"})


def test_none_turns_off_top_k():
    command = parse_command(["generate", "--audio", "demo", "--top-k", "None"])
    assert command.keywords["continuation"].top_k is None


@pytest.mark.parametrize(("value", "expected"), [("yes", True), ("no", False), ("true", True), ("False", False)])
def test_a_flag_accepts_a_word_as_its_value(value, expected):
    command = parse_command(["evaluate", "--audio", "demo", "--save_nll", value])
    assert command.keywords["model"].save_nll is expected


def test_flags_of_the_lightning_command_need_no_value(capsys):
    with pytest.raises(SystemExit) as stopped:
        lightning_main(["test", "--data.allow_beyond_limit", "--model.continuation.top_k", "None", "--print_config"])
    assert stopped.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["data"]["allow_beyond_limit"] is True
    assert settings["model"]["continuation"]["top_k"] is None


def test_the_early_check_knows_the_commands_of_lightning():
    assert set(EvaluationCLI.subcommands()) == set(LIGHTNING_COMMANDS)
