"""Generates the codes of one sliding window per row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import MusicgenForCausalLM

from musicgen_eval.errors import NonFiniteError
from musicgen_eval.inference.sliding_windows import WindowSpan, window_layout
from musicgen_eval.models.decoder.cpu_steps import CpuSteps
from musicgen_eval.models.decoder.fused_decoder import FusedDecoder
from musicgen_eval.models.decoder.sampling import Sampling
from musicgen_eval.models.decoder.static_steps import StaticSteps, StepSizes, rounded_up, static_steps
from musicgen_eval.models.decoder.window_draw import WindowDraw
from musicgen_eval.models.delay import delay_codes
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import StepKernels

WindowDrawer = Callable[[WindowDraw], tuple[Tensor, Sequence[int]]]
"""Function that generates one window per row and returns the (B, K, C) codes and the rows with NaN or infinite logits."""


def generate_windows(
    draw: WindowDrawer,
    codes: Tensor,
    spans: Sequence[WindowSpan | None],
    uniforms: Tensor | None,
    *,
    delays: Sequence[int],
    special_token: int,
) -> None:
    """Generates one sliding window per row, and writes the generated codes to `codes` in place.

    Args:
        draw: Function that generates the columns of the windows.
        codes: (B, K, T) int64 codes. Rows with text come before rows without text.
        spans: (B,) window of each row. None means that the row is complete and therefore idle.
        uniforms: (B, K, T) random numbers in [0, 1), or None at temperature 0.
        delays: (K,) delay of each codebook in steps.
        special_token: Id of the special token, V.

    Raises:
        NonFiniteError: If the decoder produces NaN or infinite logits in rows that are not idle.
    """
    layout = window_layout(spans, delays=delays, num_frames=codes.shape[2])
    frames = upload(layout.frames, codes.device)
    starts = [0 if span is None else span.known - span.start + 1 for span in spans]
    columns, failed = draw(
        WindowDraw(
            prompts=_delayed_prompts(codes, spans, delays=delays, special_token=special_token),
            starts=[start or max(starts) for start in starts],
            columns=codes.gather(2, frames).masked_fill(~upload(layout.is_known, codes.device), special_token),
            is_drawn=layout.is_drawn,
            numbers=None if uniforms is None else uniforms.gather(2, frames),
            is_idle=[span is None for span in spans],
        )
    )
    rows_failed = [row for row in failed if spans[row] is not None]
    if rows_failed:
        raise NonFiniteError(rows_failed)
    rows, k, column = layout.is_drawn.nonzero(as_tuple=True)
    places = upload(torch.stack([rows, k, layout.frames[rows, k, column], column]), codes.device)
    codes[places[0], places[1], places[2]] = columns[places[0], places[1], places[3]]


def _delayed_prompts(
    codes: Tensor, spans: Sequence[WindowSpan | None], *, delays: Sequence[int], special_token: int
) -> Tensor:
    """Returns the (B, K, S) int64 decoder input that precedes each row's first column, padded on the right with special tokens."""
    B, K, _ = codes.shape
    known = [0 if span is None else span.known - span.start for span in spans]
    prompts = codes.new_full((B, K, max(known)), special_token)
    for row, (span, frames) in enumerate(zip(spans, known, strict=True)):
        if span is not None:
            prompts[row, :, :frames] = codes[row, :, span.start : span.known]
    return delay_codes(prompts, delays=delays, special_token=special_token, num_steps=max(known) + 1)


def window_drawer(
    decoder: MusicgenForCausalLM | FusedDecoder,
    texts: Sequence[Tensor],
    *,
    num_rows: int,
    num_steps: int,
    guidance_scale: float,
    sampling: Sampling,
    kernels: StepKernels,
) -> WindowDrawer:
    """Returns a function that generates windows with `StaticSteps` on an accelerator, or with `CpuSteps` on a CPU."""
    if decoder.device.type == "cpu" and not isinstance(decoder, FusedDecoder):
        steps = CpuSteps(
            decoder,
            texts,
            num_rows=num_rows,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            sampling=sampling,
        )
        return steps.draw
    fused = decoder if isinstance(decoder, FusedDecoder) else _fused(decoder)
    keys = fused.text_keys(texts)
    sizes = StepSizes(
        num_rows=num_rows,
        num_texts=len(texts),
        text_length=0 if keys is None else keys.length,
        num_steps=rounded_up(num_steps),
        guidance_scale=guidance_scale,
        sampling=sampling,
        kernels=kernels,
    )
    static = static_steps(fused, sizes) if fused is decoder else StaticSteps(fused, sizes)
    return lambda window: (static.draw(window, keys), static.failed_rows())


def _fused(decoder: MusicgenForCausalLM) -> FusedDecoder:
    """Returns a fused copy of a decoder, in the autocast dtype if autocast is enabled."""
    device_type = decoder.device.type
    is_cast = torch.is_autocast_enabled(device_type)
    return FusedDecoder(decoder, torch.get_autocast_dtype(device_type) if is_cast else decoder.dtype)
