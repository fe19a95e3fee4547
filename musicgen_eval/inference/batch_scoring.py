"""Scores the windows of a batch with a loaded model.

On a CPU, windows are scored in parallel. Each window is scored on one thread and without padding, so its scores are bit-identical
in any batch and with any number of threads or processes.

On an accelerator, all windows are scored in one padded forward pass. Padding is masked and not scored. Sharded models use
padded forward passes on any device, because all processes must run the same passes in the same order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from musicgen_eval.inference.scoring import Scores, Tail, score_and_rank_codes, score_fused
from musicgen_eval.models.decoder.packing import is_packed
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.models.sharding import is_sharded
from musicgen_eval.models.threads import map_single_threaded
from musicgen_eval.records import CodecSpec


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
        model: Loaded model.
        codes: (K, T_i) int64 codes of each window. The lengths T_i may differ.
        scored: (K, T_i) bool mask of each window, on the CPU, True for codes to score.
        texts: Text of each window. None means the null condition (no text).
        tail: See `score_codes`. The option applies to the T_i frames of each window.
        with_logits: Whether to also return the logits of the scored codes.

    Returns:
        For each window, scores with (K, T_i) tensors on the model's device.
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
    """Scores windows under teacher forcing in one padded forward pass, on any device.

    Args:
        model: Loaded model.
        codes: See `score_windows`.
        scored: See `score_windows`.
        states: (L_i, D) text states of each window. None means the null condition (no text).
        tail: See `score_windows`.
        with_logits: See `score_windows`.

    Returns:
        For each window, scores with (K, T_i) tensors on the model's device.
    """
    spec = model.spec
    padded, valid, counted = _pad(codes, scored, spec, tail=tail, device=model.device)
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
    return [_row(scores, row, window.shape[-1]) for row, window in enumerate(codes)]


def _pad(
    codes: Sequence[Tensor], scored: Sequence[Tensor], spec: CodecSpec, *, tail: Tail, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (B, K, T) padded codes on `device`, and two (B, K, T) boolean masks: the valid codes and the codes to score."""
    lengths = [window.shape[-1] for window in codes]
    B, K, T = len(codes), spec.num_codebooks, max(lengths)
    padded = torch.full((B, K, T), spec.special_token, dtype=torch.int64, device=device)
    valid = torch.zeros((B, K, T), dtype=torch.bool)
    counted = torch.zeros((B, K, T), dtype=torch.bool)
    for row, (window_codes, window_scored) in enumerate(zip(codes, scored, strict=True)):
        padded[row, :, : lengths[row]] = window_codes
        valid[row, :, : lengths[row]] = True
        counted[row, :, : lengths[row]] = window_scored
        if tail == "drop":
            for k, delay in enumerate(spec.delays):
                counted[row, k, max(0, lengths[row] - delay) :] = False
    return padded, valid, counted


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
    if is_packed(
        model.decoder
    ):  # packed weights have a fixed dtype, so autocast would only round values between matrix products
        with torch.autocast("cpu", enabled=False):
            return map_single_threaded(score, windows)
    return map_single_threaded(score, windows)


def _grow_positions(model: MusicGen, num_frames: int) -> None:
    """Extends the decoder's position table to the length of the longest window, so that parallel threads only need to read it."""
    positions = model.decoder.model.decoder.embed_positions
    num_steps = num_frames + max(model.spec.delays)
    if num_steps > positions.weights.shape[0]:
        positions.make_weights(num_steps, positions.embedding_dim)


def pad_states(
    states: Sequence[Tensor | None], *, width: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Pads text states of different lengths and stacks them into one batch.

    Args:
        states: (L_i, D) text states of each row. None means the null condition (no text).
        width: Width D of the text states.
        device: Device of the batch.

    Returns:
        (B, L, D) float32 states, padded with zeros, and a (B, L) int64 mask. Both are None if every row has the null condition.
        A row with the null condition attends to one position of zeros, because a softmax over no positions would be NaN. The cross
        attention of such a row is exactly zero, because the key and value projections have no bias.
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
    """Returns the (K, T) scores of one row of a batch."""
    logits = None if scores.logits is None else scores.logits[row, :, :num_frames]
    return Scores(nll=scores.nll[row, :, :num_frames], rank=scores.rank[row, :, :num_frames], logits=logits)
