"""Continues codes: a prompt is kept as it is, and what follows is drawn from the decoder, past its longest window too.

    window of max_frames 10, stride 6, a prompt of 4 frames (p), 20 frames in all:

        p p p p # # # # # #                                    the prompt is read, six frames are drawn
                    k k k k # # # # # #                        the last four are kept and read again
                                k k k k # # # #                until all frames are there

Every row of a batch goes through its own windows: prompts and totals may differ. A row's codes are those that it has alone. The
functions know codes and a transformers decoder; neither audio nor texts nor Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index

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
        decoder: a transformers `MusicgenForCausalLM` in eval mode. On an accelerator, each call joins a copy of its weights.
        prompt: (B, K, P) int64 in [0, V), undelayed; P may be 0.
        total_frames: frames of prompt and continuation together, one number or (B,).
        delays: (K,) the checkpoint's delay pattern (`CodecSpec.delays`).
        max_frames: longest window that the decoder was trained on.
        stride_frames: by how much the window slides where total_frames is over max_frames; None: 3/5 of max_frames, as audiocraft.
        encoder_hidden_states: (B, L, D) text states, projected to the decoder's width; None: the null condition.
        encoder_attention_mask: (B, L), 0 for padded text; a row of zeros is the null condition. None: all of it is heard.
        guidance_scale: of classifier-free guidance, >= 1; 1 is none. Rows under the null condition have none to follow.
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: draws from so many of the likeliest codes; None: all.
        top_p: draws from the likeliest codes that reach this probability together; None: all.
        prompt_frames: (B,) frames of each row's prompt, P where not given; what lies behind them may be anything.
        uniforms: (B, K, max total_frames) in [0, 1): the numbers to draw with, by frame and codebook, on any device; not needed at
            temperature 0.

    Returns:
        (B, K, max total_frames) int64 on the decoder's device: the prompt's own codes, then the continuation, then the special
        token V where a row is shorter than the longest. A prompt of max_frames or more is heard from its last
        max_frames - stride_frames frames on.

    Raises:
        ValueError: shapes that do not fit together, codes outside [0, V), or a setting out of its range.
        NonFiniteError: a ValueError too: the decoder made NaN or infinite numbers; names the rows.

    Source: MusicGen (arXiv 2306.05284), section 2.2; audiocraft 1.3.0, `LMModel.generate` and `MusicGen._generate_tokens`.
    """
    if prompt.dim() != 3 or prompt.shape[1] != len(delays) or prompt.dtype != torch.int64:
        raise ValueError(
            f"prompt must be (B, K, P) int64 with K = {len(delays)} delays, got {tuple(prompt.shape)} {prompt.dtype}"
        )
    B, K, P = prompt.shape
    V = decoder.config.vocab_size
    if not 1 <= guidance_scale < float("inf"):
        raise ValueError(f"guidance_scale must be at least 1 (none), got {guidance_scale}")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    sampling.check(V)
    totals = _per_row(total_frames, B, "total_frames")
    known = [P] * B if prompt_frames is None else _per_row(prompt_frames, B, "prompt_frames")
    for row, (frames, total) in enumerate(zip(known, totals, strict=True)):
        if not 0 <= frames <= min(P, total):
            raise ValueError(f"row {row}: a prompt of {frames} frames does not fit {P} given and {total} in all")
    _check_uniforms(uniforms, (B, K, max(totals, default=0)), temperature)
    _check_prompts(prompt, known, V)
    with full_precision():
        return continue_prompts(
            decoder,
            [row[:, :frames] for row, frames in zip(prompt, known, strict=True)],
            total_frames=totals,
            delays=delays,
            max_frames=max_frames,
            stride_frames=3 * max_frames // 5 if stride_frames is None else stride_frames,
            texts=_texts(encoder_hidden_states, encoder_attention_mask, B, width=decoder.config.hidden_size),
            guidance_scale=guidance_scale,
            sampling=sampling,
            uniforms=uniforms,
        )


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
        decoder: a transformers decoder, or one whose weights have been joined for an accelerator.
        prompts: (K, P_i) int64 each.
        total_frames: (B,) frames of prompt and continuation together.
        delays: (K,).
        max_frames: see `continue_codes`.
        stride_frames: see `continue_codes`.
        texts: (L_i, D) states of each row; None for the null condition.
        guidance_scale: see `continue_codes`.
        sampling: how codes are drawn.
        uniforms: (B, K, max total_frames), or None at temperature 0.
        kernels: how the steps run on CUDA.

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
    order = sorted(range(len(prompts)), key=lambda row: texts[row] is None)  # rows with a text come first
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
    """One window of a continuation, in frames from the prompt's start.

    Attributes:
        start: where the window begins.
        known: where what is known ends, and what is drawn begins.
        end: where the window ends.
    """

    start: int
    known: int
    end: int

    @property
    def num_frames(self) -> int:
        """Frames in the window."""
        return self.end - self.start


def window_spans(prompt_frames: int, total_frames: int, *, max_frames: int, stride_frames: int) -> list[WindowSpan]:
    """The windows that continue a prompt up to a total; none where there is nothing to draw.

    A prompt below max_frames is heard whole by the first window; a longer one from its last max_frames - stride_frames frames on.

    >>> [(span.start, span.known, span.end) for span in window_spans(4, 20, max_frames=10, stride_frames=6)]
    [(0, 4, 10), (6, 10, 16), (12, 16, 20)]

    Raises:
        ValueError: a window or stride that cannot be.

    Source: audiocraft 1.3.0, `MusicGen._generate_tokens`.
    """
    if max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    if total_frames > max_frames and not 1 <= stride_frames < max_frames:
        raise ValueError(
            f"stride_frames must be 1 to {max_frames - 1}, below the window of {max_frames} frames, got {stride_frames}"
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
"""Draws one window of every row: (B, K, C) columns, and the rows whose numbers were not finite."""


@dataclass(frozen=True)
class WindowLayout:
    """Which codes the columns of a window hold; all tensors are on the CPU.

    Column c of a row is predicted by the row's step known + c, which reads column c - 1. It holds frame known + c - delay_k of
    codebook k. A window that begins at frame 3, with 4 known frames (p) and 3 to draw (#), and delays 0 and 1:

        frame              3 4 5 6 7 8 9          column            0 1 2 3
        codebook 0         p p p p # # #          codebook 0        # # # .
        codebook 1         p p p p # # #          codebook 1        p # # #        . is fed as the special token

    Attributes:
        frames: (B, K, C) int64, frame of the row's codes that a column holds, clamped to the row.
        is_drawn: (B, K, C) bool.
        is_known: (B, K, C) bool, True where the column holds a code of the prompt.
    """

    frames: Tensor
    is_drawn: Tensor
    is_known: Tensor


def window_layout(spans: Sequence[WindowSpan | None], *, delays: Sequence[int], num_frames: int) -> WindowLayout:
    """Lays out the columns of one window of every row.

    Args:
        spans: (B,) the window of each row; None if its row is complete.
        delays: (K,).
        num_frames: T, frames of the rows' codes.

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
    """Draws one window of every row, in place.

    Args:
        draw: draws the columns.
        codes: (B, K, T) int64, rows with a text first.
        spans: (B,) the window of each row; None if its row is complete, and idles.
        uniforms: (B, K, T), or None.
        delays: (K,).
        special_token: V.

    Raises:
        NonFiniteError: names the rows.
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
    """(B, K, S) int64: what each row has before its first drawn column, delayed; padded on the right with the special token."""
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
    """Draws windows as suits the decoder's device: static steps on an accelerator, and the CPU's own steps on a CPU."""
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
    """A caller's own decoder for one call, in autocast's dtype if that is on."""
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
        raise ValueError(f"{name} must be a whole number or {num_rows} of them, got {value}")
    return rows


def _check_uniforms(uniforms: Tensor | None, shape: tuple[int, int, int], temperature: float) -> None:
    if uniforms is None and temperature > 0:
        raise ValueError(
            f"temperature={temperature:g} draws at random: pass uniforms (B, K, total_frames), such as "
            "torch.rand(..., generator=...), or temperature=0"
        )
    if uniforms is not None and tuple(uniforms.shape) != shape:
        raise ValueError(f"uniforms must be (B, K, total_frames) = {shape}, got {tuple(uniforms.shape)}")
    if uniforms is not None and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("uniforms must lie in [0, 1)")


def _check_prompts(prompt: Tensor, prompt_frames: Sequence[int], codebook_size: int) -> None:
    in_range = ((prompt >= 0) & (prompt < codebook_size)).all(1).cpu()  # (B, P), one synchronisation
    for row, frames in enumerate(prompt_frames):
        if not in_range[row, :frames].all():
            raise ValueError(
                f"prompt must lie in [0, {codebook_size}) in its first {frames} frames, and row {row} does not"
            )


def _texts(states: Tensor | None, mask: Tensor | None, num_rows: int, *, width: int) -> list[Tensor | None]:
    """(L_i, D) states of each row without their padding; None for the null condition."""
    if states is None:
        if mask is not None:
            raise ValueError("encoder_attention_mask goes with encoder_hidden_states")
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
