"""The variants of the scoring benchmark: the plain script, and the package with one change after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from musicgen_eval.inference.scoring import score_codes
from musicgen_eval.models.codec.encoder import SegmentEncoder
from musicgen_eval.models.decoder.forward import last_hidden_state
from musicgen_eval.models.decoder.packing import pack_linears
from musicgen_eval.models.delay import delay_codes, realign
from musicgen_eval.models.packed_matrix import can_pack
from musicgen_eval.models.threads import map_single_threaded

HiddenState = Callable[[Any, Tensor, Tensor | None], Tensor]
OWN_FLOAT32 = "+ own forward pass and attention"
OWN_BFLOAT16 = "+ packed bfloat16 weights"


@dataclass(frozen=True)
class Work:
    """Input of every variant."""

    audio: list[Tensor]  # (1, N) each
    states: Tensor | None  # (L, D) text states of all windows
    delays: tuple[int, ...]


@dataclass
class Variant:
    """One row of the table."""

    name: str
    encode: Callable[[Work], list[Tensor]]
    score: Callable[[Work, Sequence[Tensor]], list[Tensor]]
    encode_s: list[float] = field(default_factory=list)
    score_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    changed_codes: int = 0
    nll_error: float = 0.0
    ce_error: float = 0.0


def plain_encode(model: Any, work: Work) -> list[Tensor]:
    return [model.audio_encoder.encode(audio[None]).audio_codes[0, 0] for audio in work.audio]


def plain_score(model: Any, work: Work, codes: Sequence[Tensor]) -> list[Tensor]:
    scores = []
    for window in codes:
        K, T = window.shape
        steps = delay_codes(window[None], delays=work.delays, special_token=model.decoder.config.vocab_size)
        states = None if work.states is None else work.states[None]
        logits = model.decoder(input_ids=steps[0], encoder_hidden_states=states, use_cache=False).logits
        log_p = realign(logits.log_softmax(-1)[None], delays=work.delays, num_frames=T)[0]
        scores.append(-log_p.gather(-1, window[..., None])[..., 0].reshape(K, T))
    return scores


def hidden_by_transformers(decoder: Any, steps: Tensor, states: Tensor | None) -> Tensor:
    states = None if states is None else states[None]
    output = decoder.model.decoder(input_ids=steps, encoder_hidden_states=states, use_cache=False)
    return cast(Tensor, output.last_hidden_state[0])


def score_alone(decoder: Any, work: Work, codes: Sequence[Tensor], hidden_state: HiddenState) -> list[Tensor]:
    """Scores windows in parallel, one thread each, with the heads on scored rows only, as `MusicGen.score` does on a CPU."""

    def one(window: Tensor) -> Tensor:
        steps = delay_codes(window[None], delays=work.delays, special_token=decoder.config.vocab_size)[0]
        hidden = hidden_state(decoder, steps, work.states)
        nll = torch.empty(window.shape)
        for k, (delay, row) in enumerate(zip(work.delays, window, strict=True)):
            outputs = hidden[delay : delay + len(row)]
            for rows, true, out in zip(outputs.split(1024), row.split(1024), nll[k].split(1024), strict=True):
                logits = decoder.lm_heads[k](rows)
                out.copy_(logits.logsumexp(-1) - logits.gather(1, true[:, None])[:, 0])
        return nll

    return map_single_threaded(one, codes)


def score_batch(decoder: Any, work: Work, codes: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Scores all windows in one padded forward pass, on an accelerator."""
    states = None if work.states is None else work.states.expand(len(codes), -1, -1)
    with torch.autocast(codes[0].device.type, dtype=dtype, enabled=dtype is not None):
        return list(score_codes(decoder, torch.stack(list(codes)), delays=work.delays, encoder_hidden_states=states))


def variants_on_cpu(model: Any) -> list[Variant]:
    encoder = SegmentEncoder(model.audio_encoder)
    joined = copy.deepcopy(model.decoder)
    pack_linears(joined, few_rows=False)

    def encode(work: Work) -> list[Tensor]:
        return encoder.encode_all(work.audio)

    def alone(decoder: Any, hidden_state: HiddenState) -> Callable[[Work, Sequence[Tensor]], list[Tensor]]:
        return lambda work, codes: score_alone(decoder, work, codes, hidden_state)

    lines = [
        Variant("plain script", lambda work: plain_encode(model, work), lambda w, c: plain_score(model, w, c)),
        Variant("+ encoder as matrix products in chunks", encode, lambda w, c: plain_score(model, w, c)),
        Variant("+ windows in parallel, heads on scored rows", encode, alone(model.decoder, hidden_by_transformers)),
        Variant(OWN_FLOAT32, encode, alone(joined, last_hidden_state)),
    ]
    if can_pack(torch.bfloat16):
        half = copy.deepcopy(model.decoder)
        pack_linears(half, torch.bfloat16)
        lines.append(Variant(OWN_BFLOAT16, encode, alone(half, last_hidden_state)))
    return lines


def variants_on_cuda(model: Any) -> list[Variant]:
    encoder = SegmentEncoder(model.audio_encoder)

    def encode(work: Work) -> list[Tensor]:
        return encoder.encode_all(work.audio)

    half = torch.bfloat16
    return [
        Variant("plain script", lambda work: plain_encode(model, work), lambda w, c: plain_score(model, w, c)),
        Variant("+ one batch, heads on scored rows", encode, lambda w, c: score_batch(model.decoder, w, c, None)),
        Variant("+ bfloat16 autocast", encode, lambda w, c: score_batch(model.decoder, w, c, half)),
    ]
