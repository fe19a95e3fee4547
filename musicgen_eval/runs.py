"""Runs a module on one device with a quiet Trainer, as both doors do.

    module, data, a claimed folder --L.Trainer--> result (and continuations)

Knows Lightning, callbacks and folders; not where settings came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from musicgen_eval.continuation_files import AudioSettings
from musicgen_eval.data import WindowDataModule
from musicgen_eval.errors import RunError
from musicgen_eval.module import PRECISIONS, MusicGenEvaluation
from musicgen_eval.quiet import quiet_libraries
from musicgen_eval.records import Continuation
from musicgen_eval.results import EvaluationResult
from musicgen_eval.run_folder import RunFolder, lasting_source, to_json
from musicgen_eval.writer import RunWriter


@dataclass(frozen=True)
class GenerationResult:
    """What became of a source that was continued.

    Attributes:
        continuations: in the order of tracks, each with its audio, or with the paths of its files where a run folder was given.
        evaluation: metrics, tracks, counts and recipe.
    """

    continuations: Sequence[Continuation]
    evaluation: EvaluationResult


def run_evaluation(
    module: MusicGenEvaluation,
    data: WindowDataModule,
    *,
    precision: str = "32-true",
    accelerator: str = "auto",
    run_dir: str | Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    progress: bool = False,
    console: Console | None = None,
    notes: Sequence[str] = (),
) -> EvaluationResult:
    """Tests a module on one device with a quiet Trainer and gives its result.

    Args:
        module: what to evaluate.
        data: on what.
        precision: of the decoder.
        accelerator: as Lightning's.
        run_dir: where to leave files; None: nowhere.
        callbacks: further callbacks.
        progress: shows a progress bar, where `callbacks` hold one.
        console: where to print the result; None: nowhere.
        notes: what config.yaml cannot say of this run, as comments in it.

    Raises:
        EvaluationError: as `perplexity`.
    """
    folder = None if run_dir is None else RunFolder(run_dir)
    config = _config(module, data, precision=precision, accelerator=accelerator)
    config_yaml = _config_yaml(config, notes)
    writer = RunWriter(folder, command="evaluate", config_yaml=config_yaml, console=console)
    with _run(folder, [*callbacks, writer], precision, accelerator, progress=progress) as trainer:
        trainer.test(module, datamodule=data, verbose=False)
    assert module.result is not None
    return module.result


def run_continuation(
    module: MusicGenEvaluation,
    data: WindowDataModule,
    *,
    precision: str = "32-true",
    accelerator: str = "auto",
    run_dir: str | Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    progress: bool = False,
    console: Console | None = None,
    notes: Sequence[str] = (),
    audio: AudioSettings | None = None,
    return_continuations: bool = True,
) -> GenerationResult:
    """Continues with a module on one device with a quiet Trainer, and gives what came of it.

    Args:
        module: what continues.
        data: what is continued.
        precision: of the decoder.
        accelerator: as Lightning's.
        run_dir: where to write continuations and other files; None: nowhere.
        callbacks: further callbacks.
        progress: shows a progress bar, where `callbacks` hold one.
        console: where to print the result; None: nowhere.
        notes: what config.yaml cannot say of this run, as comments in it.
        audio: how continuations are written.
        return_continuations: whether they are given back; without, nothing of them is kept in memory.

    Raises:
        EvaluationError: as `generate`.
    """
    folder = None if run_dir is None else RunFolder(run_dir)
    audio = audio or AudioSettings()
    config = {**_config(module, data, precision=precision, accelerator=accelerator), "audio": asdict(audio)}
    if not module.prepare("continue").metrics:
        config["model"] = {**config["model"], "metrics": {}}
    config_yaml = _config_yaml(config, notes)
    writer = RunWriter(folder, command="generate", config_yaml=config_yaml, console=console, audio=audio)
    with _run(folder, [*callbacks, writer], precision, accelerator, progress=progress) as trainer:
        batches = trainer.predict(module, datamodule=data, return_predictions=return_continuations)
    assert module.result is not None
    order = {track.id: row for row, track in enumerate(module.result.tracks)}
    continuations = [continuation for batch in batches or [] for continuation in batch]
    continuations.sort(key=lambda one: (order[one.window.track], one.window.index))
    return GenerationResult(continuations, module.result)


@contextmanager
def _run(
    folder: RunFolder | None,
    callbacks: Sequence[L.Callback],
    precision: str,
    accelerator: str,
    *,
    progress: bool,
) -> Iterator[L.Trainer]:
    """A quiet Trainer for one device, and a claimed folder."""
    check_precision(precision, accelerator)
    with quiet_libraries():
        try:
            trainer = L.Trainer(
                accelerator=accelerator,
                devices=1,
                precision=precision,  # type: ignore[arg-type]
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=progress,
                use_distributed_sampler=False,
                callbacks=list(callbacks),
            )
        except (ValueError, MisconfigurationException) as error:
            raise RunError(f"accelerator {accelerator!r}: {error}") from error
        if folder is not None:
            folder.claim()
        try:
            yield trainer
        except SystemExit as stopped:
            if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning would end a notebook with it
                raise KeyboardInterrupt from stopped
            raise


def _config(module: MusicGenEvaluation, data: WindowDataModule, *, precision: str, accelerator: str) -> dict[str, Any]:
    return {
        "trainer": {"precision": precision, "accelerator": accelerator},
        "model": module.settings,
        "data": {**vars(data.settings), "source": lasting_source(data.settings.source)},
    }


def _config_yaml(config: Mapping[str, Any], notes: Sequence[str]) -> str:
    return "".join(f"# {line}\n" for line in notes) + to_json(config)


def check_precision(precision: str, accelerator: str) -> None:
    """Refuses an unknown precision, and 16-mixed on a CPU, where Lightning would quietly run bf16-mixed.

    Raises:
        RunError: says what to take instead.
    """
    if precision not in PRECISIONS:
        raise RunError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision}")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if precision == "16-mixed" and on_cpu:
        raise RunError("precision 16-mixed needs a GPU; on a CPU take 32-true or bf16-mixed")
