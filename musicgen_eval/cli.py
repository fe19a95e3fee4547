"""The two command-line doors.

    python train_like_eval.py test --config configs/demo.yaml     LightningCLI: every setting of trainer, model and data
    musicgen-eval evaluate --audio song.mp3                       the everyday cases
    musicgen-eval generate --audio song.mp3 --text "EDM"

Whatever is wrong is said in a line, with a non-zero exit.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import lightning as L
import torchmetrics
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from musicgen_eval import metrics
from musicgen_eval.api import continuation_seconds
from musicgen_eval.audio.sources import lasting_source
from musicgen_eval.continuation_files import AudioSettings
from musicgen_eval.data import WindowDataModule, dead_workers_named
from musicgen_eval.errors import EvaluationError, RunError, near_matches
from musicgen_eval.models.checkpoint import lasting_name
from musicgen_eval.module import MusicGenEvaluation
from musicgen_eval.progress import EvaluationProgress
from musicgen_eval.quiet import quiet_libraries
from musicgen_eval.ranks import StoppedElsewhere
from musicgen_eval.records import ContinuationSettings
from musicgen_eval.redaction import redact
from musicgen_eval.run_folder import RunFolder, default_run_dir, resumed_arguments
from musicgen_eval.runs import Resume, check_precision, run_continuation, run_evaluation
from musicgen_eval.stopping import StopAfterBatch
from musicgen_eval.tracking import WandbSettings, WandbTracker, wandb_logger
from musicgen_eval.writer import RunWriter

TRAINER_DEFAULTS = {
    "precision": "32-true",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "devices": 1,
}


def lightning_main(args: Sequence[str] | None = None) -> int:
    """Runs `validate`, `test` or `predict` from arguments; returns the exit status."""
    return _guarded(lambda: EvaluationCLI(args=_with_resumed(sys.argv[1:] if args is None else args)))


def main(args: Sequence[str] | None = None) -> int:
    """Runs `musicgen-eval`; returns the exit status."""
    return _guarded(lambda: _everyday_command(sys.argv[1:] if args is None else args))


class EvaluationCLI(LightningCLI):
    """LightningCLI without fit, and without what could open a pickle."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            MusicGenEvaluation,
            WindowDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, each with the arguments of the Trainer's method that are not offered."""
        skipped = {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only", "verbose", "return_predictions"}
        return {"validate": skipped, "test": skipped, "predict": skipped}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises instead of printing its usage."""
        return super().init_parser(**{**kwargs, "exit_on_error": False})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run folder, how continuations are written, and W&B."""
        parser.add_argument(
            "--run_dir",
            type=Path | None,
            default=None,
            help="Where results go; default: runs/<date>-<command>. A run that it holds is gone on with",
        )
        parser.add_argument(
            "--resume", type=Path | None, default=None, help="A run folder: stands for its config.yaml and its run_dir"
        )
        parser.add_argument(
            "--retry_failures",
            type=bool,
            default=False,
            help="Of a run that is gone on with: measure again what failed",
        )
        parser.add_argument(
            "--allow_other_machine",
            type=bool,
            default=False,
            help="Go on with a run that was begun on another machine; its last bits may differ, and the result says so",
        )
        parser.add_class_arguments(AudioSettings, "audio")
        parser.add_class_arguments(WandbSettings, "wandb")

    def before_instantiate_classes(self) -> None:
        """Refuses what would be ignored or wrong, before anything is made."""
        trainer = self._settings.trainer
        for setting in ("limit_test_batches", "limit_val_batches", "limit_predict_batches"):
            if getattr(trainer, setting) is not None:  # Lightning would read a 1 as all of them
                raise RunError(
                    f"trainer.{setting} would leave tracks half measured; use data.limit, which counts tracks"
                )
        check_precision(str(trainer.precision), str(trainer.accelerator))
        if trainer.use_distributed_sampler:
            raise RunError("trainer.use_distributed_sampler would score windows twice; leave it false")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the run folder, the progress bar and W&B to the Trainer's own settings."""
        settings = self._settings
        self.folder = RunFolder(settings.run_dir or default_run_dir(str(self.subcommand)))
        again = settings.clone()
        again.run_dir = None  # the file is to give the run again, elsewhere
        again.retry_failures = again.allow_other_machine = False
        again.data.source = lasting_source(again.data.source)
        again.model.checkpoint = lasting_name(again.model.checkpoint)
        config_yaml = self._parser(self.subcommand).dump(again, skip_none=False)
        logger = wandb_logger(WandbSettings(**settings.wandb.as_dict()), self.folder.path)
        console = Console() if _is_rank_0() else None
        trainer_config = self.config_init[self.subcommand].trainer
        callbacks: list[L.Callback] = []
        if trainer_config.enable_progress_bar is not False:
            callbacks.append(EvaluationProgress())
        writer = RunWriter(
            self.folder,
            command=str(self.subcommand),
            config_yaml=config_yaml,
            resume=f"python train_like_eval.py {self.subcommand} --resume {shlex.quote(str(self.folder.path))}",
            console=console,
            audio=AudioSettings(**settings.audio.as_dict()),
            retry_failures=settings.retry_failures,
            allow_other_machine=settings.allow_other_machine,
        )
        self.stop = StopAfterBatch(say=console.print if console is not None else None)
        callbacks += [writer, self.stop]
        if logger is not None:  # after the writer: results are on disk before W&B could fail
            callbacks.append(WandbTracker(settings.as_dict(), writer, settings.wandb.max_logged))
            kwargs["logger"] = logger
        trainer_config.callbacks = [*(trainer_config.callbacks or []), *callbacks]
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:  # an unknown strategy or plugin
            raise RunError(f"trainer: {error}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """The run, told to end by signals."""
        with self.stop.listening(), dead_workers_named():
            super()._run_subcommand(subcommand)

    def before_test(self) -> None:
        """Refuses a wrong checkpoint or metric, then claims the run folder, before any other process or file exists."""
        self.model.prepare("continue" if self.subcommand == "predict" else "score")
        if _is_rank_0():
            self.folder.claim()
            self.datamodule.index_path = self.folder.index
            self.datamodule.retry_failures = self._settings.retry_failures

    def after_test(self) -> None:
        """A metric that could not be computed is an error, though the others' results are written."""
        if self.model.result is not None and self.model.result.metric_errors:
            names = ", ".join(self.model.result.metric_errors)
            raise RunError(f"metrics that could not be computed: {names}; the other results are written")

    before_validate = before_predict = before_test
    after_validate = after_predict = after_test

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Lightning would keep all that predict returns until its end."""
        prepared: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return {**prepared, "return_predictions": False} if subcommand == "predict" else prepared

    @property
    def _settings(self) -> Namespace:
        return self.config[self.subcommand]


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
    folder = run_dir or default_run_dir("evaluate")
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
        run_dir=folder,
        callbacks=[EvaluationProgress()],
        progress=True,
        console=Console(),
        resume=_resume("evaluate", folder, retry_failures, allow_other_machine),
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
    folder = run_dir or default_run_dir("generate")
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
        run_dir=folder,
        callbacks=[EvaluationProgress()],
        progress=True,
        console=Console(),
        resume=_resume("generate", folder, retry_failures, allow_other_machine),
        audio=AudioSettings(format=format, hold=hold, originals=originals),
        return_continuations=False,
    )


SHORT_OPTIONS = {"--context": "--context_s", "--duration": "--duration_s"}


def _everyday_command(args: Sequence[str]) -> None:
    """Runs a command of `musicgen-eval`; options may be written with dashes."""
    parser = ArgumentParser(
        prog="musicgen-eval", description="Exact evaluation of MusicGen checkpoints.", exit_on_error=False
    )
    commands = parser.add_subcommands()
    for command in (evaluate, generate):
        subparser = ArgumentParser(exit_on_error=False, description=(command.__doc__ or "").splitlines()[0])
        subparser.add_function_arguments(command, as_group=False)
        commands.add_subcommand(command.__name__, subparser, help=(command.__doc__ or "").splitlines()[0])
    full = _with_values([_full_option(arg) for arg in args])
    if any(arg.partition("=")[0] == "--resume" for arg in full):
        _resume_everyday(full)
        return
    settings = parser.parse_args(full)
    commands_by_name: dict[str, Callable[..., None]] = {"evaluate": evaluate, "generate": generate}
    chosen = commands_by_name[settings.subcommand]
    chosen(**settings[settings.subcommand].as_dict())


def _full_option(argument: str) -> str:
    """`--max-new-frames=5` as the parser knows it: `--max_new_frames=5`."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    option = SHORT_OPTIONS.get(option, "--" + option[2:].replace("-", "_"))
    return option + equals + value


def _resume(command: str, folder: Path, retry_failures: bool, allow_other_machine: bool) -> Resume:
    return Resume(
        f"musicgen-eval {command} --resume {shlex.quote(str(folder))}",
        retry_failures=retry_failures,
        allow_other_machine=allow_other_machine,
    )


RESUME_OPTIONS = ("--resume", "--max_failures", "--retry_failures", "--allow_other_machine")
FLAGS = ("--retry_failures", "--allow_other_machine")


def _with_values(args: Sequence[str]) -> list[str]:
    """Arguments in which a bare flag says that it is true."""
    following = [*args[1:], "--"]
    return [
        f"{arg}=true" if arg in FLAGS and after.lower() not in ("true", "false") else arg
        for arg, after in zip(args, following, strict=True)
    ]


def _with_resumed(args: Sequence[str]) -> list[str]:
    """Arguments in which a run folder stands for its configuration and itself."""
    full: list[str] = []
    rest = iter(_with_values(args))
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option != "--resume":
            full.append(arg)
            continue
        folder = value if equals else next(rest, "")
        if not folder or folder.startswith("--"):
            raise RunError("--resume needs a run folder, such as runs/20260102-030405-test")
        full += resumed_arguments(folder)
    return full


def _resume_everyday(args: Sequence[str]) -> None:
    """`musicgen-eval evaluate --resume runs/x`: the run as it was begun, by the other door, which knows every setting."""
    command, *options = args
    others = [arg for arg in options if arg.startswith("--") and arg.partition("=")[0] not in RESUME_OPTIONS]
    if others:
        raise RunError(f"--resume takes every setting from the run; leave out {', '.join(others)}")
    full = [re.sub(r"^--max_failures", "--data.max_failures", arg) for arg in _with_resumed(options)]
    EvaluationCLI(args=["test" if command == "evaluate" else "predict", *full])


def _is_rank_0() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _guarded(run: Callable[[], object]) -> int:
    """Runs a command; what is wrong becomes one message and a status: 2 for arguments, 1 for the rest, 143 for SIGTERM."""
    with quiet_libraries():
        try:
            run()
        except ArgumentError as error:
            return _fail(_short(str(error)), 2)
        except StoppedElsewhere:
            return 1  # rank 0 has said why
        except (EvaluationError, MisconfigurationException) as error:
            return _fail(str(error), 1)
        except SIGTERMException:
            return _fail("stopped by SIGTERM, before the result", 143)
        except (KeyboardInterrupt, SystemExit) as stopped:
            if isinstance(stopped, SystemExit) and not isinstance(stopped.__context__, KeyboardInterrupt):
                raise  # such as --help
            return _fail("interrupted, before the result", 130)
    return 0


def _fail(message: str, status: int) -> int:
    print(redact(f"error: {message}"), file=sys.stderr)
    return status


def _short(message: str) -> str:
    """The parser's message in a line where it can be one; for an unknown metric class its name and the nearest known ones."""
    subtypes = re.search(
        r'Parser key "([^"]+)":\s+Does not validate against any of the Union subtypes\s+Subtypes: (.*?)\n.*Given value: (.*)',
        message,
        re.DOTALL,
    )
    if subtypes is not None and "class_path" not in message:
        key, types, given = subtypes.groups()
        names = [name.replace("NoneType", "null") for name in re.findall(r"<class '([\w.]+)'>", types)]
        if set(names) - {"null"} and "metrics" not in key:
            return f"{key}: expected {' or '.join(names)}, got {given.strip()!r}"
    choice = re.search(r'Parser key "([^"]+)":\s+Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)', message)
    if choice is not None:
        return f"{choice[1]}: expected one of {choice[2]}, got {choice[3].strip()!r}"
    unknown = re.search(r"(?:given class_path '|dot import path string: )([\w.]+)", message)
    if unknown is None or "model.metrics" not in message:
        return message.strip()
    wanted = unknown.group(1)
    known = [f"{module.__name__}.{name}" for module in (metrics, torchmetrics) for name in metric_names(module)]
    return f"unknown metric class {wanted!r} in model.metrics; {near_matches(wanted, known)}"


def metric_names(module: ModuleType) -> list[str]:
    """The metrics that a module hands out by name."""
    return [name for name in module.__all__ if isinstance(getattr(module, name), type)]
