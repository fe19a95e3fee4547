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
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from operator import index

import torch
from torch import Tensor
from transformers import MusicgenForCausalLM

from musicgen_eval.delay import delay_codes
from musicgen_eval.errors import NonFiniteError
from musicgen_eval.models.packed import is_packed
from musicgen_eval.models.stepping import StepDecoder
from musicgen_eval.models.threads import map_single_threaded, torch_threads
from musicgen_eval.sampling import check_sampling, draw_codes


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
        decoder: a transformers `MusicgenForCausalLM` in eval mode.
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
    stride = 3 * max_frames // 5 if stride_frames is None else stride_frames
    if not 1 <= guidance_scale < float("inf"):
        raise ValueError(f"guidance_scale must be at least 1 (none), got {guidance_scale}")
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, codebook_size=V)
    totals = _per_row(total_frames, B, "total_frames")
    prompts = [P] * B if prompt_frames is None else _per_row(prompt_frames, B, "prompt_frames")
    T = max(totals, default=0)
    if uniforms is None and temperature > 0:
        raise ValueError(
            f"temperature={temperature:g} draws at random: pass uniforms (B, K, total_frames), such as "
            "torch.rand(..., generator=...), or temperature=0"
        )
    if uniforms is not None and tuple(uniforms.shape) != (B, K, T):
        raise ValueError(f"uniforms must be (B, K, total_frames) = {(B, K, T)}, got {tuple(uniforms.shape)}")
    if uniforms is not None and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("uniforms must lie in [0, 1)")
    for row, (known, total) in enumerate(zip(prompts, totals, strict=True)):
        if not 0 <= known <= min(P, total):
            raise ValueError(f"row {row}: a prompt of {known} frames does not fit {P} given and {total} in all")
    texts = _texts(encoder_hidden_states, encoder_attention_mask, B, width=decoder.config.hidden_size)

    device = decoder.device
    codes = torch.full((B, K, T), V, dtype=torch.int64, device=device)
    for row, known in enumerate(prompts):
        codes[row, :, :known] = prompt[row, :, :known]
        if known and not 0 <= int(prompt[row, :, :known].min()) <= int(prompt[row, :, :known].max()) < V:
            raise ValueError(f"prompt must lie in [0, {V}) in its first {known} frames, and row {row} does not")
    schedules = [
        window_spans(known, total, max_frames=max_frames, stride_frames=stride)
        for known, total in zip(prompts, totals, strict=True)
    ]
    if not any(schedules):
        return codes
    order = sorted(range(B), key=lambda row: texts[row] is None)  # rows that hear a text come first
    heard = [states.to(device) for row in order if (states := texts[row]) is not None]
    draw = partial(draw_codes, temperature=temperature, top_k=top_k, top_p=top_p)
    numbers = None if uniforms is None else uniforms[order].to(device, torch.float32)
    continued = codes[order]
    with torch.autocast(device.type, enabled=False) if is_packed(decoder) else nullcontext():
        steps = StepDecoder(
            decoder,
            num_rows=B + (len(heard) if guidance_scale != 1 else 0),
            num_steps=max(span.num_frames for spans in schedules for span in spans) + max(delays),
            text_states=heard,
        )
        for number in range(max(len(spans) for spans in schedules)):
            spans = [schedules[row][number] if number < len(schedules[row]) else None for row in order]
            try:
                _continue_windows(
                    steps, continued, spans, numbers, delays=delays, guidance_scale=guidance_scale, draw=draw
                )
            except NonFiniteError as error:
                raise NonFiniteError(sorted(order[row] for row in error.rows)) from None
    codes[order] = continued
    return codes


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


def _continue_windows(
    steps: StepDecoder,
    codes: Tensor,
    spans: Sequence[WindowSpan | None],
    uniforms: Tensor | None,
    *,
    delays: Sequence[int],
    guidance_scale: float,
    draw: Callable[[Tensor, Tensor | None], Tensor],
) -> None:
    """Draws one window of every row, in place.

    Args:
        steps: rows 0..B-1 as in codes, those with a text first; then, under guidance, those with a text again without it.
        codes: (B, K, T) int64.
        spans: (B,) the window of each row; None: its row is whole already, and idles.
        uniforms: (B, K, T), or None.
        delays: (K,).
        guidance_scale: see `continue_codes`.
        draw: (B, K, V) logits, (B, K) numbers -> (B, K) codes.
    """
    B, K, T = codes.shape
    device = codes.device
    idle = [span is None for span in spans]
    windows = [span or WindowSpan(0, 0, 0) for span in spans]
    known = [span.known - span.start for span in windows]
    num_drawn = max(span.end - span.known for span in windows) + max(delays)

    # Column i of what is drawn is predicted by the step that reads `known` steps and the special one before it, plus i:
    # it holds frame known + i - delay_k of the window in codebook k.
    i = torch.arange(num_drawn, device=device)
    delay = torch.tensor(list(delays), device=device).view(1, K, 1)
    first = torch.tensor(known, device=device).view(B, 1, 1)
    start = torch.tensor([span.start for span in windows], device=device).view(B, 1, 1)
    length = torch.tensor([span.num_frames for span in windows], device=device).view(B, 1, 1)
    frames = first + i - delay
    is_drawn = (i >= delay) & (frames < length)
    in_codes = (start + frames).clamp(0, T - 1)
    columns = codes.gather(2, in_codes).masked_fill((frames < 0) | (frames >= first), steps.special_token)
    numbers = None if uniforms is None else uniforms.gather(2, in_codes)

    steps.begin([max(known) + 1 if idle[row % B] else known[row % B] + 1 for row in range(steps.num_rows)])

    def read(row: int) -> None:
        span = windows[row % B]
        prompt, num_steps = codes[row % B, :, span.start : span.known], known[row % B] + 1
        delayed = delay_codes(prompt[None], delays=delays, special_token=steps.special_token, num_steps=num_steps)
        steps.read(row, delayed[0])

    rows_read = [row for row in range(steps.num_rows) if not idle[row % B]]
    if device.type == "cpu" and len(rows_read) > 1:
        map_single_threaded(read, rows_read)
    else:
        for row in rows_read:
            read(row)
    hidden = steps.last_read
    with torch_threads(steps.suitable_threads):
        for number in range(num_drawn):
            if number:
                ids = columns[:, :, number - 1]
                hidden = steps.step(torch.cat([ids, ids[: steps.num_rows - B]]), number - 1)
            logits = _guided(steps.logits(hidden), B, guidance_scale)
            drawn = draw(logits, None if numbers is None else numbers[:, :, number])
            columns[:, :, number] = torch.where(is_drawn[:, :, number], drawn, columns[:, :, number])
    # What is not finite stays in the keys and values of its row, and so in all that follows.
    finite = hidden.isfinite().all(1).tolist()
    rows_failed = {row % B for row, good in enumerate(finite) if not good and not idle[row % B]}
    if rows_failed:
        raise NonFiniteError(sorted(rows_failed))
    rows, k, i = is_drawn.nonzero(as_tuple=True)
    codes[rows, k, in_codes[rows, k, i]] = columns[rows, k, i]


def _guided(logits: Tensor, num_rows: int, guidance_scale: float) -> Tensor:
    """(R, K, V) -> (B, K, V): rows that have a twin without a text are moved away from it."""
    own, twins = logits[:num_rows], logits[num_rows:]
    if len(twins):
        own[: len(twins)] = torch.lerp(twins, own[: len(twins)], guidance_scale)
    return own


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
