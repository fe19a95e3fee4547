"""Section `oracle`: differences from audiocraft in each precision, with the decoders of transformers and this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MusicgenForCausalLM

from musicgen_eval.inference.batch_scoring import score_padded
from musicgen_eval.inference.scoring import score_codes
from musicgen_eval.models.checkpoint import find_checkpoint
from musicgen_eval.models.delay import tail_mask
from musicgen_eval.models.musicgen import PRODUCT_DTYPES, MusicGen, load_model
from tools.gpu.findings import Findings
from tools.gpu.machine import ROOT
from tools.gpu.sections import Check

DATA = ROOT / "tests" / "data" / "oracle"
LIMITS = {"32-true": (2e-4, 5e-6), "bf16-mixed": (0.2, 2e-2), "bf16-true": (0.2, 2e-2), "16-mixed": (5e-2, 5e-3)}
"""Precision -> largest accepted difference of an nll and of a cross entropy, in nats. The CPU tests use those of 32-true."""


@dataclass(frozen=True)
class Variant:
    """One batch of the oracle.

    Attributes:
        codes: (B, K, T) codes.
        valid: (B, K, T) bool, False for padding. None means no padding.
        states: (B, L, D) text states. None means the null condition.
        nll: (B, K, T) expected nats, NaN for codes that are not scored.
        ce: Expected cross entropy.
    """

    codes: Tensor
    valid: Tensor | None
    states: Tensor | None
    nll: Tensor
    ce: float


def run(check: Check, findings: Findings) -> None:
    """Scores all cases and variants in all precisions, with both decoders."""
    findings.note(
        "Largest differences from audiocraft 1.3.0 in float32 on a CPU, in nats, of the nll of a code and of a cross entropy. A "
        "row fails if a difference exceeds its limit."
    )
    with torch.inference_mode():
        for case in check.sizes.oracle_cases:
            expected = json.loads((DATA / case / "expected.json").read_text())
            variants = {name: _variant(case, name, expected) for name in expected["variants"]}
            for precision in check.sizes.oracle_precisions:
                for way in (_by_transformers, _by_package):
                    with findings.case(
                        "Differences", case=case, precision=precision, computed_by=way.__name__.removeprefix("_by_")
                    ) as row:
                        found = way(case, precision, variants, tuple(expected["model"]["delays"]), check.device)
                        _compare(row, found, variants, precision)


def _compare(row: dict[str, Any], found: Mapping[str, Tensor], variants: Mapping[str, Variant], precision: str) -> None:
    nll_limit, ce_limit = LIMITS[precision]
    for name, variant in variants.items():
        if not torch.equal(found[name].isnan(), variant.nll.isnan()):
            raise ValueError(f"{name}: the scored codes differ from the expected ones, or an nll is NaN")
    row.update(
        nll_difference=max(float((found[name] - v.nll).abs().nan_to_num().max()) for name, v in variants.items()),
        ce_difference=max(abs(_cross_entropy(found[name]) - v.ce) for name, v in variants.items()),
        nll_limit=nll_limit,
        ce_limit=ce_limit,
    )
    if row["nll_difference"] > nll_limit or row["ce_difference"] > ce_limit:
        raise ValueError("a difference exceeds its limit")


def _by_transformers(
    case: str, precision: str, variants: Mapping[str, Variant], delays: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Scores with `score_codes` and the decoder of transformers."""
    decoder = _decoder(case).to(device)
    if precision == "bf16-true":
        decoder = decoder.to(torch.bfloat16)
    found = {}
    for name, variant in variants.items():
        mixed = torch.autocast(device.type, PRODUCT_DTYPES[precision]) if "mixed" in precision else nullcontext()
        states = None if variant.states is None else variant.states.to(device)
        with mixed:
            nll = score_codes(
                decoder,
                variant.codes.to(device),
                delays=delays,
                valid=variant.valid,
                encoder_hidden_states=states,
                tail="drop",
            )
        found[name] = nll.cpu()
    return found


def _by_package(
    case: str, precision: str, variants: Mapping[str, Variant], delays: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Scores with `MusicGen.prepare` and the padded forward pass of a run."""
    decoder = _decoder(case)
    K = decoder.config.num_codebooks
    checkpoint = find_checkpoint(DATA / "tiny_musicgen")
    spec = replace(checkpoint.spec, num_codebooks=K, delays=delays, channels=decoder.config.audio_channels)
    others = load_model(checkpoint)
    parts: Any = SimpleNamespace(decoder=decoder, text_encoder=others.text_encoder, audio_encoder=others.audio_encoder)
    model = MusicGen(parts, others.tokenizer, replace(checkpoint, spec=spec)).to(device)
    if precision == "bf16-true":
        model = model.to(torch.bfloat16)
    model.prepare(precision)
    found = {}
    for name, variant in variants.items():
        B, _, T = variant.codes.shape
        lengths = [T] * B if variant.valid is None else variant.valid[:, 0].sum(1).tolist()
        scored = tail_mask(T, delays=delays)  # audiocraft drops the tail of the batch instead of that of each row
        states = [None] * len(lengths) if variant.states is None else list(variant.states.to(device))
        scores = score_padded(
            model,
            [codes[:, :length].to(device) for codes, length in zip(variant.codes, lengths, strict=True)],
            [scored[:, :length] for length in lengths],
            states,
        )
        found[name] = nll = torch.full(variant.codes.shape, float("nan"))
        for row, score in enumerate(scores):
            nll[row, :, : lengths[row]] = score.nll.cpu()
    return found


def _variant(case: str, name: str, expected: Mapping[str, Any]) -> Variant:
    """Reads codes, mask, text states and results of audiocraft."""
    data = load_file(DATA / case / "codes.safetensors")
    nll, ce = load_file(DATA / case / "nll.safetensors")[name], expected["variants"][name]["ce"]
    condition, batch = name.split("__")
    states = {"cond": data["cond"], "condfull": data["cond_full"], "null": None}[condition]
    if batch == "padded_batch":
        return Variant(data["codes_padded"].long(), data["valid_mask"].bool(), states, nll, ce)
    if batch == "full_batch":
        return Variant(data["codes"].long(), None, states, nll, ce)
    item = int(batch[len("item")])
    length, text_length = expected["lengths"][item], expected["text_lengths"][item]
    states = None if states is None else states[item : item + 1, :text_length]
    return Variant(data["codes"][item : item + 1, :, :length].long(), None, states, nll, ce)


def _decoder(case: str) -> Any:
    return MusicgenForCausalLM.from_pretrained(DATA / case / "hf_decoder", dtype=torch.float32).eval()


def _cross_entropy(nll: Tensor) -> float:
    means = [nll[:, k][~nll[:, k].isnan()].double().mean() for k in range(nll.shape[1])]
    return torch.stack(means).mean().item()
