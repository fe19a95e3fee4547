"""Public names of musicgen_eval. Written by tools/write_stub.py; do not edit."""

from collections.abc import Mapping, Sequence
from musicgen_eval.metrics.plugin.contract import InstalledMetric
from pathlib import Path
from torch import Tensor
from torchmetrics.metric import Metric
from transformers.models.musicgen.modeling_musicgen import MusicgenForCausalLM, MusicgenForConditionalGeneration
from typing import Literal

from musicgen_eval.api import GenerationResult as GenerationResult
from musicgen_eval.api import PerplexityResult as PerplexityResult
from musicgen_eval.data.windows import plan_windows as plan_windows
from musicgen_eval.inference.scoring import nll_from_logits as nll_from_logits
from musicgen_eval.inference.scoring import score_and_rank_codes as score_and_rank_codes
from musicgen_eval.inference.scoring import score_codes as score_codes
from musicgen_eval.inference.settings import ContinuationSettings as ContinuationSettings
from musicgen_eval.metrics import CodebookAccuracy as CodebookAccuracy
from musicgen_eval.metrics import CodebookPerplexity as CodebookPerplexity
from musicgen_eval.metrics import ContextGain as ContextGain
from musicgen_eval.metrics import LocalPerplexity as LocalPerplexity
from musicgen_eval.metrics import PositionProfile as PositionProfile
from musicgen_eval.metrics import SeamDiscontinuity as SeamDiscontinuity
from musicgen_eval.metrics import TextGain as TextGain
from musicgen_eval.metrics.plugin.contract import MetricEntry as MetricEntry
from musicgen_eval.metrics.plugin.providers import InputProvider as InputProvider
from musicgen_eval.models.checkpoint import find_checkpoint as find_checkpoint
from musicgen_eval.models.delay import delay_codes as delay_codes
from musicgen_eval.models.delay import undelay_codes as undelay_codes
from musicgen_eval.models.musicgen import MusicGen as MusicGen
from musicgen_eval.models.musicgen import load_model as load_model
from musicgen_eval.records import CodecSpec as CodecSpec
from musicgen_eval.records import Continuation as Continuation
from musicgen_eval.records import Reading as Reading
from musicgen_eval.records import Track as Track
from musicgen_eval.records import Window as Window
from musicgen_eval.results.stored_run import StoredRun as StoredRun
from musicgen_eval.results.stored_run import load_run as load_run
from musicgen_eval.runs.datamodule import WindowDataModule as _WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation as _MusicGenEvaluation

PUBLIC_NAMES: Mapping[str, str]
ORIGINAL_NAMES: Mapping[str, str]

def generate(
    audio: str | Path | Sequence[str | Path] | Tensor,
    text: str | None = None,
    checkpoint: str | Path | MusicGen | MusicgenForConditionalGeneration = "demo",
    revision: str | None = None,
    *,
    sample_rate_hz: int | None = None,
    metrics: Mapping[str, Metric | MetricEntry | InstalledMetric] | None = None,
    context_s: float | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    limit: int | None = None,
    min_duration_s: float = 0.0,
    max_failures: int = 0,
    duration_s: float | None = None,
    max_new_frames: int | None = None,
    max_frames: int | None = None,
    seed: int = 0,
    guidance_scale: float = 3.0,
    temperature: float = 1.0,
    top_k: int | None = 250,
    top_p: float | None = None,
    stride_s: float | None = None,
    num_continuations: int = 1,
    threads: int | None = None,
    kernels: Literal["graph", "compiled", "eager"] = "graph",
    format: Literal["flac", "wav", "mp3"] = "flac",
    layout: Literal["continuation", "joined"] = "continuation",
    originals: bool = True,
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true",
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto",
    run_dir: str | Path | None = None,
    retry_failures: bool = False,
    allow_other_machine: bool = False,
) -> GenerationResult:
    """Continues music: a MusicGen checkpoint receives the first part of each track and generates a continuation.

    Args:
        audio: A file, a folder, a glob, a manifest, or a list of these; or a (C, N) or (N,) floating-point tensor in [-1, 1].
        text: Text description for tracks that have none of their own.
        checkpoint: `demo`, a name on the Hugging Face Hub, a folder, a model from `load_model` (its decoder is converted to
            `precision`), or a transformers model in memory (it is copied, not changed).
        revision: Branch, tag or commit of the checkpoint on the Hugging Face Hub.
        sample_rate_hz: Sample rate of `audio`. Required if `audio` is a tensor, and not allowed otherwise.
        metrics: Metrics, by name. `evaluation.metrics` of the returned object contains their results.
        context_s: Time in the track at which the continuation starts, in seconds. Defaults to the
            middle of the track.
        batch_size: Number of windows per batch. On a CPU, the windows of a batch are processed in
            parallel with one thread each, so use at least one window per core.
        num_workers: Number of processes that read audio. 0 means that the main process reads the audio.
        limit: Number of tracks to process, from the start of the source. Defaults to all tracks.
        min_duration_s: Minimum length of a track, in seconds. Shorter tracks are skipped and counted in
            the result.
        max_failures: Number of tracks that may fail before the run stops with an error.
        duration_s: Length of the continuation, in seconds. Defaults to the rest of the track.
        max_new_frames: Length of the continuation, in frames. Cannot be combined with duration_s.
        max_frames: Length of the longest window, in frames. Defaults to the checkpoint's own limit.
        seed: Seed for sampling codes, and for metric inputs that alter codes at random. The same seed
            gives the same codes.
        guidance_scale: Scale of classifier-free guidance. 1 turns guidance off. Has no effect if the
            track has no text.
        temperature: Divisor of the logits. 0 selects the most likely code.
        top_k: Number of most likely codes to sample from. None means all codes.
        top_p: Nucleus sampling: after `top_k` has been applied, codes are sampled from the smallest set
            whose total probability reaches `top_p`. None means all codes.
        stride_s: Number of seconds by which the window slides if the prompt and the continuation
            together exceed the checkpoint's limit. Defaults to 3/5 of the limit.
        num_continuations: Number of continuations per track, each with its own random numbers.
        threads: Number of CPU threads for generating codes and decoding audio. Defaults to the number
            that torch uses. The number of threads affects the last bits of the results, and can
            therefore change which codes are sampled. Decoding steps for small batches always use one
            thread.
        kernels: Implementation of decoding steps on CUDA. `graph` replays a CUDA graph, `compiled`
            replays a graph of kernels that `torch.compile` has fused, and `eager` launches each kernel
            individually. Ignored on CPUs, which have their own kernels.
        format: Format of the audio files.
        layout: Content of each continuation file. `continuation` is the generated audio alone.
            `joined`, intended for listening, is the track up to the boundary followed by the generated
            audio, with a crossfade of 40 ms.
        originals: Whether to write the context and the reference of each track as well.
        precision: Precision of the decoder.
        accelerator: Type of device. `auto` selects a GPU if there is one.
        run_dir: Folder for the results. If the folder already contains this run, the run is resumed. On
            the command line, the folder defaults to runs/<date>-<command>. The Python functions write
            no files by default.
        retry_failures: Whether a resumed run retries its failed tracks.
        allow_other_machine: Whether to resume a run that was started on a different machine. The
            results may then differ in the last bits. Both machines are recorded in the results.

    Returns:
        The continuations and their evaluation. If `run_dir` is not set, the audio is kept in memory.

    Raises:
        EvaluationError: The audio, checkpoint, metrics or settings are invalid. The subclass of the error indicates which.
    """

def perplexity(
    audio: str | Path | Sequence[str | Path] | Tensor,
    checkpoint: str | Path | MusicGen | MusicgenForConditionalGeneration = "demo",
    revision: str | None = None,
    *,
    sample_rate_hz: int | None = None,
    metrics: Mapping[str, Metric | MetricEntry | InstalledMetric] | None = None,
    text: str | None = None,
    context_s: float | None = None,
    target_s: float | None = None,
    head: Literal["score", "skip"] = "score",
    batch_size: int = 8,
    num_workers: int = 0,
    limit: int | None = None,
    min_duration_s: float = 0.0,
    max_failures: int = 0,
    allow_beyond_limit: bool = False,
    max_frames: int | None = None,
    tail: Literal["score", "drop"] = "score",
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true",
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto",
    run_dir: str | Path | None = None,
    retry_failures: bool = False,
    allow_other_machine: bool = False,
) -> PerplexityResult:
    """Computes the perplexity that a MusicGen checkpoint assigns to music. Every code is scored exactly once.

    Args:
        audio: A file, a folder, a glob, a manifest, or a list of these; or a (C, N) or (N,) floating-point tensor in [-1, 1].
        checkpoint: `demo`, a name on the Hugging Face Hub, a folder, a model from `load_model` (its decoder is converted to
            `precision`), or a transformers model in memory (it is copied, not changed).
        revision: Branch, tag or commit of the checkpoint on the Hugging Face Hub.
        sample_rate_hz: Sample rate of `audio`. Required if `audio` is a tensor, and not allowed otherwise.
        metrics: Additional metrics, by name. `evaluation.metrics` of the returned object contains their results.
        text: Text description for tracks that have none of their own.
        context_s: Length of the context before each target, in seconds. Defaults to half of the
            checkpoint's limit.
        target_s: Length of the target of each window, in seconds. Defaults to half of the checkpoint's
            limit.
        head: Treatment of the start of a track. `score` scores the whole first window, so that every
            code of a track is counted once. `skip` scores only codes with a full context.
        batch_size: Number of windows per batch. On a CPU, the windows of a batch are processed in
            parallel with one thread each, so use at least one window per core.
        num_workers: Number of processes that read audio. 0 means that the main process reads the audio.
        limit: Number of tracks to process, from the start of the source. Defaults to all tracks.
        min_duration_s: Minimum length of a track, in seconds. Shorter tracks are skipped and counted in
            the result.
        max_failures: Number of tracks that may fail before the run stops with an error.
        allow_beyond_limit: Whether windows may be longer than those that the checkpoint was trained on.
            Intended for experiments.
        max_frames: Length of the longest window, in frames. Defaults to the checkpoint's own limit.
        tail: Treatment of the last frames of a window. `score` scores every frame of every codebook.
            `drop` leaves out the last delays[k] frames of codebook k, as audiocraft does.
        precision: Precision of the decoder.
        accelerator: Type of device. `auto` selects a GPU if there is one.
        run_dir: Folder for the results. If the folder already contains this run, the run is resumed. On
            the command line, the folder defaults to runs/<date>-<command>. The Python functions write
            no files by default.
        retry_failures: Whether a resumed run retries its failed tracks.
        allow_other_machine: Whether to resume a run that was started on a different machine. The
            results may then differ in the last bits. Both machines are recorded in the results.

    Returns:
        The perplexity of the data set, of each codebook and of each track, and the nll of each code.

    Raises:
        EvaluationError: The audio, checkpoint, metrics or settings are invalid. The subclass of the error indicates which.
    """

def continue_codes(
    decoder: MusicgenForCausalLM,
    prompt: Tensor,
    *,
    total_frames: int | Sequence[int] | Tensor,
    delays: Sequence[int],
    max_frames: int = 1500,
    stride_frames: int | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    guidance_scale: float = 3.0,
    temperature: float = 1.0,
    top_k: int | None = 250,
    top_p: float | None = None,
    prompt_frames: Sequence[int] | Tensor | None = None,
    uniforms: Tensor | None = None,
) -> Tensor:
    """Continues prompts by generating the codes that follow them.

    Args:
        decoder: A transformers `MusicgenForCausalLM` in eval mode. On an accelerator, each call makes a fused copy of the decoder's
            weights.
        prompt: (B, K, P) int64 codes in [0, V), without delays. P may be 0.
        total_frames: Total number of frames in the prompt and the continuation: one number for all rows, or (B,) numbers, one per
            row.
        delays: (K,) delay of each codebook in steps, as in `CodecSpec.delays` of the checkpoint.
        max_frames: Length of the longest window that the decoder was trained on, in frames.
        stride_frames: Stride of the sliding window in frames, used if total_frames exceeds max_frames. None means 3/5 of
            max_frames, as in audiocraft.
        encoder_hidden_states: (B, L, D) text states, projected to the decoder's width. None means the null condition (no text).
        encoder_attention_mask: (B, L) mask, 0 for padding. A row of zeros means the null condition. None means no padding.
        guidance_scale: Scale of classifier-free guidance. 1 turns guidance off. Has no effect if the
            track has no text.
        temperature: Divisor of the logits. 0 selects the most likely code.
        top_k: Number of most likely codes to sample from. None means all codes.
        top_p: Nucleus sampling: after `top_k` has been applied, codes are sampled from the smallest set
            whose total probability reaches `top_p`. None means all codes.
        prompt_frames: (B,) number of frames in each row's prompt. Later frames of `prompt` are ignored. None means P for every row.
        uniforms: (B, K, max total_frames) random numbers in [0, 1), one per codebook and frame, on any device. Not required
            at temperature 0.

    Returns:
        (B, K, max total_frames) int64 codes on the decoder's device: the prompt, the continuation, and the special token V after
        the end of a shorter row. If the prompt has at least max_frames frames and total_frames exceeds max_frames, the first window
        contains only the last max_frames - stride_frames frames of the prompt.

    Raises:
        ValueError: If shapes do not match, if codes are outside [0, V), or if a setting is out of range.
        NonFiniteError: If the decoder produces NaN or infinite logits. This error is a `ValueError` whose message names the rows.

    Source: MusicGen (arXiv 2306.05284), section 2.2; audiocraft 1.3.0, `LMModel.generate` and `MusicGen._generate_tokens`.
    """

class WindowDataModule(_WindowDataModule):
    """Divides the audio of tracks into windows, each with a context and a target.

    Attributes:
        plan: Plan of the run. None means that `setup` has not been called yet.
    """

    def __init__(
        self,
        source: str | list[str] = "demo",
        text: str | None = None,
        context_s: float | None = None,
        target_s: float | None = None,
        head: Literal["score", "skip"] = "score",
        batch_size: int = 8,
        num_workers: int = 0,
        limit: int | None = None,
        min_duration_s: float = 0.0,
        max_failures: int = 0,
        allow_beyond_limit: bool = False,
    ) -> None:
        """Creates a data module. No audio is opened.

        Args:
            source: Audio to evaluate: a file, a folder, a glob, a manifest (CSV, JSONL, Parquet), `demo`
                for the bundled clips, or a list of these.
            text: Text description for tracks that have none of their own.
            context_s: When scoring, the length of the context before each target, in seconds. Defaults to
                half of the checkpoint's limit. When generating, the time in the track at which the
                continuation starts, in seconds. Defaults to the middle of the track.
            target_s: When scoring, the length of the target of each window, in seconds. Defaults to half of
                the checkpoint's limit. When generating, the length of the continuation, in seconds.
                Defaults to the rest of the track.
            head: Treatment of the start of a track. `score` scores the whole first window, so that every
                code of a track is counted once. `skip` scores only codes with a full context.
            batch_size: Number of windows per batch. On a CPU, the windows of a batch are processed in
                parallel with one thread each, so use at least one window per core.
            num_workers: Number of processes that read audio. 0 means that the main process reads the audio.
            limit: Number of tracks to process, from the start of the source. Defaults to all tracks.
            min_duration_s: Minimum length of a track, in seconds. Shorter tracks are skipped and counted in
                the result.
            max_failures: Number of tracks that may fail before the run stops with an error.
            allow_beyond_limit: Whether windows may be longer than those that the checkpoint was trained on.
                Intended for experiments.
        """

class MusicGenEvaluation(_MusicGenEvaluation):
    """Evaluates a MusicGen checkpoint on windows of audio.

    Attributes:
        model: The loaded model. None means that no model has been loaded yet.
        measured: Records of the latest run. None on ranks other than 0, and before the first run has finished.
        result: Result of the latest run. None on ranks other than 0, and before the first run has finished.
    """

    def __init__(
        self,
        checkpoint: str | Path = "demo",
        revision: str | None = None,
        max_frames: int | None = None,
        metrics: dict[str, Metric | MetricEntry | InstalledMetric] | None = None,
        tail: Literal["score", "drop"] = "score",
        save_nll: bool = False,
        seed: int = 0,
        continuation: ContinuationSettings = ...,
    ) -> None:
        """Creates an evaluation. No checkpoint is opened.

        Args:
            checkpoint: `demo` for the bundled model, a name on the Hugging Face Hub such as
                `facebook/musicgen-small`, or a folder in the format of the transformers library.
            revision: Branch, tag or commit of the checkpoint on the Hugging Face Hub.
            max_frames: Length of the longest window, in frames. Defaults to the checkpoint's own limit.
            metrics: Metrics by name. Each is a torchmetrics metric, `{metric: ..., inputs: {...}}` to rename its inputs, or
                `{name: ..., init_args: {...}, inputs: {...}}` for a metric that an installed package declares.
            tail: Treatment of the last frames of a window. `score` scores every frame of every codebook.
                `drop` leaves out the last delays[k] frames of codebook k, as audiocraft does.
            save_nll: Whether to write the negative log-likelihood of every code to nll.safetensors.
            seed: Seed for sampling codes, and for metric inputs that alter codes at random. The same seed
                gives the same codes.
            continuation: Settings of predict.
        """

MusicGen_Perplexity = perplexity
