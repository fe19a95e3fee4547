"""Scores the windows of a batch with a loaded model, the way that suits its device.

    CPU           every window alone and unpadded, on one thread, the windows side by side
    accelerator   one padded forward pass; padding is neither seen nor scored. The same holds for a sharded model, whose
                  processes must make their passes in the same order.

So on a CPU a window's numbers do not depend on its neighbours, on threads or on processes, to the last bit. Knows models,
codes and texts; nothing of readings, metrics or Lightning.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from musicgen_eval.inference.scoring import Scores, Tail, score_and_rank_codes, score_fused
from musicgen_eval.models.decoder.packing import is_packed
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.models.sharding import is_sharded
from musicgen_eval.models.threads import map_single_threaded


@torch.inference_mode()
def score_windows(
    model: MusicGen,
    codes: Sequence[Tensor],
    *,
    scored: Sequence[Tensor],
    texts: Sequence[str | None],
    tail: Tail = "score",
    with_logits: bool = False,
) -> list[Scores]:
    """Scores windows under teacher forcing.

    Args:
        model: the model.
        codes: (K, T_i) int64 each, lengths may differ.
        scored: (K, T_i) bool each, on the CPU: which codes are counted.
        texts: a text or None each.
        tail: see `score_codes`; relative to each window's own T.
        with_logits: also give the logits of scored codes.

    Returns:
        For each window (K, T_i) tensors, on the model's device.
    """
    states = model.encode_texts(texts)
    if model.device.type == "cpu" and not is_sharded(model.decoder):
        return _score_alone(model, codes, scored, states, tail, with_logits)
    return score_padded(model, codes, scored, states, tail=tail, with_logits=with_logits)


@torch.inference_mode()
def score_padded(
    model: MusicGen,
    codes: Sequence[Tensor],
    scored: Sequence[Tensor],
    states: Sequence[Tensor | None],
    *,
    tail: Tail = "score",
    with_logits: bool = False,
) -> list[Scores]:
    """As `score_windows`, as one padded pass over encoded texts; for accelerators, and right on a CPU too."""
    spec, lengths = model.spec, [window.shape[-1] for window in codes]
    B, K, T = len(codes), spec.num_codebooks, max(lengths)
    padded = torch.full((B, K, T), spec.special_token, dtype=torch.int64, device=model.device)
    valid = torch.zeros((B, K, T), dtype=torch.bool)
    counted = torch.zeros((B, K, T), dtype=torch.bool)
    for row, (window_codes, window_scored) in enumerate(zip(codes, scored, strict=True)):
        padded[row, :, : lengths[row]] = window_codes
        valid[row, :, : lengths[row]] = True
        counted[row, :, : lengths[row]] = window_scored
        if tail == "drop":
            for k, delay in enumerate(spec.delays):
                counted[row, k, max(0, lengths[row] - delay) :] = False
    if model.fused is not None:
        scores = score_fused(
            model.fused,
            padded,
            delays=spec.delays,
            counted=counted,
            texts=model.fused.text_keys(states),
            tail=tail,
            with_logits=with_logits,
        )
    else:
        text_states, text_mask = pad_states(states, width=model.decoder.config.hidden_size, device=model.device)
        scores = score_and_rank_codes(
            model.decoder,
            padded,
            delays=spec.delays,
            valid=valid,
            scored=counted,
            encoder_hidden_states=text_states,
            encoder_attention_mask=text_mask,
            tail=tail,
            with_logits=with_logits,
        )
    return [_row(scores, row, length) for row, length in enumerate(lengths)]


def _score_alone(
    model: MusicGen,
    codes: Sequence[Tensor],
    scored: Sequence[Tensor],
    states: Sequence[Tensor | None],
    tail: Tail,
    with_logits: bool,
) -> list[Scores]:
    def score(window: tuple[Tensor, Tensor, Tensor | None]) -> Scores:
        window_codes, window_scored, window_states = window
        scores = score_and_rank_codes(
            model.decoder,
            window_codes.unsqueeze(0),
            delays=model.spec.delays,
            scored=window_scored.unsqueeze(0),
            encoder_hidden_states=None if window_states is None else window_states.unsqueeze(0),
            tail=tail,
            with_logits=with_logits,
        )
        return _row(scores, 0, window_codes.shape[-1])

    windows = list(zip(codes, scored, states, strict=True))
    _grow_positions(model, max(window.shape[-1] for window in codes))
    if is_packed(model.decoder):  # its precision is settled; autocast would only round what lies between its products
        with torch.autocast("cpu", enabled=False):
            return map_single_threaded(score, windows)
    return map_single_threaded(score, windows)


def _grow_positions(model: MusicGen, num_frames: int) -> None:
    """Makes the table of positions long enough for windows beyond the limit, before several threads would at once."""
    positions = model.decoder.model.decoder.embed_positions
    num_steps = num_frames + max(model.spec.delays)
    if num_steps > positions.weights.shape[0]:
        positions.make_weights(num_steps, positions.embedding_dim)


def pad_states(
    states: Sequence[Tensor | None], *, width: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Text states of different lengths as one batch.

    Args:
        states: (L_i, D) each, or None for the null condition.
        width: D.
        device: where the batch goes.

    Returns:
        (B, L, D) float32 zero where padded and (B, L) int64 mask; (None, None) when every row is the null condition. A
        null row hears one position of zeros rather than nothing, since a softmax over nothing is NaN; its keys and
        values have no bias, so what it hears is exactly zero.
    """
    if all(row is None for row in states):
        return None, None
    longest = max(row.shape[0] for row in states if row is not None)
    batch = torch.zeros((len(states), longest, width), dtype=torch.float32, device=device)
    mask = torch.zeros((len(states), longest), dtype=torch.int64, device=device)
    for index, row in enumerate(states):
        if row is None:
            mask[index, 0] = 1
        else:
            batch[index, : row.shape[0]] = row
            mask[index, : row.shape[0]] = 1
    return batch, mask


def _row(scores: Scores, row: int, num_frames: int) -> Scores:
    """One window's (K, T) part of a batch."""
    logits = None if scores.logits is None else scores.logits[row, :, :num_frames]
    return Scores(nll=scores.nll[row, :, :num_frames], rank=scores.rank[row, :, :num_frames], logits=logits)
