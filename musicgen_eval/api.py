"""The Python door: `perplexity` of a file, a folder, a manifest or a tensor, and `generate`, which continues it, in one call.

perplexity(audio, checkpoint) = MusicGenEvaluation + WindowDataModule + a quiet Trainer, as the CLI puts them together
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.nn import Module
from transformers import MusicgenForConditionalGeneration

from musicgen_eval.audio.writer import write_audio
from musicgen_eval.data.sources import Source
from musicgen_eval.data.windows import whole_frames
from musicgen_eval.errors import AudioError, RunError
from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.metrics.plugin.entries import GivenMetric
from musicgen_eval.models.checkpoint import refuse_other_types
from musicgen_eval.models.musicgen import MusicGen, load_model
from musicgen_eval.records import CodecSpec, ContinuationSettings
from musicgen_eval.results.summary import EvaluationResult
from musicgen_eval.runs.argument_types import checked_arguments
from musicgen_eval.runs.continuation_files import AudioSettings
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.library_output import quiet_libraries
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.processes.one_process import own_defaults
from musicgen_eval.runs.runner import GenerationResult, Resume, run_continuation, run_evaluation

Audio = str | Path | Sequence[str | Path] | Tensor
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
        nll: track id -> (K, T) float32 nats of every code of the track, NaN where not scored; with a run_dir read from there when
            it is asked for.
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


@checked_arguments
@own_defaults()
def perplexity(
    audio: Audio,
    checkpoint: str | Path | MusicGen | MusicgenForConditionalGeneration = "demo",
    revision: str | None = None,
    *,
    sample_rate_hz: int | None = None,
    text: str | None = None,
    context_s: float | None = None,
    target_s: float | None = None,
    head: Literal["score", "skip"] = "score",
    tail: Literal["score", "drop"] = "score",
    metrics: Mapping[str, GivenMetric] | None = None,
    precision: Precision = "32-true",
    accelerator: str = "auto",
    batch_size: int = 8,
    limit: int | None = None,
    min_duration_s: float = 0.0,
    max_failures: int = 0,
    max_frames: int | None = None,
    allow_beyond_limit: bool = False,
    run_dir: str | Path | None = None,
    retry_failures: bool = False,
    allow_other_machine: bool = False,
) -> PerplexityResult:
    """The perplexity that a MusicGen checkpoint assigns to music, every code scored exactly once.

    Args:
        audio: a file, folder, glob or manifest, or a list of these; or a (C, N) or (N,) floating point tensor in [-1, 1].
        checkpoint: `demo`, a hub name, a folder, a model from `load_model`, whose decoder then takes on `precision`, or a
            transformers model in memory, which is copied and not changed.
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
        run_dir: where to leave the files of a run; None: nowhere. A run that it holds already is gone on with.
        retry_failures: of such a run, measures again what failed.
        allow_other_machine: goes on with a run that was begun on another machine.

    Returns:
        The numbers.

    Raises:
        EvaluationError: whatever is wrong with audio, checkpoint, metrics or settings; its subclasses say what.
    """
    if metrics and "perplexity" in metrics:
        raise RunError("the metric name 'perplexity' is taken; choose another")
    module = _module(
        checkpoint,
        revision,
        max_frames,
        metrics={"perplexity": CodebookPerplexity(), **(metrics or {})},
        tail=tail,
        save_nll=True,
    )
    with _source(audio, sample_rate_hz) as source:
        data = WindowDataModule(
            source=source,
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
        evaluation = run_evaluation(
            module,
            data,
            precision=precision,
            accelerator=accelerator,
            run_dir=run_dir,
            notes=_notes(audio, checkpoint, metrics),
            resume=Resume(retry_failures=retry_failures, allow_other_machine=allow_other_machine),
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


@checked_arguments
@own_defaults()
def generate(
    audio: Audio,
    text: str | None = None,
    checkpoint: str | Path | MusicGen | MusicgenForConditionalGeneration = "demo",
    revision: str | None = None,
    *,
    sample_rate_hz: int | None = None,
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
    metrics: Mapping[str, GivenMetric] | None = None,
    precision: Precision = "32-true",
    accelerator: str = "auto",
    batch_size: int = 8,
    limit: int | None = None,
    min_duration_s: float = 0.0,
    max_failures: int = 0,
    max_frames: int | None = None,
    format: Literal["flac", "wav", "mp3"] = "flac",
    hold: Literal["continuation", "joined"] = "continuation",
    originals: bool = True,
    run_dir: str | Path | None = None,
    retry_failures: bool = False,
    allow_other_machine: bool = False,
) -> GenerationResult:
    """Continues music: a MusicGen checkpoint hears the first part of each track and goes on.

    Args:
        audio: a file, folder, glob or manifest, or a list of these; or a (C, N) or (N,) floating point tensor in [-1, 1].
        text: prompt of tracks that have none of their own.
        checkpoint: `demo`, a hub name, a folder, a model from `load_model`, whose decoder then takes on `precision`, or a
            transformers model in memory, which is copied and not changed.
        revision: hub branch, tag or commit.
        sample_rate_hz: rate of a tensor; only, and always, with one.
        context_s: where in the track the continuation begins; default: in its middle.
        duration_s: how long it gets, in seconds; default: up to the track's end.
        max_new_frames: how long it gets, in frames; in place of duration_s.
        stride_s: by how much the window slides past the checkpoint's limit; default: 3/5 of the limit.
        guidance_scale: of classifier-free guidance; 1 is none.
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: draws from so many of the likeliest codes; None: all.
        top_p: draws from the likeliest codes that reach this probability together; None: all.
        num_continuations: how many times each track is continued.
        threads: of a CPU, for drawing and decoding; None: as many as torch has.
        kernels: how decode steps run on CUDA: `graph`, `compiled` or `eager` (see `ContinuationSettings`).
        seed: of the numbers that codes are drawn with; the same seed gives the same codes.
        metrics: plug-in metrics by name; their results are in `evaluation.metrics`.
        precision: of the decoder.
        accelerator: as Lightning's.
        batch_size: continuations a step.
        limit: only the first tracks.
        min_duration_s: tracks shorter than this are skipped, and counted.
        max_failures: how many tracks may fail.
        max_frames: overrides the longest window that the checkpoint states.
        format: of the files in run_dir.
        hold: what a file holds: the `continuation` alone, or `joined` to the track up to it.
        originals: whether the context and the true continuation are written too.
        run_dir: where to write continuations and the files of a run; None: nowhere, the audio stays in memory. A run that it holds
            already is gone on with.
        retry_failures: of such a run, continues again what failed.
        allow_other_machine: goes on with a run that was begun on another machine.

    Returns:
        The continuations, and what was measured of them.

    Raises:
        EvaluationError: whatever is wrong with audio, checkpoint, metrics or settings; its subclasses say what.
    """
    audio_settings = AudioSettings(format=format, hold=hold, originals=originals)
    if run_dir is None and audio_settings != AudioSettings():
        raise RunError("format, hold and originals say how files are written; give a run_dir, or leave them out")
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
    module = _module(
        checkpoint, revision, max_frames, metrics=dict(metrics or {}), seed=seed, continuation=continuation
    )
    with quiet_libraries():
        spec = module.spec
    with _source(audio, sample_rate_hz) as source:
        data = WindowDataModule(
            source=source,
            text=text,
            context_s=context_s,
            target_s=continuation_seconds(duration_s, max_new_frames, spec),
            batch_size=batch_size,
            limit=limit,
            min_duration_s=min_duration_s,
            max_failures=max_failures,
        )
        return run_continuation(
            module,
            data,
            precision=precision,
            accelerator=accelerator,
            run_dir=run_dir,
            notes=_notes(audio, checkpoint, metrics),
            audio=audio_settings,
            resume=Resume(retry_failures=retry_failures, allow_other_machine=allow_other_machine),
        )


def continuation_seconds(duration_s: float | None, max_new_frames: int | None, spec: CodecSpec) -> float | None:
    """How long a continuation gets, from the two ways to say it.

    Raises:
        RunError: both were given, or less than a frame.
        WindowError: no whole number of frames.
    """
    if duration_s is not None and max_new_frames is not None:
        raise RunError(
            f"duration_s={duration_s:g} and max_new_frames={max_new_frames} say the same thing; give one of them"
        )
    if max_new_frames is not None and max_new_frames < 1:
        raise RunError(f"max_new_frames must be at least 1, got {max_new_frames}")
    if duration_s is not None:
        if not duration_s * spec.frame_rate_hz >= 1 - 1e-6:
            raise RunError(f"duration_s={duration_s:g} is shorter than one frame ({1 / spec.frame_rate_hz:g} s)")
        whole_frames(duration_s, spec.frame_rate_hz, setting="duration_s")
    return duration_s if max_new_frames is None else max_new_frames / spec.frame_rate_hz


def _module(
    checkpoint: str | Path | MusicGen | MusicgenForConditionalGeneration,
    revision: str | None,
    max_frames: int | None,
    **settings: Any,
) -> MusicGenEvaluation:
    if isinstance(checkpoint, MusicgenForConditionalGeneration):
        with quiet_libraries():
            loaded = load_model(checkpoint, revision=revision, max_frames=max_frames)
        return MusicGenEvaluation.from_loaded(loaded, **settings)
    if not isinstance(checkpoint, MusicGen):
        refuse_other_types(checkpoint)
        return MusicGenEvaluation(str(checkpoint), revision, max_frames, **settings)
    if revision is not None or max_frames is not None:
        raise RunError("revision and max_frames are settled when a model is loaded; pass them to load_model")
    return MusicGenEvaluation.from_loaded(checkpoint, **settings)


def _notes(audio: Audio, checkpoint: object, metrics: Mapping[str, Any] | None) -> list[str]:
    """What config.yaml cannot say of a run from Python."""
    return [
        *(["the audio was a tensor: data.source is gone"] if isinstance(audio, Tensor) else []),
        *(["the model was given loaded: model.checkpoint is its name"] if isinstance(checkpoint, Module) else []),
        *([f"metrics were given in Python and are not named here: {', '.join(metrics)}"] if metrics else []),
    ]


@contextmanager
def _source(audio: Audio, sample_rate_hz: int | None) -> Iterator[Source]:
    """The source as paths; a tensor becomes a float32 wav, which keeps every bit, so that one reader serves all."""
    if not isinstance(audio, Tensor):
        source = _paths(audio)
        if sample_rate_hz is not None:
            raise AudioError(f"sample_rate_hz goes with a tensor; {audio} knows its own")
        yield source
        return
    if sample_rate_hz is None or sample_rate_hz <= 0:
        raise AudioError(f"a tensor needs its rate: sample_rate_hz must be above 0, got {sample_rate_hz}")
    wave = audio.detach().cpu()
    wave = wave.unsqueeze(0) if wave.dim() == 1 else wave
    if wave.dim() != 2 or not wave.is_floating_point() or wave.shape[0] not in (1, 2) or not wave.numel():
        raise AudioError(
            "audio must be a (C, N) or (N,) floating point tensor of one or two channels, got "
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
        f"audio must be a path, a list of paths or a torch tensor, got {kind} (torch.from_numpy makes a tensor)"
    )
