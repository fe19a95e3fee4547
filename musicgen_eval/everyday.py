"""The commands of `musicgen-eval`: the everyday cases, as functions whose signatures are the options."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from musicgen_eval.api import continuation_seconds
from musicgen_eval.arguments import full_option, with_resumed, with_values
from musicgen_eval.continuation_files import AudioSettings
from musicgen_eval.data import WindowDataModule
from musicgen_eval.lightning_cli import EvaluationCLI
from musicgen_eval.module import MusicGenEvaluation
from musicgen_eval.progress import EvaluationProgress
from musicgen_eval.records import ContinuationSettings
from musicgen_eval.run_folder import RunFolder, resume_line
from musicgen_eval.runs import Resume, run_continuation, run_evaluation

RESUME_OPTIONS = ("--resume", "--max_failures", "--retry_failures", "--allow_other_machine")


def run_command(args: Sequence[str]) -> None:
    """Runs a command of `musicgen-eval`; options may be written with dashes."""
    parser = ArgumentParser(
        prog="musicgen-eval", description="Exact evaluation of MusicGen checkpoints.", exit_on_error=False
    )
    commands = parser.add_subcommands()
    for command in (evaluate, generate):
        subparser = ArgumentParser(exit_on_error=False, description=(command.__doc__ or "").splitlines()[0])
        subparser.add_function_arguments(command, as_group=False)
        commands.add_subcommand(command.__name__, subparser, help=(command.__doc__ or "").splitlines()[0])
    full = with_values([full_option(arg) for arg in args])
    if any(arg.partition("=")[0] == "--resume" for arg in full):
        _resume_everyday(full)
        return
    settings = parser.parse_args(full)
    commands_by_name: dict[str, Callable[..., None]] = {"evaluate": evaluate, "generate": generate}
    chosen = commands_by_name[settings.subcommand]
    chosen(**settings[settings.subcommand].as_dict())


def evaluate(
    audio: str,
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
    """Perplexity of a file, a folder, a glob or a manifest.

    Args:
        audio: a file, a folder, a glob, or a manifest (csv, jsonl, parquet); `demo` for the clips of the package.
        text: text of tracks that have none of their own.
        checkpoint: `demo`, a hub name such as facebook/musicgen-small, or a folder.
        revision: hub branch, tag or commit.
        context_s: seconds heard before each target; default: half of the checkpoint's limit.
        target_s: seconds scored in each window; default: half of the checkpoint's limit.
        head: `score`: every code counts; `skip`: only those with a full context.
        tail: `score`: every codebook counts to its last frame; `drop`: as audiocraft.
        precision: of the decoder.
        accelerator: where to run.
        batch_size: windows a step.
        limit: only the first tracks.
        min_duration_s: tracks shorter than this are skipped, and counted.
        max_failures: how many tracks may fail.
        allow_beyond_limit: allows windows longer than the model was trained on, for experiments.
        save_nll: also write the nll of every code.
        run_dir: where results go; default: runs/<date>-evaluate. A run that it holds is gone on with, where it is the same.
        resume: a run folder, to go on with it as it was begun; no other setting but max_failures is given then.
        retry_failures: of a run that is gone on with, measure again what failed.
        allow_other_machine: go on with a run that was begun on another machine.
    """
    module = MusicGenEvaluation(checkpoint, revision, tail=tail, save_nll=save_nll)
    data = WindowDataModule(
        source=audio,
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
        resume=_resume("evaluate", retry_failures, allow_other_machine),
    )


def generate(
    audio: str,
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
    """Continues a file, or each file of a folder, a glob or a manifest.

    Args:
        audio: a file, a folder, a glob, or a manifest (csv, jsonl, parquet); `demo` for the clips of the package.
        text: prompt of tracks that have none of their own.
        checkpoint: `demo`, a hub name such as facebook/musicgen-small, or a folder.
        revision: hub branch, tag or commit.
        context_s: where in the track the continuation begins; default: in its middle. All before it is heard where it and the
            continuation fit the checkpoint's limit, else the last limit - stride_s seconds, which a given context must not exceed.
            Also --context.
        duration_s: how long it gets, in seconds; default: up to the track's end. Also --duration.
        max_new_frames: how long it gets, in frames.
        stride_s: by how much the window slides past the checkpoint's limit; default: 3/5 of the limit.
        guidance_scale: of classifier-free guidance; 1 is none.
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: draws from so many of the likeliest codes.
        top_p: draws from the likeliest codes that reach this probability together.
        num_continuations: how many times each track is continued.
        threads: of a CPU, for drawing and decoding.
        seed: of the numbers that codes are drawn with.
        format: of the files.
        hold: `continuation`: what was generated, alone; `joined`: the track up to the joint, whose last 40 ms fade into the codec's
            sound of it, and what was generated after it, without a seam: what to listen to.
        originals: also write the context and the true continuation.
        precision: of the decoder.
        accelerator: where to run.
        batch_size: continuations a step.
        limit: only the first tracks.
        min_duration_s: tracks shorter than this are skipped, and counted.
        max_failures: how many tracks may fail.
        run_dir: where results go; default: runs/<date>-generate. A run that it holds is gone on with, where it is the same.
        resume: a run folder, to go on with it as it was begun; no other setting but max_failures is given then.
        retry_failures: of a run that is gone on with, continue again what failed.
        allow_other_machine: go on with a run that was begun on another machine.
    """
    continuation = ContinuationSettings(
        stride_s=stride_s,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_continuations=num_continuations,
        threads=threads,
    )
    module = MusicGenEvaluation(checkpoint, revision, metrics={}, seed=seed, continuation=continuation)
    data = WindowDataModule(
        source=audio,
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
        resume=_resume("generate", retry_failures, allow_other_machine),
        audio=AudioSettings(format=format, hold=hold, originals=originals),
        return_continuations=False,
    )


def _resume(command: str, retry_failures: bool, allow_other_machine: bool) -> Resume:
    return Resume(
        lambda run_dir: resume_line(command, run_dir),
        retry_failures=retry_failures,
        allow_other_machine=allow_other_machine,
    )


def _resume_everyday(args: Sequence[str]) -> None:
    """`musicgen-eval evaluate --resume runs/x`: the run as it was begun, by the other door, which knows every setting."""
    command, *options = args
    others = [arg for arg in options if arg.startswith("--") and arg.partition("=")[0] not in RESUME_OPTIONS]
    if others:
        raise ArgumentError(None, f"--resume takes every setting from the run; leave out {', '.join(others)}")
    full = [re.sub(r"^--max_failures", "--data.max_failures", arg) for arg in with_resumed(options)]
    EvaluationCLI(args=["test" if command == "evaluate" else "predict", *full])
