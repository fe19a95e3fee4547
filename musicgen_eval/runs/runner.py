"""Runs an evaluation on one device with a quiet Trainer, for the Python functions and the command `musicgen-eval`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from musicgen_eval.data.sources import absolute_source
from musicgen_eval.errors import RunError
from musicgen_eval.models.checkpoint import absolute_name
from musicgen_eval.models.out_of_memory import out_of_memory_explained
from musicgen_eval.records import Continuation
from musicgen_eval.results.evaluation_result import EvaluationResult
from musicgen_eval.results.files import to_json
from musicgen_eval.runs.audio_paths import continuation_path
from musicgen_eval.runs.continuation_table import read_table
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.folder import RunFolder
from musicgen_eval.runs.library_output import quiet_libraries
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.processes.data_workers import dead_workers_explained
from musicgen_eval.runs.processes.one_process import OneProcess, one_device
from musicgen_eval.runs.processes.signals import StopAfterBatch
from musicgen_eval.runs.progress_bar import EvaluationProgress
from musicgen_eval.runs.recorder import RunRecorder
from musicgen_eval.runs.settings import AudioSettings, RunSettings
from musicgen_eval.runs.trainer_settings import check_precision

DEFAULT_SETTINGS = RunSettings()
DEFAULT_AUDIO = AudioSettings()


def same_call(run_dir: Path) -> str:
    """Returns the line that tells the user how to resume a run from Python."""
    return "make the same call again, with the same run_dir"


@dataclass(frozen=True)
class GenerationResult:
    """The continuations of a run, and their evaluation.

    Attributes:
        continuations: Continuations in the order of the tracks. If the run has a folder, each continuation has the paths of its
            files. Otherwise, each continuation has its audio.
        evaluation: Metrics, tracks, counts and recipe of the run.
    """

    continuations: Sequence[Continuation]
    evaluation: EvaluationResult


def run_evaluation(
    module: MusicGenEvaluation,
    data: WindowDataModule,
    settings: RunSettings = DEFAULT_SETTINGS,
    *,
    folder: RunFolder | None = None,
    console: Console | None = None,
    callbacks: Sequence[L.Callback] = (),
    notes: Sequence[str] = (),
    resume: Callable[[Path], str] = same_call,
) -> EvaluationResult:
    """Scores tracks with a quiet Trainer on one device.

    Args:
        module: Evaluation of a checkpoint.
        data: Tracks to score.
        settings: Settings for the device, the run folder and resuming.
        folder: Run folder, which replaces `settings.run_dir`. None means that `settings.run_dir` is used.
        console: Console for the tables of the result. None means that nothing is printed, and that no progress is shown.
        callbacks: Further callbacks for the Trainer.
        notes: Comments to write at the start of config.yaml.
        resume: Function that takes the path of a run folder, and returns the line that tells the user how to resume the run.

    Raises:
        EvaluationError: The evaluation failed (see `perplexity`).
    """
    folder = folder or _folder(settings)
    recorder = RunRecorder(
        folder,
        command="evaluate",
        config_yaml=_config_yaml(_config(module, data, settings), notes),
        resume=resume,
        console=console,
        settings=settings,
    )
    with _trainer(folder, data, [*callbacks, recorder], settings, shows_progress=console is not None) as trainer:
        trainer.test(module, datamodule=data, verbose=False)
    assert module.result is not None
    return module.result


def run_continuation(
    module: MusicGenEvaluation,
    data: WindowDataModule,
    settings: RunSettings = DEFAULT_SETTINGS,
    *,
    audio: AudioSettings = DEFAULT_AUDIO,
    folder: RunFolder | None = None,
    console: Console | None = None,
    notes: Sequence[str] = (),
    resume: Callable[[Path], str] = same_call,
    return_continuations: bool = True,
) -> GenerationResult:
    """Continues tracks with a quiet Trainer on one device.

    Args:
        module: Evaluation of a checkpoint.
        data: Tracks to continue.
        settings: Settings for the device, the run folder and resuming.
        audio: Settings of the audio files.
        folder: Run folder, which replaces `settings.run_dir`. None means that `settings.run_dir` is used.
        console: Console for the tables of the result. None means that nothing is printed, and that no progress is shown.
        notes: Comments to write at the start of config.yaml.
        resume: Function that takes the path of a run folder, and returns the line that tells the user how to resume the run.
        return_continuations: Whether the result contains the continuations. If not, they are not kept in memory.

    Raises:
        EvaluationError: The run failed (see `generate`).
    """
    config = {**_config(module, data, settings), "audio": asdict(audio)}
    if not module.prepare("continue").metrics:
        config["model"] = {**config["model"], "metrics": {}}
    folder = folder or _folder(settings)
    recorder = RunRecorder(
        folder,
        command="generate",
        config_yaml=_config_yaml(config, notes),
        resume=resume,
        console=console,
        audio=audio,
        settings=settings,
    )
    with _trainer(folder, data, [recorder], settings, shows_progress=console is not None) as trainer:
        batches = trainer.predict(module, datamodule=data, return_predictions=return_continuations)
    assert module.result is not None
    continuations = [continuation for batch in batches or [] for continuation in batch]
    if folder is not None and return_continuations:
        known = {(one.window.track, one.window.index) for one in continuations}
        continuations += _earlier_continuations(module, folder, known)
    order = {track: row for row, track in enumerate(module.data.plan.tracks.ids)} if module.data.plan else {}
    continuations.sort(key=lambda one: (order[one.window.track], one.window.index))
    return GenerationResult(continuations, module.result)


def _earlier_continuations(
    module: MusicGenEvaluation, folder: RunFolder, known: Collection[tuple[str, int]]
) -> list[Continuation]:
    """Returns the continuations that were written in earlier sessions of the run, excluding those in `known`."""
    measured, earlier = module.measured, []
    assert measured is not None
    written = {row["path"].rpartition(".")[0]: row for row in read_table(folder.path / "continuations.csv")}
    for place, plan_row in enumerate(measured.order.tolist()):
        window = measured.plan.windows.window(plan_row, measured.plan.tracks.ids)
        row = written.get(continuation_path(window.track, window.index, "").removesuffix("."))
        if (window.track, window.index) in known or row is None or not measured.has_tensor(place, "codes"):
            continue
        path, context, reference = (
            folder.path / row[name] if row[name] else None for name in ("path", "context_path", "reference_path")
        )
        earlier.append(
            Continuation(
                window=window,
                codes=measured.tensor(place, "codes").long(),
                sample_rate_hz=module.spec.sample_rate_hz,
                text=row["text"] or None,
                seed=module.settings.seed,
                path=path,
                context_path=context,
                reference_path=reference,
            )
        )
    return earlier


@contextmanager
def _trainer(
    folder: RunFolder | None,
    data: WindowDataModule,
    callbacks: Sequence[L.Callback],
    settings: RunSettings,
    *,
    shows_progress: bool,
) -> Iterator[L.Trainer]:
    """Creates a quiet Trainer for one device, and claims the run folder. Handles signals within the `with` block."""
    check_precision(settings.precision, settings.accelerator)
    stop = StopAfterBatch(say=lambda line: print(line, file=sys.stderr))
    with quiet_libraries(), stop.listening():
        try:
            trainer = L.Trainer(
                accelerator=settings.accelerator,
                devices=one_device(settings.accelerator),
                plugins=[OneProcess()],
                precision=settings.precision,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=shows_progress,
                use_distributed_sampler=False,
                callbacks=[stop, *([EvaluationProgress()] if shows_progress else []), *callbacks],
            )
        except (ValueError, MisconfigurationException) as error:
            raise RunError(f"accelerator {settings.accelerator!r}: {error}") from error
        if folder is not None:
            folder.claim()
        try:
            with dead_workers_explained(), out_of_memory_explained(data.settings.batch_size, "moving data to it"):
                yield trainer
        except SystemExit as stopped:
            if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning's SystemExit would end a notebook
                raise KeyboardInterrupt from stopped
            raise
        finally:
            if folder is not None:
                folder.unlock()  # if torch reports a dead worker within on_exception, the recorder does not release the folder


def _folder(settings: RunSettings) -> RunFolder | None:
    return None if settings.run_dir is None else RunFolder(settings.run_dir)


def _config(module: MusicGenEvaluation, data: WindowDataModule, settings: RunSettings) -> dict[str, Any]:
    """Returns a configuration that LightningCLI can use to repeat the run."""
    model = asdict(module.settings) | {"checkpoint": absolute_name(str(module.settings.checkpoint))}
    return {
        "trainer": {"precision": settings.precision, "accelerator": settings.accelerator},
        "model": {**model, "continuation": asdict(module.continuation)},
        "data": asdict(data.settings) | {"source": absolute_source(data.settings.source)},
    }


def _config_yaml(config: Mapping[str, Any], notes: Sequence[str]) -> str:
    return "".join(f"# {line}\n" for line in notes) + to_json(config)
