"""Teacher-forced scoring: what every code costs the model, given all that it read before.

    codes (B,K,T) --delay--> steps (B,K,S) --decoder--> hidden (B,S,D) --rows of scored codes only--> logits --> nll, rank

The functions take a transformers MusicGen decoder (`MusicgenForCausalLM`) and codes; they know no audio, no text, no
windows and no Lightning. Only scored rows meet the output heads, in chunks, so logits of a whole window never exist
unless they are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import MusicgenForCausalLM

from musicgen_eval.models.decoder.fused_decoder import FusedDecoder, TextKeys
from musicgen_eval.models.decoder.packing import is_packed, last_hidden_state
from musicgen_eval.models.delay import delay_codes, realign, tail_mask
from musicgen_eval.models.numerics import full_precision
from musicgen_eval.models.transfers import upload

Tail = Literal["score", "drop"]

CHUNK_LOGITS = (
    1 << 21
)  # on a CPU a chunk of logits (8 MB in float32) stays near the cache; an accelerator takes 32 times that


@dataclass(frozen=True)
class Scores:
    """What one pass over a batch of codes gives.

    Attributes:
        nll: (B, K, T) float32 nats, NaN where not scored.
        rank: (B, K, T) int64, how many logits lie above the true code's; -1 where not scored.
        logits: (B, K, T, V) float32, 0 where not scored; None unless asked for.
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
    """Negative log-likelihood of every scored code under teacher forcing.

    Args:
        decoder: a transformers `MusicgenForCausalLM` in eval mode.
        codes: (B, K, T) int64 in [0, V), undelayed; padding may hold anything.
        delays: (K,) the checkpoint's delay pattern (`CodecSpec.delays`).
        valid: (B, K, T) bool, False for padding only, which is fed as the special token; None: no padding.
        scored: (B, K, T) bool, which codes are counted; None: all valid ones.
        encoder_hidden_states: (B, L, D) text states, projected to the decoder's width, masked; None: the null condition.
        encoder_attention_mask: (B, L), 0 for padded text; None: all of it is heard.
        tail: `score` counts every frame of every codebook; `drop` leaves out the last `delays[k]` frames of codebook k
            of the tensor's T, as audiocraft does.

    Returns:
        (B, K, T) float32 nats, NaN where not scored.

    Raises:
        ValueError: codes, masks or delays of the wrong shape, or a code outside [0, V).

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
    """As `score_codes`, with the rank of the true code, and its logits where asked for, from the same pass.

    Masks may lie on the CPU while codes and decoder are on an accelerator.
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
    """As `score_and_rank_codes`, by a decoder whose weights are joined for an accelerator, and without waiting for it.

    Args:
        decoder: the decoder.
        codes: (B, K, T) int64 in [0, V), the special token where padded; not checked.
        delays: (K,).
        counted: (B, K, T) bool on the CPU, which codes are counted.
        texts: keys and values of the texts.
        tail: see `score_codes`; only decides how many steps are fed.
        with_logits: also gives the logits of counted codes.
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
    """Raises ValueError for codes outside [0, V); one synchronisation on an accelerator, where they would abort the process."""
    fed = codes if valid is None else codes.masked_fill(~valid.to(codes.device), 0)
    if not fed.numel():
        return
    lowest, highest = torch.stack(fed.aminmax()).tolist()
    if lowest < 0 or highest >= codebook_size:
        raise ValueError(f"codes must lie in [0, {codebook_size}), got {lowest} to {highest}; pass valid= for padding")


def hidden_states(
    decoder: MusicgenForCausalLM,
    steps: Tensor,
    encoder_hidden_states: Tensor | None,
    encoder_attention_mask: Tensor | None,
) -> Tensor:
    """Runs the decoder's layers, without its output heads, over delayed codes.

    Args:
        decoder: a transformers `MusicgenForCausalLM`.
        steps: (B, K, S) int64 decoder input.
        encoder_hidden_states: (B, L, D) or None, which leaves cross attention out: the same as states of zero, since
            none of its projections has a bias.
        encoder_attention_mask: (B, L) or None.

    Returns:
        (B, S, D) in the decoder's dtype.
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
    """The (B, K, T) bool mask, on the CPU, of the codes that are counted; checks every shape on the way."""
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
    """The nll of codes from the decoder's own output, for a module that already has a forward pass.

    Args:
        logits: (B*K, S, V) as transformers' decoder returns them, or (B, K, S, V): one row a step, delayed, fed with
            `delay_codes(codes, ...)`.
        codes: (B, K, T) int64, undelayed.
        delays: (K,).
        scored: (B, K, T) bool; None: every code.

    Returns:
        (B, K, T) float32 nats, NaN where not scored. Frames whose step was not fed (S < t + delays[k] + 1) count as
        not scored, so both tails work.

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
    """(M, D) to (M, V) in float32 whatever the decoder's precision: rounded logits move an nll by hundredths, and tie."""
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
    """Applies `head` (codebook, (M, D) rows) -> (M, V) to the rows of each codebook's counted codes, chunk by chunk."""
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
