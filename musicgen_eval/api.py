"""The Python door: `perplexity` of a file, a folder, a manifest or a tensor, in one call.

perplexity(audio, checkpoint) = MusicGenEvaluation + WindowDataModule + a quiet Trainer, as the CLI puts them together
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.audio.writing import write_audio
from musicgen_eval.bank import MetricEntry
from musicgen_eval.data import WindowDataModule
from musicgen_eval.errors import AudioError, RunError
from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.module import PRECISIONS, MusicGenEvaluation
from musicgen_eval.quiet import quiet_libraries
from musicgen_eval.results import EvaluationResult
from musicgen_eval.run_folder import RunFolder, lasting_source, to_json
from musicgen_eval.writer import RunWriter

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


@dataclass(frozen=True)
class PerplexityResult:
    """The perplexity of a source.

    Attributes:
        ppl: exp of `ce`.
        ce: mean over codebooks of the mean nll, nats a code.
        bits_per_second: frame rate * sum over codebooks of the mean nll, in bits.
        ppl_per_codebook: (K,) numbers.
        ce_per_codebook: (K,) numbers, nats.
        ppl_per_track: track id -> its own perplexity.
        nll: track id -> (K, T) float32 nats of every code of the track, NaN where not scored.
        evaluation: everything, with intervals, windows, counts and recipe.
    """

    ppl: float
    ce: float
    bits_per_second: float
    ppl_per_codebook: tuple[float, ...]
    ce_per_codebook: tuple[float, ...]
    ppl_per_track: Mapping[str, float]
    nll: Mapping[str, Tensor]
    evaluation: EvaluationResult


def perplexity(
    audio: str | Path | Tensor,
    checkpoint: str | Path | MusicGen = "demo",
    revision: str | None = None,
    *,
    sample_rate_hz: int | None = None,
    text: str | None = None,
    context_s: float | None = None,
    target_s: float | None = None,
    head: Literal["score", "skip"] = "score",
    tail: Literal["score", "drop"] = "score",
    metrics: Mapping[str, Metric | MetricEntry] | None = None,
    precision: Precision = "32-true",
    accelerator: str = "auto",
    batch_size: int = 8,
    limit: int | None = None,
    min_duration_s: float = 0.0,
    max_failures: int = 0,
    max_frames: int | None = None,
    allow_beyond_limit: bool = False,
    run_dir: str | Path | None = None,
) -> PerplexityResult:
    """The perplexity that a MusicGen checkpoint assigns to music, every code scored exactly once.

    Args:
        audio: a file, folder, glob or manifest; or a (C, N) or (N,) floating point tensor in [-1, 1].
        checkpoint: `demo`, a hub name, a folder, or a loaded model, whose decoder then takes on `precision`.
        revision: hub branch, tag or commit.
        sample_rate_hz: rate of a tensor; only, and always, with one.
        text: text of tracks that have none of their own.
        context_s: seconds heard before each target; default: half of the checkpoint's limit.
        target_s: seconds scored in each window; default: half of the checkpoint's limit.
        head: `score`: every code of a track counts; `skip`: only those with a full context.
        tail: `score`: every codebook counts to its last frame; `drop`: as audiocraft.
        metrics: further plug-in metrics by name; their results are in `evaluation.metrics`.
        precision: of the decoder.
        accelerator: as Lightning's.
        batch_size: windows a step.
        limit: only the first tracks.
        min_duration_s: tracks shorter than this are skipped, and counted.
        max_failures: how many tracks may fail.
        max_frames: overrides the longest window that the checkpoint states.
        allow_beyond_limit: allows windows longer than that.
        run_dir: where to leave the files of a run; None: nowhere.

    Returns:
        The numbers.

    Raises:
        EvaluationError: whatever is wrong with audio, checkpoint, metrics or settings; its subclasses say what.
    """
    if metrics and "perplexity" in metrics:
        raise RunError("the metric name 'perplexity' is taken; choose another")
    settings: dict[str, Any] = {
        "metrics": {"perplexity": CodebookPerplexity(), **(metrics or {})},
        "tail": tail,
        "save_nll": True,
    }
    if isinstance(checkpoint, MusicGen):
        if revision is not None or max_frames is not None:
            raise RunError("revision and max_frames are settled when a model is loaded; pass them to load_model")
        module = MusicGenEvaluation.from_loaded(checkpoint, **settings)
    else:
        module = MusicGenEvaluation(str(checkpoint), revision, max_frames, **settings)
    with tempfile.TemporaryDirectory(prefix="musicgen_eval-") as scratch:
        data = WindowDataModule(
            source=_source(audio, sample_rate_hz, Path(scratch)),
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
        notes = [
            *(["the audio was a tensor: data.source is gone"] if isinstance(audio, Tensor) else []),
            *(["the model was given loaded: model.checkpoint is its name"] if isinstance(checkpoint, MusicGen) else []),
            *([f"metrics were given in Python and are not named here: {', '.join(metrics)}"] if metrics else []),
        ]
        evaluation = run_evaluation(
            module, data, precision=precision, accelerator=accelerator, run_dir=run_dir, notes=notes
        )
    values = evaluation.metrics["perplexity"]
    codebooks = range(1, evaluation.spec.num_codebooks + 1)
    return PerplexityResult(
        ppl=values["ppl"].value,
        ce=values["ce"].value,
        bits_per_second=values["bits_per_second"].value,
        ppl_per_codebook=tuple(values[f"ppl_q{k}"].value for k in codebooks),
        ce_per_codebook=tuple(values[f"ce_q{k}"].value for k in codebooks),
        ppl_per_track={track.id: track.metrics["perplexity"]["ppl"] for track in evaluation.tracks if track.metrics},
        nll=evaluation.nll,
        evaluation=evaluation,
    )


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
    check_precision(precision, accelerator)
    folder = None if run_dir is None else RunFolder(run_dir)
    config = {
        "trainer": {"precision": precision, "accelerator": accelerator},
        "model": module.settings,
        "data": {**vars(data.settings), "source": lasting_source(data.settings.source)},
    }
    config_yaml = "".join(f"# {line}\n" for line in notes) + to_json(config)
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
                callbacks=[*callbacks, RunWriter(folder, command="evaluate", config_yaml=config_yaml, console=console)],
            )
        except (ValueError, MisconfigurationException) as error:
            raise RunError(f"accelerator {accelerator!r}: {error}") from error
        if folder is not None:
            folder.claim()
        try:
            trainer.test(module, datamodule=data, verbose=False)
        except SystemExit as stopped:
            if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning would end a notebook with it
                raise KeyboardInterrupt from stopped
            raise
    assert module.result is not None
    return module.result


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


def _source(audio: str | Path | Tensor, sample_rate_hz: int | None, scratch: Path) -> str:
    """The source as a path; a tensor becomes a float32 wav, which keeps every bit, so that one reader serves all."""
    if not isinstance(audio, Tensor):
        if not isinstance(audio, str | Path):
            raise AudioError(
                f"audio must be a path or a torch tensor, got {type(audio).__name__} (torch.from_numpy makes one)"
            )
        if sample_rate_hz is not None:
            raise AudioError(f"sample_rate_hz goes with a tensor; {audio} knows its own")
        return str(audio)
    if sample_rate_hz is None or sample_rate_hz <= 0:
        raise AudioError(f"a tensor needs its rate: sample_rate_hz must be above 0, got {sample_rate_hz}")
    wave = audio.detach().cpu()
    wave = wave.unsqueeze(0) if wave.dim() == 1 else wave
    if wave.dim() != 2 or not wave.is_floating_point() or wave.shape[0] not in (1, 2) or not wave.numel():
        raise AudioError(
            "audio must be a (C, N) or (N,) floating point tensor of one or two channels, got "
            f"{wave.dtype} {tuple(wave.shape)}"
        )
    path = scratch / "audio.wav"
    write_audio(path, wave.float(), sample_rate_hz, format="wav")
    return str(path)
