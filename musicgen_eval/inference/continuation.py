"""Continues prompts, using sliding windows if a prompt and its continuation together exceed the decoder's longest window.

The lengths of prompts and continuations may differ between the rows of a batch, because each row has its own windows. The generated
codes of a row do not depend on the other rows. This module does not depend on audio, tokenizers or Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import MusicgenForCausalLM

from musicgen_eval.errors import NonFiniteError
from musicgen_eval.inference.continuation_arguments import checked_lengths, row_texts
from musicgen_eval.inference.sliding_windows import window_spans
from musicgen_eval.inference.window_generation import generate_windows, window_drawer
from musicgen_eval.models.decoder.fused_decoder import FusedDecoder
from musicgen_eval.models.decoder.sampling import Sampling
from musicgen_eval.models.numerics import full_precision
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import StepKernels
from musicgen_eval.records.signatures import takes_settings


@takes_settings(positional=("decoder", "prompt"))
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
    sampling: Sampling,
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
    lengths = checked_lengths(
        prompt,
        delays=delays,
        codebook_size=decoder.config.vocab_size,
        sampling=sampling,
        total_frames=total_frames,
        prompt_frames=prompt_frames,
        uniforms=uniforms,
    )
    texts = row_texts(encoder_hidden_states, encoder_attention_mask, len(prompt), width=decoder.config.hidden_size)
    with full_precision():
        return continue_prompts(
            decoder,
            [row[:, :frames] for row, frames in zip(prompt, lengths.prompts, strict=True)],
            total_frames=lengths.totals,
            delays=delays,
            max_frames=max_frames,
            stride_frames=3 * max_frames // 5 if stride_frames is None else stride_frames,
            texts=texts,
            guidance_scale=sampling.guidance_scale,
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
    """Continues prompts in the same way as `continue_codes`, but without checking the arguments.

    Args:
        decoder: A transformers decoder, or a fused decoder for an accelerator.
        prompts: (K, P_i) int64 codes of each row's prompt.
        total_frames: (B,) total number of frames in each row's prompt and continuation.
        delays: (K,) delay of each codebook in steps.
        max_frames: See `continue_codes`.
        stride_frames: See `continue_codes`.
        texts: (L_i, D) text states of each row. None means the null condition (no text).
        guidance_scale: Scale of classifier-free guidance.
        sampling: Temperature, top_k and top_p.
        uniforms: (B, K, max total_frames) random numbers in [0, 1), or None at temperature 0.
        kernels: Implementation of the decoding steps on CUDA.

    Returns:
        (B, K, max total_frames) int64 codes on the decoder's device.
    """
    V = decoder.special_token if isinstance(decoder, FusedDecoder) else decoder.config.vocab_size
    codes = _padded_prompts(prompts, total_frames, num_codebooks=len(delays), special_token=V, device=decoder.device)
    schedules = [
        window_spans(prompt.shape[1], total, max_frames=max_frames, stride_frames=stride_frames)
        for prompt, total in zip(prompts, total_frames, strict=True)
    ]
    if not any(schedules):
        return codes
    order = sorted(range(len(prompts)), key=lambda row: texts[row] is None)  # rows with text first
    index = upload(torch.tensor(order), decoder.device)
    numbers = None if uniforms is None else upload(uniforms.float(), decoder.device).index_select(0, index)
    continued = codes.index_select(0, index)
    draw = window_drawer(
        decoder,
        [states.to(decoder.device) for row in order if (states := texts[row]) is not None],
        num_rows=len(prompts),
        num_steps=max(span.num_frames for spans in schedules for span in spans) + max(delays),
        guidance_scale=guidance_scale,
        sampling=sampling,
        kernels=kernels,
    )
    for number in range(max(len(spans) for spans in schedules)):
        spans = [schedules[row][number] if number < len(schedules[row]) else None for row in order]
        try:
            generate_windows(draw, continued, spans, numbers, delays=delays, special_token=V)
        except NonFiniteError as error:
            raise NonFiniteError(sorted(order[row] for row in error.rows)) from None
    return codes.index_copy_(0, index, continued)


def _padded_prompts(
    prompts: Sequence[Tensor],
    total_frames: Sequence[int],
    *,
    num_codebooks: int,
    special_token: int,
    device: torch.device,
) -> Tensor:
    """Returns the prompts of all rows as (B, K, max total_frames) int64 codes, padded on the right with the special token."""
    shape = (len(prompts), num_codebooks, max(total_frames, default=0))
    codes = torch.full(shape, special_token, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        codes[row, :, : prompt.shape[1]] = prompt
    return codes
