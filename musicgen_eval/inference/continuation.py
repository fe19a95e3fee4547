"""Continues prompts of codes, also beyond the longest window of the decoder, by a sliding window.

    max_frames 10, stride 6, a prompt of 4 frames (p), 20 frames in total:

        p p p p # # # # # #                                    the prompt is fed, six frames are generated
                    k k k k # # # # # #                        the last four frames (k) are fed again, six are generated
                                k k k k # # # #                the last four frames are fed again, four are generated

Prompts and totals may differ between the rows of a batch, since each row has its own windows. The codes of a row do not depend on
the other rows. Independent of audio, tokenised texts and Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import MusicgenForCausalLM

from musicgen_eval.errors import NonFiniteError
from musicgen_eval.models.decoder.cpu_steps import CpuSteps
from musicgen_eval.models.decoder.fused_decoder import FusedDecoder
from musicgen_eval.models.decoder.sampling import Sampling
from musicgen_eval.models.decoder.static_steps import StaticSteps, StepSizes, rounded_up, static_steps
from musicgen_eval.models.decoder.window_draw import WindowDraw
from musicgen_eval.models.delay import delay_codes
from musicgen_eval.models.numerics import full_precision
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import StepKernels


@torch.inference_mode()
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
    """Continues prompts of codes.

    Args:
        decoder: A transformers `MusicgenForCausalLM` in eval mode. On an accelerator, each call makes a fused copy of its weights.
        prompt: (B, K, P) int64 in [0, V), undelayed; P may be 0.
        total_frames: Frames of prompt and continuation together, one number or (B,).
        delays: (K,) delay pattern of the checkpoint (`CodecSpec.delays`).
        max_frames: Longest window that the decoder was trained on.
        stride_frames: Stride of the sliding window, used if total_frames exceeds max_frames. None means 3/5 of max_frames, as in
            audiocraft.
        encoder_hidden_states: (B, L, D) text states, projected to the decoder's width. None means the null condition.
        encoder_attention_mask: (B, L), 0 for padding. A row of zeros means the null condition. None means no padding.
        guidance_scale: Scale of classifier-free guidance, at least 1 (no guidance). Not used for rows with the null condition.
        temperature: Divisor of the logits; 0 selects the most likely code.
        top_k: Number of most likely codes to sample from. None means all codes.
        top_p: Sample from the smallest set of most likely codes whose total probability reaches top_p. None means all codes.
        prompt_frames: (B,) length of each row's prompt. Later frames of `prompt` are ignored. None means P for every row.
        uniforms: (B, K, max total_frames) random numbers in [0, 1), one per codebook and frame, on any device. Not needed at
            temperature 0.

    Returns:
        (B, K, max total_frames) int64 on the decoder's device: the prompt, the continuation, and the special token V after the
        end of a shorter row. If the prompt is at least max_frames long and total_frames exceeds max_frames, the first window is
        fed only the last max_frames - stride_frames frames of it.

    Raises:
        ValueError: Shapes do not match, codes are outside [0, V), or a setting is out of range.
        NonFiniteError: The decoder produced NaN or infinite logits. A subclass of ValueError that names the rows.

    Source: MusicGen (arXiv 2306.05284), section 2.2; audiocraft 1.3.0, `LMModel.generate` and `MusicGen._generate_tokens`.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    lengths = _checked_lengths(
        prompt,
        delays=delays,
        codebook_size=decoder.config.vocab_size,
        guidance_scale=guidance_scale,
        sampling=sampling,
        total_frames=total_frames,
        prompt_frames=prompt_frames,
        uniforms=uniforms,
    )
    B = len(prompt)
    with full_precision():
        return continue_prompts(
            decoder,
            [row[:, :frames] for row, frames in zip(prompt, lengths.prompts, strict=True)],
            total_frames=lengths.totals,
            delays=delays,
            max_frames=max_frames,
            stride_frames=3 * max_frames // 5 if stride_frames is None else stride_frames,
            texts=_texts(encoder_hidden_states, encoder_attention_mask, B, width=decoder.config.hidden_size),
            guidance_scale=guidance_scale,
            sampling=sampling,
            uniforms=uniforms,
        )


class _Lengths(NamedTuple):
    """Lengths of the rows of a batch in frames.

    Attributes:
        prompts: (B,) length of each prompt.
        totals: (B,) length of prompt and continuation together.
    """

    prompts: list[int]
    totals: list[int]


def _checked_lengths(
    prompt: Tensor,
    *,
    delays: Sequence[int],
    codebook_size: int,
    guidance_scale: float,
    sampling: Sampling,
    total_frames: int | Sequence[int] | Tensor,
    prompt_frames: Sequence[int] | Tensor | None,
    uniforms: Tensor | None,
) -> _Lengths:
    """Checks the arguments of `continue_codes` and returns the lengths of its rows.

    Raises:
        ValueError: Shapes do not match, codes are outside [0, V), or a setting is out of range.
    """
    if prompt.dim() != 3 or prompt.shape[1] != len(delays) or prompt.dtype != torch.int64:
        raise ValueError(
            f"prompt must be (B, K, P) int64 with K = {len(delays)} delays, got {tuple(prompt.shape)} {prompt.dtype}"
        )
    B, K, P = prompt.shape
    if not 1 <= guidance_scale < float("inf"):
        raise ValueError(f"guidance_scale must be at least 1 (no guidance) and finite, got {guidance_scale}")
    sampling.check(codebook_size)
    totals = _per_row(total_frames, B, "total_frames")
    prompts = [P] * B if prompt_frames is None else _per_row(prompt_frames, B, "prompt_frames")
    for row, (frames, total) in enumerate(zip(prompts, totals, strict=True)):
        if not 0 <= frames <= min(P, total):
            raise ValueError(
                f"row {row}: prompt_frames must be 0 to {min(P, total)} (prompt: {P}, total_frames: {total}), got {frames}"
            )
    _check_uniforms(uniforms, (B, K, max(totals, default=0)), sampling.temperature)
    _check_prompts(prompt, prompts, codebook_size)
    return _Lengths(prompts, totals)


def continue_prompts(
    decoder: MusicgenForCausalLM | FusedDecoder,
    prompts: Sequence[Tensor],
    *,
    total_frames: Sequence[int],
    delays: Sequence[int],
    max_frames: int,
    stride_frames: int,
    texts: Sequence[Tensor | None],
    guidance_scale: float,
    sampling: Sampling,
    uniforms: Tensor | None,
    kernels: StepKernels = "graph",
) -> Tensor:
    """Continues prompts as `continue_codes` does, without checking the arguments.

    Args:
        decoder: A transformers decoder, or a fused decoder for an accelerator.
        prompts: (K, P_i) int64 per row.
        total_frames: (B,) frames of prompt and continuation together.
        delays: (K,) delay of each codebook in steps.
        max_frames: See `continue_codes`.
        stride_frames: See `continue_codes`.
        texts: (L_i, D) text states of each row; None for the null condition.
        guidance_scale: See `continue_codes`.
        sampling: Temperature, top_k and top_p.
        uniforms: (B, K, max total_frames), or None at temperature 0.
        kernels: Execution of the decoding steps on CUDA.

    Returns:
        (B, K, max total_frames) int64 on the decoder's device.
    """
    device = decoder.device
    V = decoder.special_token if isinstance(decoder, FusedDecoder) else decoder.config.vocab_size
    codes = torch.full((len(prompts), len(delays), max(total_frames, default=0)), V, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        codes[row, :, : prompt.shape[1]] = prompt
    schedules = [
        window_spans(prompt.shape[1], total, max_frames=max_frames, stride_frames=stride_frames)
        for prompt, total in zip(prompts, total_frames, strict=True)
    ]
    if not any(schedules):
        return codes
    order = sorted(range(len(prompts)), key=lambda row: texts[row] is None)  # rows with a text first
    index = upload(torch.tensor(order), device)
    numbers = None if uniforms is None else upload(uniforms.float(), device).index_select(0, index)
    continued = codes.index_select(0, index)
    draw = _window_drawer(
        decoder,
        [states.to(device) for row in order if (states := texts[row]) is not None],
        num_rows=len(prompts),
        num_steps=max(span.num_frames for spans in schedules for span in spans) + max(delays),
        guidance_scale=guidance_scale,
        sampling=sampling,
        kernels=kernels,
    )
    for number in range(max(len(spans) for spans in schedules)):
        spans = [schedules[row][number] if number < len(schedules[row]) else None for row in order]
        try:
            _continue_windows(draw, continued, spans, numbers, delays=delays, special_token=V)
        except NonFiniteError as error:
            raise NonFiniteError(sorted(order[row] for row in error.rows)) from None
    return codes.index_copy_(0, index, continued)


@dataclass(frozen=True)
class WindowSpan:
    """One sliding window of a continuation, in frames from the start of the prompt.

    Attributes:
        start: First frame of the window.
        known: First generated frame; the frames from `start` up to it are already known.
        end: End of the window, exclusive.
    """

    start: int
    known: int
    end: int

    @property
    def num_frames(self) -> int:
        """Length of the window in frames."""
        return self.end - self.start


def window_spans(prompt_frames: int, total_frames: int, *, max_frames: int, stride_frames: int) -> list[WindowSpan]:
    """Returns the sliding windows that extend a prompt to a total length; no windows if the prompt has that length already.

    The first window is fed the whole prompt if the prompt is shorter than max_frames, otherwise the last
    max_frames - stride_frames frames of it.

    >>> [(span.start, span.known, span.end) for span in window_spans(4, 20, max_frames=10, stride_frames=6)]
    [(0, 4, 10), (6, 10, 16), (12, 16, 20)]

    Raises:
        ValueError: max_frames or stride_frames is out of range.

    Source: audiocraft 1.3.0, `MusicGen._generate_tokens`.
    """
    if max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    if total_frames > max_frames and not 1 <= stride_frames < max_frames:
        raise ValueError(
            f"stride_frames must be 1 to {max_frames - 1}, less than max_frames={max_frames}, got {stride_frames}"
        )
    start = (
        0 if total_frames <= max_frames or prompt_frames < max_frames else prompt_frames - max_frames + stride_frames
    )
    known = prompt_frames
    spans = []
    while known < total_frames:
        end = min(start + max_frames, total_frames)
        spans.append(WindowSpan(start, known, end))
        start, known = start + stride_frames, end
    return spans


WindowDrawer = Callable[[WindowDraw], tuple[Tensor, Sequence[int]]]
"""Generates one window of every row; returns (B, K, C) codes by column, and the rows with NaN or infinite logits."""


@dataclass(frozen=True)
class WindowLayout:
    """The frame of each codebook that every column of a window contains. A column is one decoding step.

    Column c contains frame known + c - delay_k of codebook k, and is predicted from the columns before it. All tensors are on
    the CPU.

    A window that starts at frame 3, with 4 known frames (p), 3 frames to generate (#), and delays 0 and 1:

        frame              3 4 5 6 7 8 9          column            0 1 2 3
        codebook 0         p p p p # # #          codebook 0        # # # .        frames 7 8 9
        codebook 1         p p p p # # #          codebook 1        p # # #        frames 6 7 8 9; . is the special token

    Attributes:
        frames: (B, K, C) int64, frame of each entry, clamped to the frames of the row.
        is_drawn: (B, K, C) bool, True for entries to generate.
        is_known: (B, K, C) bool, True for entries with a known code.
    """

    frames: Tensor
    is_drawn: Tensor
    is_known: Tensor


def window_layout(spans: Sequence[WindowSpan | None], *, delays: Sequence[int], num_frames: int) -> WindowLayout:
    """Computes the layout of one window of every row.

    Args:
        spans: (B,) window of each row; None if the row is complete.
        delays: (K,) delay of each codebook in steps.
        num_frames: T, number of frames of the rows.

    >>> layout = window_layout([WindowSpan(3, 7, 10)], delays=(0, 1), num_frames=12)
    >>> layout.frames[0].tolist()
    [[7, 8, 9, 10], [6, 7, 8, 9]]
    >>> layout.is_drawn[0].int().tolist()
    [[1, 1, 1, 0], [0, 1, 1, 1]]
    """
    windows = [span or WindowSpan(0, 0, 0) for span in spans]
    num_columns = max(span.end - span.known for span in windows) + max(delays)
    column = torch.arange(num_columns)
    delay = torch.tensor(list(delays)).view(1, -1, 1)
    start, known, end = (
        torch.tensor([getattr(span, name) for span in windows]).view(-1, 1, 1) for name in ("start", "known", "end")
    )
    frames = known + column - delay
    return WindowLayout(
        frames=frames.clamp(0, num_frames - 1),
        is_drawn=(column >= delay) & (frames < end),
        is_known=(frames >= start) & (frames < known),
    )


def _continue_windows(
    draw: WindowDrawer,
    codes: Tensor,
    spans: Sequence[WindowSpan | None],
    uniforms: Tensor | None,
    *,
    delays: Sequence[int],
    special_token: int,
) -> None:
    """Generates one window of every row, in place.

    Args:
        draw: Generates the columns.
        codes: (B, K, T) int64, rows with a text first.
        spans: (B,) window of each row; None if the row is complete and stays idle.
        uniforms: (B, K, T) random numbers, or None at temperature 0.
        delays: (K,) delay of each codebook in steps.
        special_token: V.

    Raises:
        NonFiniteError: The decoder produced NaN or infinite logits in rows that are not idle.
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
    """Returns the (B, K, S) int64 decoder input before the first column of each row, padded on the right with the special token."""
    B, K, _ = codes.shape
    known = [0 if span is None else span.known - span.start for span in spans]
    prompts = codes.new_full((B, K, max(known)), special_token)
    for row, (span, frames) in enumerate(zip(spans, known, strict=True)):
        if span is not None:
            prompts[row, :, :frames] = codes[row, :, span.start : span.known]
    return delay_codes(prompts, delays=delays, special_token=special_token, num_steps=max(known) + 1)


def _window_drawer(
    decoder: MusicgenForCausalLM | FusedDecoder,
    texts: Sequence[Tensor],
    *,
    num_rows: int,
    num_steps: int,
    guidance_scale: float,
    sampling: Sampling,
    kernels: StepKernels,
) -> WindowDrawer:
    """Returns a function that generates windows, with static steps on an accelerator and `CpuSteps` on a CPU."""
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
    """Returns a fused copy of a decoder, in the dtype of autocast if it is enabled."""
    device_type = decoder.device.type
    is_cast = torch.is_autocast_enabled(device_type)
    return FusedDecoder(decoder, torch.get_autocast_dtype(device_type) if is_cast else decoder.dtype)


def _per_row(value: int | Sequence[int] | Tensor, num_rows: int, name: str) -> list[int]:
    try:
        if isinstance(value, int):
            return [value] * num_rows
        rows = [index(number) for number in (value.tolist() if isinstance(value, Tensor) else value)]
    except TypeError:
        rows = []
    if len(rows) != num_rows:
        raise ValueError(f"{name} must be a whole number or a sequence of {num_rows} whole numbers, got {value}")
    return rows


def _check_uniforms(uniforms: Tensor | None, shape: tuple[int, int, int], temperature: float) -> None:
    if uniforms is None and temperature > 0:
        raise ValueError(
            f"uniforms is required if temperature is above 0, got temperature={temperature:g}; pass (B, K, total_frames) "
            "numbers, such as torch.rand(..., generator=...), or set temperature=0"
        )
    if uniforms is not None and tuple(uniforms.shape) != shape:
        raise ValueError(f"uniforms must be (B, K, total_frames) = {shape}, got {tuple(uniforms.shape)}")
    if uniforms is not None and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError(f"uniforms must be in [0, 1), got {float(uniforms.min()):g} to {float(uniforms.max()):g}")


def _check_prompts(prompt: Tensor, prompt_frames: Sequence[int], codebook_size: int) -> None:
    in_range = ((prompt >= 0) & (prompt < codebook_size)).all(1).cpu()  # (B, P), one synchronisation
    for row, frames in enumerate(prompt_frames):
        if not in_range[row, :frames].all():
            raise ValueError(
                f"row {row}: prompt must be in [0, {codebook_size}) in its first {frames} frames; mask padding with prompt_frames"
            )


def _texts(states: Tensor | None, mask: Tensor | None, num_rows: int, *, width: int) -> list[Tensor | None]:
    """Returns the (L_i, D) text states of each row without padding; None for the null condition.

    Raises:
        ValueError: Shapes do not match.
    """
    if states is None:
        if mask is not None:
            raise ValueError("encoder_attention_mask requires encoder_hidden_states; pass both or neither")
        return [None] * num_rows
    if states.dim() != 3 or len(states) != num_rows or states.shape[2] != width:
        raise ValueError(
            f"encoder_hidden_states must be (B, L, D) with B = {num_rows} and D = {width}, got {tuple(states.shape)}"
        )
    if mask is None:
        return list(states)
    if mask.shape != states.shape[:2]:
        raise ValueError(f"encoder_attention_mask must be (B, L) = {tuple(states.shape[:2])}, got {tuple(mask.shape)}")
    return [row[kept] if kept.any() else None for row, kept in zip(states, mask.bool(), strict=True)]
