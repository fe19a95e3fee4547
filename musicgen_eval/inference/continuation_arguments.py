"""Checks the arguments of `continue_codes`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from musicgen_eval.models.decoder.sampling import Sampling


class RowLengths(NamedTuple):
    """Lengths of the rows of a batch, in frames.

    Attributes:
        prompts: (B,) length of each row's prompt.
        totals: (B,) total length of each row's prompt and continuation.
    """

    prompts: list[int]
    totals: list[int]


def checked_lengths(
    prompt: Tensor,
    *,
    delays: Sequence[int],
    codebook_size: int,
    sampling: Sampling,
    total_frames: int | Sequence[int] | Tensor,
    prompt_frames: Sequence[int] | Tensor | None,
    uniforms: Tensor | None,
) -> RowLengths:
    """Checks the arguments of `continue_codes` and returns the lengths of its rows.

    Raises:
        ValueError: If shapes do not match, if codes are outside [0, V), or if a setting is out of range.
    """
    if prompt.dim() != 3 or prompt.shape[1] != len(delays) or prompt.dtype != torch.int64:
        raise ValueError(
            f"prompt must be (B, K, P) int64 with K = {len(delays)} delays, got {tuple(prompt.shape)} {prompt.dtype}"
        )
    B, K, P = prompt.shape
    sampling.check(codebook_size)
    totals = _per_row(total_frames, B, "total_frames")
    prompts = [P] * B if prompt_frames is None else _per_row(prompt_frames, B, "prompt_frames")
    for row, (frames, total) in enumerate(zip(prompts, totals, strict=True)):
        if not 0 <= frames <= min(P, total):
            raise ValueError(
                f"row {row}: prompt_frames must be between 0 and {min(P, total)} (prompt: {P}, total_frames: {total}), got {frames}"
            )
    _check_uniforms(uniforms, (B, K, max(totals, default=0)), sampling.temperature)
    _check_prompts(prompt, prompts, codebook_size)
    return RowLengths(prompts, totals)


def _per_row(value: int | Sequence[int] | Tensor, num_rows: int, name: str) -> list[int]:
    """Returns one whole number per row. `value` is a sequence of numbers, or one number for all rows."""
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
            f"uniforms is required if temperature is above 0, got temperature={temperature:g}; pass a (B, K, total_frames) "
            "tensor, such as torch.rand(..., generator=...), or set temperature=0"
        )
    if uniforms is not None and tuple(uniforms.shape) != shape:
        raise ValueError(f"uniforms must be (B, K, total_frames) = {shape}, got {tuple(uniforms.shape)}")
    if uniforms is not None and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError(f"uniforms must be in [0, 1), got {float(uniforms.min()):g} to {float(uniforms.max()):g}")


def _check_prompts(prompt: Tensor, prompt_frames: Sequence[int], codebook_size: int) -> None:
    in_range = ((prompt >= 0) & (prompt < codebook_size)).all(1).cpu()  # (B, P); one synchronisation with the device
    for row, frames in enumerate(prompt_frames):
        if not in_range[row, :frames].all():
            raise ValueError(
                f"row {row}: the first {frames} frames of prompt must be in [0, {codebook_size}); mark padding with prompt_frames"
            )


def row_texts(states: Tensor | None, mask: Tensor | None, num_rows: int, *, width: int) -> list[Tensor | None]:
    """Returns the (L_i, D) text states of each row without padding, or None for the null condition (no text).

    Raises:
        ValueError: If shapes do not match.
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
