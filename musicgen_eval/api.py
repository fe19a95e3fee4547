"""The Python API: `perplexity` scores the music in files, folders, manifests or tensors, and `generate` continues the music.

Like the command `musicgen-eval`, each function creates a `MusicGenEvaluation` and a `WindowDataModule`, and runs them with a
Trainer whose console output is suppressed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import MusicgenForConditionalGeneration

from musicgen_eval.audio.writer import write_audio
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.data.sources import Source
from musicgen_eval.errors import AudioError, RunError
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.metrics.plugin.entries import GivenMetric
from musicgen_eval.models.musicgen import MusicGen, load_model
from musicgen_eval.records.signatures import takes_settings
from musicgen_eval.results.evaluation_result import EvaluationResult
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.library_output import quiet_libraries
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.processes.one_process import own_defaults
from musicgen_eval.runs.runner import GenerationResult, run_continuation, run_evaluation
from musicgen_eval.runs.settings import AudioSettings, LengthSettings, ModelSettings, RunSettings

Audio = str | Path | Sequence[str | Path] | Tensor
AnyCheckpoint = str | Path | MusicGen | MusicgenForConditionalGeneration


@dataclass(frozen=True)
class PerplexityResult:
    """The result of `perplexity`.

    Attributes:
        ppl: Perplexity, exp(`ce`).
        ce: Cross entropy: the mean nll of each codebook, averaged over the codebooks, in nats per code.
        bits_per_second: Frame rate times the sum of the codebooks' mean nlls, converted to bits.
        ppl_per_codebook: (K,) perplexity of each codebook.
        ce_per_codebook: (K,) mean nll of each codebook, in nats per code.
        ppl_per_track: Mapping from track id to the perplexity of the track.
        nll: Mapping from track id to the (K, T) float32 nll of the track's codes, in nats. NaN for codes that were not scored. If
            the run has a folder, the values are read from that folder on access.
        evaluation: The complete result, including intervals, windows, counts and the recipe.
    """

    ppl: float
    ce: float
    bits_per_second: float
    ppl_per_codebook: tuple[float, ...]
    ce_per_codebook: tuple[float, ...]
    ppl_per_track: Mapping[str, float]
    nll: Mapping[str, Tensor]
    evaluation: EvaluationResult


@takes_settings(
    task="score", positional=("audio", "checkpoint", "revision"), without=("source", "save_nll", "seed", "resume")
)
@own_defaults()
def perplexity(
    audio: Audio,
    checkpoint: AnyCheckpoint = "demo",
    *,
    sample_rate_hz: int | None = None,
    metrics: Mapping[str, GivenMetric] | None = None,
    data: DataSettings,
    model: ModelSettings,
    run: RunSettings,
) -> PerplexityResult:
    """Computes the perplexity that a MusicGen checkpoint assigns to music. Every code is scored exactly once.

    Args:
        audio: A file, a folder, a glob, a manifest, or a list of these; or a (C, N) or (N,) floating-point tensor in [-1, 1].
        checkpoint: `demo`, a name on the Hugging Face Hub, a folder, a model from `load_model` (its decoder is converted to
            `precision`), or a transformers model in memory (it is copied, not changed).
        sample_rate_hz: Sample rate of `audio`. Required if `audio` is a tensor, and not allowed otherwise.
        metrics: Additional metrics, by name. `evaluation.metrics` of the returned object contains their results.

    Returns:
        The perplexity of the data set, of each codebook and of each track, and the nll of each code.

    Raises:
        EvaluationError: The audio, checkpoint, metrics or settings are invalid. The subclass of the error indicates which.
    """
    if metrics and "perplexity" in metrics:
        raise RunError("metrics contains the name 'perplexity', which is reserved; choose another name")
    module = _module(
        checkpoint,
        replace(model, save_nll=True),
        metrics={"perplexity": CodebookPerplexity(), **(metrics or {})},
    )
    with _source(audio, sample_rate_hz) as source:
        evaluation = run_evaluation(
            module,
            WindowDataModule(**vars(replace(data, source=source))),
            run,
            notes=_notes(audio, checkpoint, metrics),
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


@takes_settings(
    task="continue", positional=("audio", "text", "checkpoint", "revision"), without=("source", "target_s", "resume")
)
@own_defaults()
def generate(
    audio: Audio,
    checkpoint: AnyCheckpoint = "demo",
    *,
    sample_rate_hz: int | None = None,
    metrics: Mapping[str, GivenMetric] | None = None,
    data: DataSettings,
    length: LengthSettings,
    model: ModelSettings,
    continuation: ContinuationSettings,
    files: AudioSettings,
    run: RunSettings,
) -> GenerationResult:
    """Continues music: a MusicGen checkpoint receives the first part of each track and generates a continuation.

    Args:
        audio: A file, a folder, a glob, a manifest, or a list of these; or a (C, N) or (N,) floating-point tensor in [-1, 1].
        checkpoint: `demo`, a name on the Hugging Face Hub, a folder, a model from `load_model` (its decoder is converted to
            `precision`), or a transformers model in memory (it is copied, not changed).
        sample_rate_hz: Sample rate of `audio`. Required if `audio` is a tensor, and not allowed otherwise.
        metrics: Metrics, by name. `evaluation.metrics` of the returned object contains their results.

    Returns:
        The continuations and their evaluation. If `run_dir` is not set, the audio is kept in memory.

    Raises:
        EvaluationError: The audio, checkpoint, metrics or settings are invalid. The subclass of the error indicates which.
    """
    if run.run_dir is None and files != AudioSettings():
        raise RunError(
            "format, layout and originals have no effect without run_dir; specify run_dir, or remove these arguments"
        )
    module = _module(checkpoint, model, metrics=dict(metrics or {}), continuation=continuation)
    with quiet_libraries():
        spec = module.spec
    with _source(audio, sample_rate_hz) as source:
        return run_continuation(
            module,
            WindowDataModule(**vars(replace(data, source=source, target_s=length.seconds(spec)))),
            run,
            audio=files,
            notes=_notes(audio, checkpoint, metrics),
        )


def _module(checkpoint: AnyCheckpoint, settings: ModelSettings, **further: Any) -> MusicGenEvaluation:
    """Creates the evaluation module for a checkpoint, a loaded model or a transformers model."""
    if not isinstance(checkpoint, MusicGen | MusicgenForConditionalGeneration):
        return MusicGenEvaluation(**vars(replace(settings, checkpoint=checkpoint)), **further)
    if isinstance(checkpoint, MusicgenForConditionalGeneration):
        with quiet_libraries():
            model = load_model(checkpoint, revision=settings.revision, max_frames=settings.max_frames)
    elif settings.revision is not None or settings.max_frames is not None:
        raise RunError("revision and max_frames have no effect on a loaded model; pass them to load_model")
    else:
        model = checkpoint
    how = {
        name: value for name, value in vars(settings).items() if name not in ("checkpoint", "revision", "max_frames")
    }
    return MusicGenEvaluation.from_loaded(model, **how, **further)


def _notes(audio: Audio, checkpoint: object, metrics: Mapping[str, Any] | None) -> list[str]:
    """Returns comments for config.yaml about arguments that this file cannot represent."""
    return [
        *(["the audio was a tensor, so data.source no longer exists"] if isinstance(audio, Tensor) else []),
        *(["the model was in memory, so model.checkpoint is only its name"] if isinstance(checkpoint, Module) else []),
        *([f"metrics that were passed in Python are missing: {', '.join(metrics)}"] if metrics else []),
    ]


@contextmanager
def _source(audio: Audio, sample_rate_hz: int | None) -> Iterator[Source]:
    """Yields the audio as one or more paths. A tensor is written to a temporary WAV file, which stores float32 samples exactly."""
    if not isinstance(audio, Tensor):
        source = _paths(audio)
        if sample_rate_hz is not None:
            raise AudioError(f"sample_rate_hz applies only to tensors, but audio is {audio}; remove sample_rate_hz")
        yield source
        return
    if sample_rate_hz is None or sample_rate_hz <= 0:
        raise AudioError(f"audio is a tensor, so sample_rate_hz must be a number above 0, got {sample_rate_hz}")
    wave = audio.detach().cpu()
    wave = wave.unsqueeze(0) if wave.dim() == 1 else wave
    if wave.dim() != 2 or not wave.is_floating_point() or wave.shape[0] not in (1, 2) or not wave.numel():
        raise AudioError(
            "audio must be a (C, N) or (N,) floating-point tensor with one or two channels, got "
            f"{wave.dtype} {tuple(wave.shape)}"
        )
    with tempfile.TemporaryDirectory(prefix="musicgen_eval-") as scratch:
        path = Path(scratch) / "audio.wav"
        write_audio(path, wave.float(), sample_rate_hz, format="wav")
        yield str(path)


def _paths(audio: str | Path | Sequence[str | Path]) -> Source:
    if isinstance(audio, str | Path):
        return str(audio)
    if isinstance(audio, Sequence) and all(isinstance(one, str | Path) for one in audio):
        return [str(one) for one in audio]
    kind = type(audio).__name__
    raise AudioError(
        f"audio must be a path, a list of paths or a torch tensor, got {kind}; convert numpy arrays with torch.from_numpy"
    )
