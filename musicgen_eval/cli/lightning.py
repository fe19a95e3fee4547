"""LightningCLI for evaluations: `validate`, `test` and `predict`, exposing every setting of the trainer, the model and the data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from musicgen_eval.cli.arguments import expand_home, refuse_other_encodings, utf8_text
from musicgen_eval.cli.parser_messages import not_a_setting, not_an_option, unknown_option, unknown_setting
from musicgen_eval.cli.strict_parser import StrictParser, unknown_names
from musicgen_eval.cli.version import PrintVersion
from musicgen_eval.data.sources import absolute_source
from musicgen_eval.errors import EvaluationError, RunError
from musicgen_eval.models.checkpoint import absolute_name
from musicgen_eval.models.out_of_memory import out_of_memory_explained
from musicgen_eval.records import Task
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.folder import RunFolder, resume_line
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.processes.data_workers import dead_workers_explained
from musicgen_eval.runs.processes.signals import StopAfterBatch
from musicgen_eval.runs.processes.strategy import refuse_strategy
from musicgen_eval.runs.progress_bar import EvaluationProgress
from musicgen_eval.runs.recorder import RunRecorder
from musicgen_eval.runs.result_logger import ResultLogger
from musicgen_eval.runs.settings import AudioSettings, RunSettings
from musicgen_eval.runs.trainer_settings import LIMITS, check_precision, refuse_distributed_sampler, refuse_limit
from musicgen_eval.runs.wandb_logger import WandbSettings, wandb_logger
from musicgen_eval.runs.wandb_tracker import WandbTracker

TRAINER_DEFAULTS = {
    "precision": RunSettings.precision,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "devices": 1,
}


class EvaluationCLI(LightningCLI):
    """LightningCLI without `fit`, and without options that could load a pickle."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            MusicGenEvaluation,
            WindowDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=False,
            parser_class=StrictParser,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Maps each command to those arguments of its Trainer method that are not available as options."""
        skipped = {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only", "verbose", "return_predictions"}
        return {"validate": skipped, "test": skipped, "predict": skipped}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Returns a parser that raises an exception for invalid arguments instead of printing its usage."""
        return super().init_parser(**{**kwargs, "exit_on_error": False, "allow_abbrev": False})

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Adds `--version` to the main parser."""
        super().setup_parser(*args, **kwargs)
        self.parser.add_argument("--version", action=PrintVersion)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options for the run folder, the audio files and W&B to the parser of a command."""
        self.command_parser = parser  # the last one is kept; the parsers of all commands accept the same options
        parser.add_class_arguments(RunSettings, skip={"precision", "accelerator"})  # these are options of the trainer
        parser.add_class_arguments(AudioSettings, "audio")
        parser.add_class_arguments(WandbSettings, "wandb")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Checks that all configuration files are UTF-8 text, then parses the arguments."""
        refuse_other_encodings(args or [])
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            explained = self._unknown_name(str(error), args or [])
            if explained is None:
                raise
            raise ArgumentError(None, explained) from error

    def _unknown_name(self, message: str, args: Sequence[str]) -> str | None:
        """Returns a message that suggests names similar to an unknown option or setting, or None for any other problem."""
        setting, option = unknown_setting(message), unknown_option(message)
        command = next((arg for arg in args if arg in self.subcommands()), None)
        name = setting or option
        if name is None or command is None:
            return None
        known = self.command_parser.get_defaults(skip_validation=True)
        if option is not None and option in known:
            return f"--{option} must follow the command {command}"
        unknown = next(unknown_names(Namespace({name: None}), known), None)
        if unknown is None:
            return None
        return not_a_setting(*unknown) if setting is not None else not_an_option(unknown[0], command, unknown[1])

    def instantiate_classes(self) -> None:
        """Creates the model, the data module and the trainer. Converts library errors to argument errors."""
        try:
            super().instantiate_classes()
        except (EvaluationError, MisconfigurationException, ArgumentError):
            raise
        except Exception as error:  # libraries raise errors of many types
            raise ArgumentError(None, f"a setting cannot be used: {type(error).__name__}: {error}") from error

    def before_instantiate_classes(self) -> None:
        """Refuses settings that would have no effect or would change the results."""
        settings = self._settings
        for group in ("trainer", "model", "data", "audio", "wandb"):
            if not isinstance(settings[group], Namespace):
                raise ArgumentError(None, f"{group}: expected a mapping of settings, got {settings[group]!r}")
        if settings.resume is not None:
            raise RunError(f"resume is set to {settings.resume} in the configuration; use the option --resume instead")
        settings.trainer = expand_home(settings.trainer)
        settings.data.text = utf8_text(settings.data.text, option="data.text")
        trainer = settings.trainer
        for setting in LIMITS:
            if getattr(trainer, setting) is not None:  # Lightning would interpret 1 as all batches
                refuse_limit(setting)
        check_precision(str(trainer.precision), str(trainer.accelerator))
        if trainer.benchmark:
            raise RunError(
                "trainer.benchmark is set, which makes cuDNN choose algorithms by timing, so results would differ between runs; "
                "remove trainer.benchmark"
            )
        if trainer.use_distributed_sampler:
            refuse_distributed_sampler()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Creates the Trainer with additional callbacks for the run folder, the progress bar and W&B."""
        settings = self._settings
        command = str(self.subcommand)
        run = RunSettings(
            run_dir=settings.run_dir,
            retry_failures=settings.retry_failures,
            allow_other_machine=settings.allow_other_machine,
        )
        self.folder = RunFolder.with_default_name(command) if run.run_dir is None else RunFolder(run.run_dir)
        again = settings.clone()
        again.run_dir = None  # a repetition with config.yaml is written to a new folder
        again.retry_failures = again.allow_other_machine = False
        again.data.source = absolute_source(again.data.source)
        again.model.checkpoint = absolute_name(again.model.checkpoint)
        config_yaml = self.command_parser.dump(again, skip_unset=False)
        logger = wandb_logger(WandbSettings(**settings.wandb.as_dict()))
        console = Console() if _is_rank_0() else None
        trainer_config = self.config_init[self.subcommand].trainer
        callbacks: list[L.Callback] = []
        if trainer_config.enable_progress_bar is not False:
            callbacks.append(EvaluationProgress())
        recorder = RunRecorder(
            self.folder,
            command=command,
            config_yaml=config_yaml,
            resume=lambda run_dir: resume_line(self.folder.begun_with or command, run_dir),
            console=console,
            audio=AudioSettings(**settings.audio.as_dict()),
            settings=run,
        )
        self.stop = StopAfterBatch(say=_print_on_stderr if console is not None else None)
        callbacks += [self.stop, recorder]  # in this order, results are on disk before a logger can fail
        callbacks.append(ResultLogger(settings.as_dict(), recorder, excluded=logger))
        if logger is not None:
            callbacks.append(WandbTracker(settings.as_dict(), recorder, settings.wandb.max_logged))
        trainer_config.callbacks = [*(trainer_config.callbacks or []), *callbacks]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (EvaluationError, MisconfigurationException):
            raise
        except Exception as error:  # such as a TypeError for devices, or a ModuleNotFoundError for a TPU
            raise RunError(f"trainer: {' '.join(str(error).split())}") from error
        if logger is not None:
            trainer.loggers = [*trainer.loggers, logger]
        return trainer

    def validate(self, model: MusicGenEvaluation, datamodule: WindowDataModule) -> None:
        """Runs the command `validate`. LightningCLI calls this method by the name of the command."""
        self._run("score", lambda: self.trainer.validate(model, datamodule))

    def test(self, model: MusicGenEvaluation, datamodule: WindowDataModule) -> None:
        """Runs the command `test`."""
        self._run("score", lambda: self.trainer.test(model, datamodule))

    def predict(self, model: MusicGenEvaluation, datamodule: WindowDataModule) -> None:
        """Runs the command `predict`, without keeping all continuations in memory."""
        self._run("continue", lambda: self.trainer.predict(model, datamodule, return_predictions=False))

    def _run(self, task: Task, loop: Callable[[], object]) -> None:
        """Runs a loop of the trainer. A signal stops the run after the current batch.

        Args:
            task: Task of the run.
            loop: Function that runs the loop. Before the call, the checkpoint and the metrics are checked and the run folder is
                claimed, because Lightning starts the other processes during the call.

        Raises:
            RunError: A metric could not be computed. The results of the other metrics have been written.
        """
        batch_size = self.datamodule.settings.batch_size
        with self.stop.listening(), dead_workers_explained(), out_of_memory_explained(batch_size, "moving data to it"):
            refuse_strategy(self.trainer, task)
            self.model.prepare(task)
            if _is_rank_0():
                self.folder.claim()
            loop()
        if self.model.result is not None and self.model.result.metric_errors:
            names = ", ".join(self.model.result.metric_errors)
            raise RunError(f"could not compute the metrics {names}; the other results have been written")

    @property
    def _settings(self) -> Namespace:
        return self.config[self.subcommand]


def _print_on_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _is_rank_0() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0
