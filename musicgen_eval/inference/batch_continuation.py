"""Continues windows of audio with a loaded model, and scores what came of them as the model would have drawn it.

    heard audio --encode, alone--> codes --continue_codes--> heard and drawn codes (K, T)
                                                              |
    nll of every drawn code, in the very windows it was drawn in: what was kept is context, what was drawn is scored

Knows models, codes and texts; nothing of files, metrics or Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_eval.inference.continuation import WindowSpan, continue_prompts, window_spans
from musicgen_eval.inference.readings import CodedWindow, score_readings
from musicgen_eval.models.decoder.sampling import Sampling, continuation_uniforms
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.models.numerics import full_precision
from musicgen_eval.models.threads import torch_threads
from musicgen_eval.records import CodecSpec, ContinuationSettings, Reading, ScoredWindow, Window


@torch.inference_mode()
def continue_windows(
    model: MusicGen,
    heard: Sequence[Tensor],
    windows: Sequence[Window],
    *,
    texts: Sequence[str | None],
    settings: ContinuationSettings,
    stride_frames: int,
    seed: int = 0,
) -> list[Tensor]:
    """Continues what was heard, all windows in one batch.

    Args:
        model: the model.
        heard: (K, context_frames) int64 codes of each window's context, encoded alone.
        windows: where each stands; `index` is the number of the continuation.
        texts: a text or None each.
        settings: how to draw.
        stride_frames: by how much windows slide where they are longer than the checkpoint's limit.
        seed: of the numbers to draw with.

    Returns:
        (K, context_frames + target_frames) int64 each, on the model's device: the codes heard and those drawn.
    """
    spec = model.spec
    totals = [window.num_frames for window in windows]
    sampling = Sampling(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    uniforms = torch.zeros((len(heard), spec.num_codebooks, max(totals)), dtype=torch.float32)
    for row, window in enumerate(windows):
        uniforms[row, :, window.context_frames : totals[row]] = continuation_uniforms(
            spec.num_codebooks, window.target_frames, seed=seed, track=window.track, continuation=window.index
        )
    with full_precision(), torch_threads(settings.threads if model.device.type == "cpu" else None):
        codes = continue_prompts(
            model.decoder if model.fused is None else model.fused,
            heard,
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
    model: MusicGen, heard: Tensor, read: Callable[[int, int], Tensor], num_frames: int, *, stride_frames: int
) -> Tensor:
    """The codes of how a track went on, behind those of what was heard.

    Each window's audio is encoded in one piece, and of its codes those behind what is known are taken: so the model meets the
    reference as it meets its own continuation, after the codes of the context alone.

    Args:
        model: the model.
        heard: (K, H) int64 codes of the context.
        read: (first frame from where hearing began, frames) -> (C, N) float32 audio.
        num_frames: frames of the reference.
        stride_frames: as in `continue_windows`.

    Returns:
        (K, H + num_frames) int64.
    """
    codes = heard
    for span in _spans(model.spec, heard.shape[1], heard.shape[1] + num_frames, stride_frames):
        window = model.encode([read(span.start, span.num_frames)])[0]
        codes = torch.cat([codes, window[:, span.known - span.start :]], dim=1)
    return codes


@dataclass(frozen=True)
class ContinuedCodes:
    """What is to be scored of a window.

    Attributes:
        window: where it stands.
        codes: (K, context_frames + target_frames) int64.
        reference: (K, context_frames + R) int64, R <= target_frames: what was heard and how the track went on; None: not wanted, or
            there is none.
        text: its track's text; None: the null condition.
        other_text: another track's text, for `other_text`.
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
    """Scores continuations and references after what was heard, in the windows in which they were, or would be, drawn.

    Returns:
        For each window, reading name -> (K, context_frames + target_frames) scores, NaN on the context and where a reference ends
        before the continuation; None where the reading does not exist.
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
            pieces = [_piece(continued[row], codes, span) for row, codes, span in batch]
            scored = score_readings(model, pieces, wanted, seed=seed, with_logits=with_logits)
            for (row, codes, span), piece in zip(batch, scored, strict=True):
                for name, read in piece.items():
                    if read is not None:
                        whole = results[row][name] or unscored(continued[row].window, codes, read.logits)
                        results[row][name] = _joined(whole, read, span)
    return results


def unscored(window: Window, codes: Tensor, like: Tensor | None = None) -> ScoredWindow:
    """A window of which nothing is scored yet: NaN, rank -1; codes that a shorter reference does not have are 0.

    Args:
        window: the window.
        codes: (K, T) int64, T up to the window's frames.
        like: logits (K, t, V) of some stretch of it, where logits are wanted.
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


def _spans(spec: CodecSpec, heard_frames: int, total_frames: int, stride_frames: int) -> list[WindowSpan]:
    return window_spans(heard_frames, total_frames, max_frames=spec.max_frames, stride_frames=stride_frames)


def _piece(item: ContinuedCodes, codes: Tensor, span: WindowSpan) -> CodedWindow:
    """One window as a reading scores it."""
    window = Window(
        track=item.window.track,
        index=item.window.index,
        start_frame=item.window.start_frame + span.start,
        context_frames=span.known - span.start,
        target_frames=span.end - span.known,
    )
    return CodedWindow(window, codes[:, span.start : span.end], item.text, item.other_text)


def _joined(whole: ScoredWindow, piece: ScoredWindow, span: WindowSpan) -> ScoredWindow:
    """Puts what a window scored into its place, in place."""
    first = span.known - span.start
    for name in ("scored", "nll", "rank", "logits"):
        values = getattr(whole, name)
        if values is not None:
            values[:, span.known : span.end] = getattr(piece, name)[:, first:]
    return whole
