"""Continues the prompts of several windows with a loaded model, and scores the continuations.

    prompt audio --encode the prompt only--> codes --continue_prompts--> prompt and continuation (K, T) --score_continuations--> nll

Each generated code is scored in the sliding window in which it was generated. Its context consists of the earlier codes in that
window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_eval.inference.continuation import continue_prompts
from musicgen_eval.inference.readings import CodedWindow, score_readings
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.inference.sliding_windows import WindowSpan, window_spans
from musicgen_eval.models.decoder.sampling import Sampling, continuation_uniforms
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.models.numerics import full_precision
from musicgen_eval.models.threads import torch_threads
from musicgen_eval.records import CodecSpec, Reading, ScoredWindow, Window


@torch.inference_mode()
def continue_windows(
    model: MusicGen,
    prompts: Sequence[Tensor],
    windows: Sequence[Window],
    *,
    texts: Sequence[str | None],
    settings: ContinuationSettings,
    stride_frames: int,
    seed: int = 0,
) -> list[Tensor]:
    """Continues the prompts of several windows as one batch.

    Args:
        model: Loaded model.
        prompts: (K, context_frames) int64 codes of each window's prompt, encoded without the audio after the prompt.
        windows: Windows to continue. The `index` of a window is the index of the continuation.
        texts: Text of each window. None means the null condition (no text).
        settings: Settings for sampling, guidance and threads.
        stride_frames: Stride of the sliding window, in frames. Used only for windows that are longer than the checkpoint's limit.
        seed: Seed for sampling codes.

    Returns:
        For each window, (K, context_frames + target_frames) int64 codes of the prompt and the continuation, on the model's device.
    """
    spec = model.spec
    totals = [window.num_frames for window in windows]
    sampling = Sampling(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    uniforms = torch.zeros((len(prompts), spec.num_codebooks, max(totals)), dtype=torch.float32)
    for row, window in enumerate(windows):
        uniforms[row, :, window.context_frames : totals[row]] = continuation_uniforms(
            spec.num_codebooks, window.target_frames, seed=seed, track=window.track, continuation=window.index
        )
    with full_precision(), torch_threads(settings.threads if model.device.type == "cpu" else None):
        codes = continue_prompts(
            model.decoder if model.fused is None else model.fused,
            prompts,
            total_frames=totals,
            delays=spec.delays,
            max_frames=spec.max_frames,
            stride_frames=stride_frames,
            texts=model.encode_texts(texts),
            guidance_scale=settings.guidance_scale,
            sampling=sampling,
            uniforms=None if sampling.temperature == 0 else uniforms,
            kernels=settings.kernels,
        )
    return [row[:, :total] for row, total in zip(codes, totals, strict=True)]


def encode_reference(
    model: MusicGen, prompt: Tensor, read: Callable[[int, int], Tensor], num_frames: int, *, stride_frames: int
) -> Tensor:
    """Encodes the reference and appends its codes to those of the prompt.

    The audio of each sliding window is encoded as one segment. Only the codes of frames that have not been encoded yet are added to
    the result. The codes of the prompt are not changed, so the reference and the model's continuation are scored after exactly the
    same prompt.

    Args:
        model: Loaded model.
        prompt: (K, P) int64 codes of the prompt.
        read: Function that returns (C, N) float32 audio, given the first frame (counted from the start of the prompt) and the
            number of frames.
        num_frames: Number of frames in the reference.
        stride_frames: See `continue_windows`.

    Returns:
        (K, P + num_frames) int64 codes of the prompt and the reference.
    """
    codes = prompt
    for span in _spans(model.spec, prompt.shape[1], prompt.shape[1] + num_frames, stride_frames):
        window = model.encode([read(span.start, span.num_frames)])[0]
        codes = torch.cat([codes, window[:, span.known - span.start :]], dim=1)
    return codes


@dataclass(frozen=True)
class ContinuedCodes:
    """A window to score, with the codes of its continuation.

    Attributes:
        window: The window.
        codes: (K, context_frames + target_frames) int64 codes of the prompt and the continuation.
        reference: (K, context_frames + R) int64 codes of the prompt and the reference, where R <= target_frames. None if there is
            no reference, or if the reference is not scored.
        text: Text of the track. None means the null condition (no text).
        other_text: Text of a different track, for the reading `other_text`.
    """

    window: Window
    codes: Tensor
    reference: Tensor | None
    text: str | None
    other_text: str | None = None


def score_continuations(
    model: MusicGen,
    continued: Sequence[ContinuedCodes],
    readings: Sequence[Reading],
    *,
    stride_frames: int,
    seed: int = 0,
    with_logits: frozenset[str] = frozenset(),
) -> list[dict[str, ScoredWindow | None]]:
    """Scores continuations and references in the sliding windows that were used to generate the continuations.

    Args:
        model: Loaded model.
        continued: Windows to score, with the codes of their continuations and references.
        readings: Readings to score.
        stride_frames: See `continue_windows`.
        seed: Seed for readings that alter codes at random.
        with_logits: Names of the readings whose logits are returned.

    Returns:
        For each window, a dictionary that maps the name of each reading to the scores of (K, context_frames + target_frames) codes,
        or to None if the reading does not exist for the window. The nll is NaN for the prompt, and for frames after the end of a
        reference that is shorter than the continuation.
    """
    results: list[dict[str, ScoredWindow | None]] = [{reading.name: None for reading in readings} for _ in continued]
    for target in ("own", "reference"):
        wanted = [reading for reading in readings if reading.target == target]
        rows = [(row, item.codes if target == "own" else item.reference) for row, item in enumerate(continued)]
        spans = {
            row: (codes, _spans(model.spec, continued[row].window.context_frames, codes.shape[1], stride_frames))
            for row, codes in rows
            if codes is not None and wanted
        }
        for number in range(max((len(found) for _, found in spans.values()), default=0)):
            batch = [(row, codes, found[number]) for row, (codes, found) in spans.items() if number < len(found)]
            parts = [_part(continued[row], codes, span) for row, codes, span in batch]
            scored = score_readings(model, parts, wanted, seed=seed, with_logits=with_logits)
            for (row, codes, span), part in zip(batch, scored, strict=True):
                for name, read in part.items():
                    if read is not None:
                        whole = results[row][name] or unscored(continued[row].window, codes, read.logits)
                        results[row][name] = _inserted(whole, read, span)
    return results


def unscored(window: Window, codes: Tensor, like: Tensor | None = None) -> ScoredWindow:
    """Returns the scores for a window without any scored codes: every nll is NaN, and every rank is -1.

    Args:
        window: The window.
        codes: (K, T) int64 codes. If T is less than the length of the window, the missing codes are set to 0.
        like: (K, t, V) logits for any t. The returned logits have the same V and are on the same device. If `like` is None, no
            logits are returned.
    """
    K, T = codes.shape[0], window.num_frames
    shape = (K, T)
    return ScoredWindow(
        window=window,
        codes=torch.nn.functional.pad(codes, (0, T - codes.shape[1])),
        scored=torch.zeros(shape, dtype=torch.bool),
        nll=torch.full(shape, float("nan"), dtype=torch.float32, device=codes.device),
        rank=torch.full(shape, -1, dtype=torch.int64, device=codes.device),
        logits=None if like is None else torch.zeros((*shape, like.shape[-1]), device=like.device),
    )


def _spans(spec: CodecSpec, prompt_frames: int, total_frames: int, stride_frames: int) -> list[WindowSpan]:
    return window_spans(prompt_frames, total_frames, max_frames=spec.max_frames, stride_frames=stride_frames)


def _part(item: ContinuedCodes, codes: Tensor, span: WindowSpan) -> CodedWindow:
    """Returns the part of a continued window that one sliding window covers."""
    window = Window(
        track=item.window.track,
        index=item.window.index,
        start_frame=item.window.start_frame + span.start,
        context_frames=span.known - span.start,
        target_frames=span.end - span.known,
    )
    return CodedWindow(window, codes[:, span.start : span.end], item.text, item.other_text)


def _inserted(whole: ScoredWindow, part: ScoredWindow, span: WindowSpan) -> ScoredWindow:
    """Copies the scores of a sliding window into `whole`, the scores of the whole window, and returns `whole`."""
    first = span.known - span.start
    for name in ("scored", "nll", "rank", "logits"):
        values = getattr(whole, name)
        if values is not None:
            values[:, span.known : span.end] = getattr(part, name)[:, first:]
    return whole
