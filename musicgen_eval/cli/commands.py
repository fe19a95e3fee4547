"""The commands of `musicgen-eval`, as functions whose arguments are the command-line options.

Each function imports torch, Lightning and transformers only when it is called, so that these imports do not delay help texts and
argument errors. Two properties of jsonargparse restrict this module: jsonargparse executes the imports under `TYPE_CHECKING` to
resolve signatures, and it looks up each function by name in the package `musicgen_eval`, so a function named `generate` here would
cause `api.py` to be imported.
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from musicgen_eval.cli.arguments import full_option, utf8_text, with_resumed, with_values
from musicgen_eval.cli.parser_messages import not_an_option, unknown_option
from musicgen_eval.cli.version import PrintVersion
from musicgen_eval.data.folders import refuse_missing_source
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.errors import RunError
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.models.checkpoint_names import refuse_missing_folder
from musicgen_eval.records.signatures import takes_settings
from musicgen_eval.results.run_record import RunRecord
from musicgen_eval.runs.folder import resume_line
from musicgen_eval.runs.settings import AudioSettings, LengthSettings, ModelSettings, RunSettings

if TYPE_CHECKING:
    from musicgen_eval.runs.folder import RunFolder

AUDIO_HELP = (
    "One or more files, folders, globs or manifests (CSV, JSONL, Parquet), for example `--audio *.wav`. Use `demo` for the bundled "
    "clips."
)
RESUMED_COMMANDS = {"evaluate": ("evaluate", "test", "validate"), "generate": ("generate", "predict")}
"""Commands whose runs each command of `musicgen-eval` can resume."""
RESUME_OPTIONS = ("--resume", "--max_failures", "--retry_failures", "--allow_other_machine")
EXAMPLES = {
    "evaluate": (
        "musicgen-eval evaluate --audio demo",
        "musicgen-eval evaluate --audio songs/*.flac --checkpoint facebook/musicgen-small",
        "musicgen-eval evaluate --resume runs/20260102-030405-evaluate",
    ),
    "generate": (
        'musicgen-eval generate --audio demo --text "EDM" --limit 1',
        "musicgen-eval generate --audio song.mp3 --context_s 10 --duration_s 5 --format wav",
        "musicgen-eval generate --resume runs/20260102-030405-generate",
    ),
}


class ExamplesFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Formats help texts in the same way as jsonargparse, but preserves the line breaks between the examples."""


def parse_command(args: Sequence[str]) -> Callable[[], None]:
    """Parses the arguments of `musicgen-eval`. Option names can contain dashes instead of underscores.

    Returns:
        A function without parameters that runs the command.

    Raises:
        ArgumentError: The arguments are invalid.
        CheckpointError: The checkpoint is the path of a folder that does not exist.
        SourceError: An audio source does not exist.
        RunError: A setting is out of range, or the folder after `--resume` does not contain a run.
        SystemExit: The parser has printed a help text or the version.
    """
    full = with_values([full_option(arg) for arg in args])
    options = [arg.partition("=")[0] for arg in full]
    if options.count("--audio") > 1:
        raise ArgumentError(None, "--audio is specified more than once; list all files after a single --audio")
    if "--resume" in options:
        if full[0] not in COMMANDS:
            raise ArgumentError(None, "--resume must follow a command, as in musicgen-eval evaluate --resume runs/x")
        return _resumed_command(full)
    try:
        parsed = _parser().parse_args(full)
    except ArgumentError as error:
        unknown = unknown_option(str(error))
        if unknown is None:
            raise
        raise ArgumentError(None, _unknown_option(unknown, full)) from error
    settings = parsed[parsed.subcommand].as_dict()
    settings["text"] = utf8_text(settings["text"], option="--text")
    command: Callable[[], None] = COMMANDS[parsed.subcommand].prepared(**settings)  # type: ignore[attr-defined]
    refuse_missing_folder(str(settings["checkpoint"]))
    for source in settings["audio"]:
        refuse_missing_source(source)
    return command


def _unknown_option(name: str, args: Sequence[str]) -> str:
    """Returns the error message for an unknown option. The message names similar options, or the command that has the option."""
    command = next((arg for arg in args if arg in COMMANDS), None)
    if command is None:
        return not_an_option(name, "musicgen-eval", ("help", "version"))
    options = {other: signature(COMMANDS[other]).parameters for other in COMMANDS}
    if name in options[command]:
        return f"--{name} must follow the command, as in musicgen-eval {command} --{name}"
    others = [other for other in COMMANDS if name in options[other]]
    if others:
        return f"--{name} is not an option of {command}; it applies to {' and '.join(others)} only"
    return not_an_option(name, command, options[command])


def _parser() -> ArgumentParser:
    """Returns the parser for all commands of `musicgen-eval`."""
    parser = ArgumentParser(
        prog="musicgen-eval",
        description="Exact evaluation of MusicGen checkpoints.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=PrintVersion)
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        subparser = ArgumentParser(
            exit_on_error=False,
            allow_abbrev=False,
            description=summary,
            epilog="\n  ".join(["examples:", *EXAMPLES[name]]),
        )
        subparser.add_argument("--audio", type=str, nargs="+", required=True, metavar="AUDIO", help=AUDIO_HELP)
        subparser.add_function_arguments(command, as_group=False, skip={"audio"})
        commands.add_subcommand(name, subparser, help=summary)
        subparser.formatter_class = ExamplesFormatter  # add_subcommand has set the formatter of the main parser
    return parser


@takes_settings(task="score", without=("source", "num_workers", "max_frames", "seed"))
def evaluate_command(audio: list[str], data: DataSettings, model: ModelSettings, run: RunSettings) -> None:
    """Measures the perplexity of audio files."""
    from rich.console import Console

    from musicgen_eval.runs.datamodule import WindowDataModule
    from musicgen_eval.runs.module import MusicGenEvaluation
    from musicgen_eval.runs.runner import run_evaluation

    run_evaluation(
        MusicGenEvaluation(**vars(model)),
        WindowDataModule(**vars(replace(data, source=_source(audio)))),
        run,
        folder=_default_folder(run, "evaluate"),
        console=Console(),
        resume=partial(resume_line, "evaluate"),
    )


@takes_settings(task="continue", without=("source", "target_s", "num_workers", "max_frames"))
def generate_command(
    audio: list[str],
    data: DataSettings,
    length: LengthSettings,
    model: ModelSettings,
    continuation: ContinuationSettings,
    files: AudioSettings,
    run: RunSettings,
) -> None:
    """Generates continuations of audio files."""
    from rich.console import Console

    from musicgen_eval.runs.datamodule import WindowDataModule
    from musicgen_eval.runs.module import MusicGenEvaluation
    from musicgen_eval.runs.runner import run_continuation

    module = MusicGenEvaluation(**vars(model), metrics={}, continuation=continuation)
    run_continuation(
        module,
        WindowDataModule(**vars(replace(data, source=_source(audio), target_s=length.seconds(module.spec)))),
        run,
        audio=files,
        folder=_default_folder(run, "generate"),
        console=Console(),
        resume=partial(resume_line, "generate"),
        return_continuations=False,
    )


COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate_command, "generate": generate_command}


def _source(audio: list[str]) -> str | list[str]:
    """Returns a single source as a string, and several sources as a list."""
    return audio[0] if len(audio) == 1 else audio


def _default_folder(run: RunSettings, command: str) -> RunFolder | None:
    """Returns a run folder with a default name, or None if the settings already name a folder."""
    from musicgen_eval.runs.folder import RunFolder

    return RunFolder.with_default_name(command) if run.run_dir is None else None


def _resumed_command(args: Sequence[str]) -> Callable[[], None]:
    """Returns a function that resumes a run with LightningCLI, which accepts every setting in the run's config.yaml.

    Raises:
        ArgumentError: The arguments contain an option that cannot be combined with `--resume`.
        RunError: The folder after `--resume` does not contain a run, or the command cannot resume this run.
    """
    command, *options = args
    others = [arg for arg in options if arg.startswith("--") and arg.partition("=")[0] not in RESUME_OPTIONS]
    if others:
        raise ArgumentError(None, f"--resume takes all settings from the run; remove {', '.join(others)}")
    full = [f"--data.{arg[2:]}" if arg.startswith("--max_failures") else arg for arg in with_resumed(options)]
    for option, value in pairwise(full):
        if option == "--run_dir":
            _refuse_run_of_other_task(command, Path(value))
    return partial(run_lightning, ["test" if command == "evaluate" else "predict", *full])


def _refuse_run_of_other_task(command: str, folder: Path) -> None:
    """Raises `RunError` if the run in a folder evaluates and the command generates, or the reverse, or if run.json is damaged."""
    run = RunRecord.read(
        folder, remedy="restore it from a copy, or start the run again in another folder with --run_dir"
    )
    if run is not None and run.command not in RESUMED_COMMANDS[command]:
        raise RunError(
            f"the run in {folder} was started with {run.command}; resume it with {resume_line(run.command, folder)}"
        )


def run_lightning(args: Sequence[str]) -> None:
    """Runs LightningCLI. The import is inside this function, because it takes several seconds."""
    from musicgen_eval.cli.lightning import EvaluationCLI

    EvaluationCLI(args=list(args))
