"""The commands of `musicgen-eval`, as functions whose signatures are the options.

The functions import torch, Lightning and transformers when they are called, so that help texts and refused arguments do not wait
for these imports. Two habits of jsonargparse restrict this module. It executes imports under `TYPE_CHECKING` to resolve signatures.
It also looks up the name of each function in the package `musicgen_eval`, where `generate` would import `api.py`.
"""

from __future__ import annotations

import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from musicgen_eval.cli.arguments import full_option, utf8_text, with_resumed, with_values
from musicgen_eval.cli.version import PrintVersion

AUDIO_HELP = (
    "one or more files, folders, globs or manifests (csv, jsonl, parquet), such as --audio *.wav; `demo` for the clips of the "
    "package"
)
RESUME_OPTIONS = ("--resume", "--max_failures", "--retry_failures", "--allow_other_machine")
EXAMPLES = {
    "evaluate": (
        "musicgen-eval evaluate --audio demo",
        "musicgen-eval evaluate --audio songs/*.flac --checkpoint facebook/musicgen-small",
        "musicgen-eval evaluate --resume runs/20260102-030405-evaluate",
    ),
    "generate": (
        'musicgen-eval generate --audio demo --text "EDM" --limit 1',
        "musicgen-eval generate --audio song.mp3 --context 10 --duration 5 --format wav",
        "musicgen-eval generate --resume runs/20260102-030405-generate",
    ),
}


class ExamplesFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Formats help texts like jsonargparse, but keeps the line breaks of the examples."""


def parse_command(args: Sequence[str]) -> Callable[[], None]:
    """Parses the arguments of `musicgen-eval`, in which options may be written with dashes.

    Returns:
        A function that runs the command.

    Raises:
        ArgumentError: the arguments are wrong.
        RunError: the folder after `--resume` contains no run.
        SystemExit: a help text or the version was printed.
    """
    full = with_values([full_option(arg) for arg in args])
    options = [arg.partition("=")[0] for arg in full]
    if options.count("--audio") > 1:
        raise ArgumentError(None, "--audio is given more than once; name all files after one --audio")
    if "--resume" in options:
        if full[0] not in COMMANDS:
            raise ArgumentError(None, "--resume follows a command: musicgen-eval evaluate --resume runs/x")
        return _resumed_command(full)
    parsed = _parser().parse_args(full)
    settings = parsed[parsed.subcommand].as_dict()
    return partial(COMMANDS[parsed.subcommand], **{**settings, "text": utf8_text(settings["text"], option="--text")})


def _parser() -> ArgumentParser:
    """Returns the parser of all commands."""
    parser = ArgumentParser(
        prog="musicgen-eval", description="Exact evaluation of MusicGen checkpoints.", exit_on_error=False
    )
    parser.add_argument("--version", action=PrintVersion)
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        subparser = ArgumentParser(
            exit_on_error=False,
            description=summary,
            epilog="\n  ".join(["examples:", *EXAMPLES[name]]),
        )
        subparser.add_argument("--audio", type=str, nargs="+", required=True, metavar="AUDIO", help=AUDIO_HELP)
        subparser.add_function_arguments(command, as_group=False, skip={"audio"})
        commands.add_subcommand(name, subparser, help=summary)
        subparser.formatter_class = ExamplesFormatter  # add_subcommand sets the formatter of the main parser
    return parser


def evaluate_command(
    audio: list[str],
    text: str | None = None,
    checkpoint: str = "demo",
    revision: str | None = None,
    context_s: float | None = None,
    target_s: float | None = None,
    head: Literal["score", "skip"] = "score",
    tail: Literal["score", "drop"] = "score",
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true",
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    batch_size: int = 8,
    limit: int | None = None,
    min_duration_s: float = 0.0,
    max_failures: int = 0,
    allow_beyond_limit: bool = False,
    save_nll: bool = False,
    run_dir: Path | None = None,
    resume: Path | None = None,
    retry_failures: bool = False,
    allow_other_machine: bool = False,
) -> None:
    """Measures the perplexity of audio files.

    Args:
        audio: files, folders, globs or manifests.
        text: text for tracks that have none of their own.
        checkpoint: `demo`, a name on the Hugging Face Hub such as facebook/musicgen-small, or a folder.
        revision: branch, tag or commit on the hub.
        context_s: length of the context before each target, in seconds; default: half of the checkpoint's limit.
        target_s: length of the target of each window, in seconds; default: half of the checkpoint's limit.
        head: `score` counts every code; `skip` counts only codes with a full context.
        tail: `score` counts every codebook to its last frame; `drop` leaves out the last frames, as audiocraft does.
        precision: precision of the decoder.
        accelerator: kind of device to run on.
        batch_size: windows per step.
        limit: number of tracks, from the first; default: all.
        min_duration_s: shorter tracks are skipped, and the result counts them.
        max_failures: number of tracks that may fail before the run ends with an error.
        allow_beyond_limit: allow windows that are longer than the model was trained on, for experiments.
        save_nll: also write the negative log-likelihood of every code.
        run_dir: folder for the results; default: runs/<date>-evaluate. If the folder already holds this run, the run is resumed.
        resume: run folder to resume with its own settings; only max_failures can be given with it.
        retry_failures: when a run is resumed, measure its failed tracks again.
        allow_other_machine: resume a run that was begun on another machine.
    """
    from rich.console import Console

    from musicgen_eval.runs.datamodule import WindowDataModule
    from musicgen_eval.runs.folder import RunFolder, resume_line
    from musicgen_eval.runs.module import MusicGenEvaluation
    from musicgen_eval.runs.progress_bar import EvaluationProgress
    from musicgen_eval.runs.runner import Resume, run_evaluation

    module = MusicGenEvaluation(checkpoint, revision, tail=tail, save_nll=save_nll)
    data = WindowDataModule(
        source=_source(audio),
        text=text,
        context_s=context_s,
        target_s=target_s,
        head=head,
        batch_size=batch_size,
        limit=limit,
        min_duration_s=min_duration_s,
        max_failures=max_failures,
        allow_beyond_limit=allow_beyond_limit,
    )
    run_evaluation(
        module,
        data,
        precision=precision,
        accelerator=accelerator,
        run_dir=RunFolder.with_default_name("evaluate") if run_dir is None else run_dir,
        callbacks=[EvaluationProgress()],
        progress=True,
        console=Console(),
        resume=Resume(
            partial(resume_line, "evaluate"),
            retry_failures=retry_failures,
            allow_other_machine=allow_other_machine,
        ),
    )


def generate_command(
    audio: list[str],
    text: str | None = None,
    checkpoint: str = "demo",
    revision: str | None = None,
    context_s: float | None = None,
    duration_s: float | None = None,
    max_new_frames: int | None = None,
    stride_s: float | None = None,
    guidance_scale: float = 3.0,
    temperature: float = 1.0,
    top_k: int | None = 250,
    top_p: float | None = None,
    num_continuations: int = 1,
    threads: int | None = None,
    kernels: Literal["graph", "compiled", "eager"] = "graph",
    seed: int = 0,
    format: Literal["flac", "wav", "mp3"] = "flac",
    hold: Literal["continuation", "joined"] = "continuation",
    originals: bool = True,
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true",
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    batch_size: int = 8,
    limit: int | None = None,
    min_duration_s: float = 0.0,
    max_failures: int = 0,
    run_dir: Path | None = None,
    resume: Path | None = None,
    retry_failures: bool = False,
    allow_other_machine: bool = False,
) -> None:
    """Continues audio files.

    Args:
        audio: files, folders, globs or manifests.
        text: text prompt for tracks that have none of their own.
        checkpoint: `demo`, a name on the Hugging Face Hub such as facebook/musicgen-small, or a folder.
        revision: branch, tag or commit on the hub.
        context_s: time in the track at which the continuation begins, in seconds; default: its middle. The prompt is the whole
            track up to there if prompt and continuation fit into the checkpoint's limit; otherwise it is the last limit - stride_s
            seconds, and a longer context_s is an error. Also --context.
        duration_s: length of the continuation, in seconds; default: up to the end of the track. Also --duration.
        max_new_frames: length of the continuation, in frames.
        stride_s: by how many seconds the window slides beyond the checkpoint's limit; default: 3/5 of the limit.
        guidance_scale: scale of classifier-free guidance; 1 turns guidance off.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: number of the most likely codes to draw from.
        top_p: draw from the most likely codes whose probabilities add up to this.
        num_continuations: continuations per track.
        threads: CPU threads for drawing codes and decoding audio.
        kernels: how decode steps run on CUDA: replayed from a CUDA graph, replayed from a graph of kernels that torch.compile has
            fused, or kernel by kernel. Ignored on a CPU.
        seed: seed of the random numbers that draw the codes.
        format: format of the audio files.
        hold: `continuation` writes the generated part alone; `joined` writes the track up to the boundary and the generated part
            after it, with a crossfade of 40 ms, for listening.
        originals: also write the context and the true continuation.
        precision: precision of the decoder.
        accelerator: kind of device to run on.
        batch_size: continuations per step.
        limit: number of tracks, from the first; default: all.
        min_duration_s: shorter tracks are skipped, and the result counts them.
        max_failures: number of tracks that may fail before the run ends with an error.
        run_dir: folder for the results; default: runs/<date>-generate. If the folder already holds this run, the run is resumed.
        resume: run folder to resume with its own settings; only max_failures can be given with it.
        retry_failures: when a run is resumed, continue its failed tracks again.
        allow_other_machine: resume a run that was begun on another machine.
    """
    from rich.console import Console

    from musicgen_eval.api import continuation_seconds
    from musicgen_eval.records import ContinuationSettings
    from musicgen_eval.runs.continuation_files import AudioSettings
    from musicgen_eval.runs.datamodule import WindowDataModule
    from musicgen_eval.runs.folder import RunFolder, resume_line
    from musicgen_eval.runs.module import MusicGenEvaluation
    from musicgen_eval.runs.progress_bar import EvaluationProgress
    from musicgen_eval.runs.runner import Resume, run_continuation

    continuation = ContinuationSettings(
        stride_s=stride_s,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_continuations=num_continuations,
        threads=threads,
        kernels=kernels,
    )
    module = MusicGenEvaluation(checkpoint, revision, metrics={}, seed=seed, continuation=continuation)
    data = WindowDataModule(
        source=_source(audio),
        text=text,
        context_s=context_s,
        target_s=continuation_seconds(duration_s, max_new_frames, module.spec),
        batch_size=batch_size,
        limit=limit,
        min_duration_s=min_duration_s,
        max_failures=max_failures,
    )
    run_continuation(
        module,
        data,
        precision=precision,
        accelerator=accelerator,
        run_dir=RunFolder.with_default_name("generate") if run_dir is None else run_dir,
        callbacks=[EvaluationProgress()],
        progress=True,
        console=Console(),
        resume=Resume(
            partial(resume_line, "generate"),
            retry_failures=retry_failures,
            allow_other_machine=allow_other_machine,
        ),
        audio=AudioSettings(format=format, hold=hold, originals=originals),
        return_continuations=False,
    )


COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate_command, "generate": generate_command}


def _source(audio: list[str]) -> str | list[str]:
    """One source as itself, several as a list."""
    return audio[0] if len(audio) == 1 else audio


def _resumed_command(args: Sequence[str]) -> Callable[[], None]:
    """Returns a function that resumes a run with LightningCLI, which has every setting of the run's config.yaml."""
    command, *options = args
    others = [arg for arg in options if arg.startswith("--") and arg.partition("=")[0] not in RESUME_OPTIONS]
    if others:
        raise ArgumentError(None, f"--resume takes every setting from the run; leave out {', '.join(others)}")
    full = [re.sub(r"^--max_failures", "--data.max_failures", arg) for arg in with_resumed(options)]
    return partial(run_lightning, ["test" if command == "evaluate" else "predict", *full])


def run_lightning(args: Sequence[str]) -> None:
    """Runs LightningCLI, which takes seconds to import."""
    from musicgen_eval.cli.lightning import EvaluationCLI

    EvaluationCLI(args=list(args))
