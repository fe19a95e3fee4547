"""Runs a module on one device with a quiet Trainer, as both doors do.

    module, data, a claimed folder --L.Trainer--> result (and continuations)

Knows Lightning, callbacks and folders; not where settings came from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from musicgen_eval.data.sources import lasting_source
from musicgen_eval.errors import RunError
from musicgen_eval.models.checkpoint import lasting_name
from musicgen_eval.models.out_of_memory import out_of_memory_explained
from musicgen_eval.records import Continuation
from musicgen_eval.results.files import to_json
from musicgen_eval.results.summary import EvaluationResult
from musicgen_eval.runs.audio_paths import continuation_path
from musicgen_eval.runs.continuation_files import AudioSettings
from musicgen_eval.runs.continuation_table import read_table
from musicgen_eval.runs.datamodule import WindowDataModule, dead_workers_named
from musicgen_eval.runs.folder import RunFolder
from musicgen_eval.runs.library_output import quiet_libraries
from musicgen_eval.runs.module import PRECISIONS, MusicGenEvaluation
from musicgen_eval.runs.processes.one_process import OneProcess, one_device
from musicgen_eval.runs.processes.signals import StopAfterBatch
from musicgen_eval.runs.recorder import RunRecorder


def same_call(run_dir: Path) -> str:
    """How a run that was begun from Python is resumed."""
    return "make the same call again, with the same run_dir"


@dataclass(frozen=True)
class Resume:
    """What is done with a run that a folder holds already.

    Attributes:
        resume: tells the user how a run in this folder is resumed when it ends early.
        retry_failures: measures again what failed.
        allow_other_machine: goes on with what was begun on another machine.
    """

    resume: Callable[[Path], str] = same_call
    retry_failures: bool = False
    allow_other_machine: bool = False


DEFAULT_RESUME = Resume()


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
    run_dir: str | Path | RunFolder | None = None,
    callbacks: Sequence[L.Callback] = (),
    progress: bool = False,
    console: Console | None = None,
    notes: Sequence[str] = (),
    resume: Resume = DEFAULT_RESUME,
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
        resume: what is done with a run that the folder holds.

    Raises:
        EvaluationError: as `perplexity`.
    """
    folder = RunFolder(run_dir) if isinstance(run_dir, str | Path) else run_dir
    config = _config(module, data, precision=precision, accelerator=accelerator)
    config_yaml = _config_yaml(config, notes)
    recorder = RunRecorder(
        folder,
        command="evaluate",
        config_yaml=config_yaml,
        resume=resume.resume,
        console=console,
        retry_failures=resume.retry_failures,
        allow_other_machine=resume.allow_other_machine,
    )
    with _run(folder, data, [*callbacks, recorder], precision, accelerator, progress=progress) as trainer:
        trainer.test(module, datamodule=data, verbose=False)
    assert module.result is not None
    return module.result


def run_continuation(
    module: MusicGenEvaluation,
    data: WindowDataModule,
    *,
    precision: str = "32-true",
    accelerator: str = "auto",
    run_dir: str | Path | RunFolder | None = None,
    callbacks: Sequence[L.Callback] = (),
    progress: bool = False,
    console: Console | None = None,
    notes: Sequence[str] = (),
    audio: AudioSettings | None = None,
    return_continuations: bool = True,
    resume: Resume = DEFAULT_RESUME,
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
        resume: what is done with a run that the folder holds.

    Raises:
        EvaluationError: as `generate`.
    """
    folder = RunFolder(run_dir) if isinstance(run_dir, str | Path) else run_dir
    audio = audio or AudioSettings()
    config = {**_config(module, data, precision=precision, accelerator=accelerator), "audio": asdict(audio)}
    if not module.prepare("continue").metrics:
        config["model"] = {**config["model"], "metrics": {}}
    config_yaml = _config_yaml(config, notes)
    recorder = RunRecorder(
        folder,
        command="generate",
        config_yaml=config_yaml,
        resume=resume.resume,
        console=console,
        audio=audio,
        retry_failures=resume.retry_failures,
        allow_other_machine=resume.allow_other_machine,
    )
    with _run(folder, data, [*callbacks, recorder], precision, accelerator, progress=progress) as trainer:
        batches = trainer.predict(module, datamodule=data, return_predictions=return_continuations)
    assert module.result is not None
    continuations = [continuation for batch in batches or [] for continuation in batch]
    if folder is not None and return_continuations:
        continuations += _earlier(module, folder, {(one.window.track, one.window.index) for one in continuations})
    order = {track: row for row, track in enumerate(module.data.plan.tracks.ids)} if module.data.plan else {}
    continuations.sort(key=lambda one: (order[one.window.track], one.window.index))
    return GenerationResult(continuations, module.result)


def _earlier(module: MusicGenEvaluation, folder: RunFolder, known: Collection[tuple[str, int]]) -> list[Continuation]:
    """The continuations that earlier starts of a run have written."""
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
                seed=module.seed,
                path=path,
                context_path=context,
                reference_path=reference,
            )
        )
    return earlier


@contextmanager
def _run(
    folder: RunFolder | None,
    data: WindowDataModule,
    callbacks: Sequence[L.Callback],
    precision: str,
    accelerator: str,
    *,
    progress: bool,
) -> Iterator[L.Trainer]:
    """A quiet Trainer for one device, and a claimed folder."""
    check_precision(precision, accelerator)
    stop = StopAfterBatch(say=lambda line: print(line, file=sys.stderr))
    with quiet_libraries(), stop.listening():
        try:
            trainer = L.Trainer(
                accelerator=accelerator,
                devices=one_device(accelerator),
                plugins=[OneProcess()],
                precision=precision,  # type: ignore[arg-type]
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=progress,
                use_distributed_sampler=False,
                callbacks=[stop, *callbacks],
            )
        except (ValueError, MisconfigurationException) as error:
            raise RunError(f"accelerator {accelerator!r}: {error}") from error
        if folder is not None:
            folder.claim()
        try:
            with dead_workers_named(), out_of_memory_explained(data.settings.batch_size, "moving data to it"):
                yield trainer
        except SystemExit as stopped:
            if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning would end a notebook with it
                raise KeyboardInterrupt from stopped
            raise


def _config(module: MusicGenEvaluation, data: WindowDataModule, *, precision: str, accelerator: str) -> dict[str, Any]:
    return {
        "trainer": {"precision": precision, "accelerator": accelerator},
        "model": {**module.settings, "checkpoint": lasting_name(str(module.settings["checkpoint"]))},
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
