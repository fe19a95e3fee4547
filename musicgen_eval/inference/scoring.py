"""Computes the negative log-likelihood (nll) of each code given all preceding codes, under teacher forcing.

    codes (B,K,T) --delay--> steps (B,K,S) --decoder--> hidden (B,S,D) --rows of scored codes only--> logits --> nll, rank

The functions take codes and a decoder, such as a transformers `MusicgenForCausalLM`. Only the hidden states of scored codes pass
through the output heads, in chunks. Therefore, the logits of a whole window are in memory only if the caller requests them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import MusicgenForCausalLM

from musicgen_eval.models.decoder.forward import last_hidden_state
from musicgen_eval.models.decoder.fused_decoder import FusedDecoder, TextKeys
from musicgen_eval.models.decoder.packing import is_packed
from musicgen_eval.models.delay import delay_codes, realign, tail_mask
from musicgen_eval.models.numerics import full_precision
from musicgen_eval.models.transfers import upload

Tail = Literal["score", "drop"]

# Number of logits per chunk on a CPU: 8 MB in float32, which roughly fits the cache. On an accelerator, chunks are 32 times larger.
CHUNK_LOGITS = 1 << 21


@dataclass(frozen=True)
class Scores:
    """The scores of a batch of codes from one forward pass.

    Attributes:
        nll: (B, K, T) float32 negative log-likelihoods in nats, NaN for codes that are not scored.
        rank: (B, K, T) int64 number of logits that exceed the logit of the true code, or -1 for codes that are not scored.
        logits: (B, K, T, V) float32 logits, 0 for codes that are not scored. None if the caller did not request logits.
    """

    nll: Tensor
    rank: Tensor
    logits: Tensor | None = None


def score_codes(
    decoder: MusicgenForCausalLM,
    codes: Tensor,
    *,
    delays: Sequence[int],
    valid: Tensor | None = None,
    scored: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    tail: Tail = "score",
) -> Tensor:
    """Computes the negative log-likelihood of every scored code under teacher forcing.

    Args:
        decoder: A transformers `MusicgenForCausalLM` in eval mode.
        codes: (B, K, T) int64 codes in [0, V), without delays. Padding may contain any values.
        delays: (K,) delay of each codebook in steps, as in `CodecSpec.delays` of the checkpoint.
        valid: (B, K, T) bool mask, False for padding, which is replaced with the special token. None means no padding.
        scored: (B, K, T) bool mask, True for codes to score. None means all valid codes.
        encoder_hidden_states: (B, L, D) text states, projected to the decoder's width. None means the null condition (no text).
        encoder_attention_mask: (B, L) mask, 0 for padding. None means no padding.
        tail: `score` scores every frame of every codebook. `drop` excludes the last `delays[k]` of the T frames of codebook k,
            as audiocraft does.

    Returns:
        (B, K, T) float32 negative log-likelihoods in nats, NaN for codes that are not scored.

    Raises:
        ValueError: If codes, masks or delays have the wrong shape, or if a code is outside [0, V).

    Source: MusicGen (arXiv 2306.05284), section 2.2; audiocraft 1.3.0, `MusicGenSolver._compute_cross_entropy`.
    """
    return score_and_rank_codes(
        decoder,
        codes,
        delays=delays,
        valid=valid,
        scored=scored,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
        tail=tail,
    ).nll


def score_and_rank_codes(
    decoder: MusicgenForCausalLM,
    codes: Tensor,
    *,
    delays: Sequence[int],
    valid: Tensor | None = None,
    scored: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    tail: Tail = "score",
    with_logits: bool = False,
) -> Scores:
    """Computes the nll and the ranks of codes, and optionally the logits, in one forward pass.

    The masks may be on the CPU even if the codes and the decoder are on an accelerator.

    Args:
        decoder: See `score_codes`.
        codes: See `score_codes`.
        delays: See `score_codes`.
        valid: See `score_codes`.
        scored: See `score_codes`.
        encoder_hidden_states: See `score_codes`.
        encoder_attention_mask: See `score_codes`.
        tail: See `score_codes`.
        with_logits: Whether to also return the logits of the scored codes.
    """
    counted = counted_codes(codes, delays=delays, valid=valid, scored=scored, tail=tail)
    V = decoder.config.vocab_size
    _check_range(codes, valid, V)
    steps = delay_codes(codes, delays=delays, special_token=V, valid=valid, num_steps=_num_steps(codes, delays, tail))
    with full_precision():
        hidden = hidden_states(decoder, steps, encoder_hidden_states, encoder_attention_mask)
        return _score_rows(
            lambda k, rows: _logits(decoder.lm_heads[k], rows),
            V,
            hidden,
            codes,
            counted,
            delays,
            with_logits=with_logits,
        )


def score_fused(
    decoder: FusedDecoder,
    codes: Tensor,
    *,
    delays: Sequence[int],
    counted: Tensor,
    texts: TextKeys | None,
    tail: Tail = "score",
    with_logits: bool = False,
) -> Scores:
    """Computes the nll and the ranks of codes, and optionally the logits, with a fused decoder.

    The function does not synchronise with the device.

    Args:
        decoder: A fused decoder.
        codes: (B, K, T) int64 codes in [0, V), with the special token as padding. The values are not checked.
        delays: (K,) delay of each codebook in steps.
        counted: (B, K, T) bool mask on the CPU, True for codes to score.
        texts: Cross-attention keys and values of the texts. None means the null condition (no text).
        tail: See `score_codes`. Here, the option determines only the number of steps that are fed to the decoder.
        with_logits: Whether to also return the logits of the scored codes.
    """
    V = decoder.special_token
    steps = delay_codes(codes, delays=delays, special_token=V, num_steps=_num_steps(codes, delays, tail))

    def logits(codebook: int, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden, decoder.head(codebook))

    with full_precision():
        hidden = decoder.hidden_states(steps, texts)
        return _score_rows(logits, V, hidden, codes, counted, delays, with_logits=with_logits)


def _num_steps(codes: Tensor, delays: Sequence[int], tail: Tail) -> int:
    return codes.shape[2] + (max(delays) if tail == "score" else 0)


def _check_range(codes: Tensor, valid: Tensor | None, codebook_size: int) -> None:
    """Raises `ValueError` if a code is outside [0, V), because such a code would abort the process on an accelerator.

    The check synchronises with the device once.
    """
    fed = codes if valid is None else codes.masked_fill(~valid.to(codes.device), 0)
    if not fed.numel():
        return
    lowest, highest = torch.stack(fed.aminmax()).tolist()
    if lowest < 0 or highest >= codebook_size:
        raise ValueError(f"codes must be in [0, {codebook_size}), got {lowest} to {highest}; mask padding with valid")


def hidden_states(
    decoder: MusicgenForCausalLM,
    steps: Tensor,
    encoder_hidden_states: Tensor | None,
    encoder_attention_mask: Tensor | None,
) -> Tensor:
    """Runs the decoder's layers, but not its output heads, on delayed codes.

    Args:
        decoder: A transformers `MusicgenForCausalLM`.
        steps: (B, K, S) int64 decoder input.
        encoder_hidden_states: (B, L, D) text states. If None, cross attention is skipped. This is equivalent to passing text states
            of zeros, because the projections have no bias.
        encoder_attention_mask: (B, L) mask, 0 for padding. None means no padding.

    Returns:
        (B, S, D) hidden states in the decoder's dtype.
    """
    B, K, S = steps.shape
    if B == 1 and encoder_attention_mask is None and is_packed(decoder):
        text_states = None if encoder_hidden_states is None else encoder_hidden_states[0]
        return last_hidden_state(decoder, steps[0], text_states)[None]
    if encoder_hidden_states is not None:
        encoder_hidden_states = encoder_hidden_states.to(decoder.dtype)
    return decoder.model.decoder(
        input_ids=steps.reshape(B * K, S),
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
        use_cache=False,
    ).last_hidden_state


def counted_codes(
    codes: Tensor, *, delays: Sequence[int], valid: Tensor | None, scored: Tensor | None, tail: Tail
) -> Tensor:
    """Returns the (B, K, T) bool mask of the codes to score, on the CPU.

    Raises:
        ValueError: If codes, masks or delays have the wrong shape, if a mask is not bool, or if `tail` is unknown.
    """
    if codes.dim() != 3 or codes.shape[1] != len(delays):
        raise ValueError(f"codes must be (B, K, T) with K = {len(delays)} delays, got {tuple(codes.shape)}")
    if tail not in ("score", "drop"):
        raise ValueError(f"tail must be 'score' or 'drop', got {tail!r}")
    counted = torch.ones(codes.shape, dtype=torch.bool)
    for name, mask in (("valid", valid), ("scored", scored)):
        if mask is None:
            continue
        if mask.shape != codes.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"{name} must be a bool mask shaped like codes {tuple(codes.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        counted &= mask.cpu()
    if tail == "drop":
        counted &= tail_mask(codes.shape[2], delays=delays)
    return counted


def nll_from_logits(logits: Tensor, codes: Tensor, *, delays: Sequence[int], scored: Tensor | None = None) -> Tensor:
    """Computes the negative log-likelihood (nll) of codes from existing decoder logits, such as those of a training step.

    Args:
        logits: Logits of the decoder for the input `delay_codes(codes, ...)`: (B*K, S, V) as in transformers, or (B, K, S, V).
        codes: (B, K, T) int64 codes, without delays.
        delays: (K,) delay of each codebook in steps.
        scored: (B, K, T) bool mask, True for codes to score. None means all codes.

    Returns:
        (B, K, T) float32 nlls in nats, NaN for codes that are not scored. Code (k, t) is not scored if its step was not fed to the
        decoder (S < t + delays[k] + 1). Therefore, the function accepts logits that were computed for either value of `tail` (see
        `score_codes`).

    >>> import torch
    >>> nll = nll_from_logits(torch.zeros(2, 4, 8), torch.tensor([[[1, 2, 3], [4, 5, 6]]]), delays=(0, 1))
    >>> bool(torch.allclose(nll, torch.tensor(8.0).log()))
    True
    """
    B, K, T = codes.shape
    S, V = logits.shape[-2:]
    logits = logits.reshape(B, K, S, V)
    missing = max(0, T + max(delays) - S)
    logits = nn.functional.pad(logits, (0, 0, 0, missing), value=float("nan"))
    aligned = realign(logits, delays=delays, num_frames=T).float()
    true = aligned.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    nll = aligned.logsumexp(-1) - true
    return nll if scored is None else nll.masked_fill(~scored, float("nan"))


def _logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """Computes (M, V) logits from (M, D) hidden states, in float32, regardless of the decoder's precision.

    Rounding the logits to half precision would change the nll by hundredths of a nat, and would produce ties.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if isinstance(head, nn.Linear):
            return nn.functional.linear(hidden.float(), head.weight.float())
        return head(hidden).float()


def _score_rows(
    head: Callable[[int, Tensor], Tensor],
    codebook_size: int,
    hidden: Tensor,
    codes: Tensor,
    counted: Tensor,
    delays: Sequence[int],
    *,
    with_logits: bool,
) -> Scores:
    """Scores the codes selected by the mask `counted`, one codebook at a time, in chunks.

    `head` maps the index of a codebook and (M, D) hidden states to (M, V) logits.
    """
    B, K, T = codes.shape
    V = codebook_size
    device = hidden.device
    nll = torch.full((B, K, T), float("nan"), dtype=torch.float32, device=device)
    rank = torch.full((B, K, T), -1, dtype=torch.int64, device=device)
    logits = torch.zeros((B, K, T, V), dtype=torch.float32, device=device) if with_logits else None
    chunk_rows = max(1, CHUNK_LOGITS * (1 if device.type == "cpu" else 32) // V)
    for k, delay in enumerate(delays):
        for rows in counted[:, k].nonzero().split(chunk_rows):
            b, t = upload(rows, device).unbind(1)
            chunk = head(k, hidden[b, t + delay])
            true = chunk.gather(1, codes[b, k, t].unsqueeze(1))
            nll[b, k, t] = chunk.logsumexp(1) - true.squeeze(1)
            rank[b, k, t] = (chunk > true).sum(1)
            if logits is not None:
                logits[b, k, t] = chunk
    return Scores(nll=nll, rank=rank, logits=logits)
