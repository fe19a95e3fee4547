"""Baselines for comparison: `generate` and the forward pass of transformers, and plain loops over the decoder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from musicgen_eval.models.delay import delay_codes, realign

GUIDANCE_SCALE = 3.0
TOP_K = 250


def generate(model: Any, prompt: Tensor, *, num_turns: int, text_tokens: int) -> None:
    """Calls `generate` of transformers with a prompt of codes, without decoding to audio.

    Args:
        model: `MusicgenForConditionalGeneration` of transformers.
        prompt: (B, K, P) codes.
        num_turns: Number of decode steps, without those of the delay.
        text_tokens: Length of the random texts.
    """
    B, K, P = prompt.shape
    V = model.decoder.config.vocab_size
    for setting in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
        setattr(model.generation_config, setting, V)
    model.generation_config.max_length = None
    ids = torch.randint(3, model.config.text_encoder.vocab_size, (B, text_tokens)).to(prompt.device)
    silence = SimpleNamespace(audio_values=torch.zeros(B, 1, 1))
    with mock.patch.object(model.audio_encoder, "decode", return_value=silence):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=prompt.reshape(B * K, P),
            do_sample=True,
            top_k=min(TOP_K, V),
            guidance_scale=GUIDANCE_SCALE,
            max_new_tokens=num_turns + K - 1,  # includes the delay of the last codebook
        )


def plain_loop(decoder: Any, prompt: Tensor, texts: Tensor, *, num_turns: int) -> Tensor:
    """Generates codes with a simple loop over the decoder of transformers and its cache.

    Args:
        decoder: `MusicgenForCausalLM` of transformers.
        prompt: (B, K, P) codes, fed with a delay.
        texts: (B, L, D) text states.
        num_turns: Number of decode steps.

    Returns:
        (B, K, num_turns) sampled columns.
    """
    B, K, _ = prompt.shape
    V = decoder.config.vocab_size
    states = torch.cat([texts, torch.zeros_like(texts)]).to(decoder.dtype)
    ids = delay_codes(prompt, delays=range(K), special_token=V, num_steps=prompt.shape[2] + 1).repeat(2, 1, 1)
    columns, cache = [], None
    for _ in range(num_turns):
        output = decoder(
            input_ids=ids.reshape(2 * B * K, -1), encoder_hidden_states=states, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        own, twins = output.logits[:, -1].float().view(2, B * K, V)
        best, codes = torch.lerp(twins, own, GUIDANCE_SCALE).topk(min(TOP_K, V))
        drawn = codes.gather(1, best.softmax(-1).multinomial(1)).view(B, K, 1)
        columns.append(drawn)
        ids = drawn.repeat(2, 1, 1)
    return torch.cat(columns, 2)


def score_by_transformers(decoder: Any, codes: Tensor, texts: Tensor) -> Tensor:
    """Returns (B, K, T) nll from one forward pass of the decoder of transformers and the log-softmax of all logits."""
    B, K, T = codes.shape
    V = decoder.config.vocab_size
    steps = delay_codes(codes, delays=range(K), special_token=V)
    logits = decoder(
        input_ids=steps.reshape(B * K, -1), encoder_hidden_states=texts.to(decoder.dtype), use_cache=False
    ).logits
    log_p = realign(logits.float().log_softmax(-1).view(B, K, -1, V), delays=range(K), num_frames=T)
    return -log_p.gather(-1, codes.unsqueeze(-1)).squeeze(-1)


def score_one_by_one(decoder: Any, codes: Tensor, texts: Tensor) -> Tensor:
    """Returns (B, K, T) nll like `score_by_transformers`, one window at a time, as in a simple script."""
    rows = zip(codes, texts, strict=True)
    return torch.cat([score_by_transformers(decoder, row[None], text[None]) for row, text in rows])
