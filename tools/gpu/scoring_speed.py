"""Section `scoring`: windows with teacher forcing, compared with transformers and a plain script, and the audio encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import load, noise
from musicgen_eval.inference.scoring import score_fused
from musicgen_eval.models.checkpoint import Checkpoint
from musicgen_eval.models.musicgen import MusicGen, load_model
from musicgen_eval.models.numerics import full_precision
from musicgen_eval.records import CodecSpec
from tools.gpu.baselines import score_by_transformers, score_one_by_one
from tools.gpu.costs import FLOP_FORMULA
from tools.gpu.findings import Findings
from tools.gpu.goals import SCORING
from tools.gpu.networks import DTYPES, Networks, release_memory
from tools.gpu.peaks import matmul_peak
from tools.gpu.sections import Check
from tools.gpu.timing import in_turns_or_alone, time_in_turns

FRAMES_PER_S = 50


def run(check: Check, findings: Findings) -> None:
    """Measures the encoder, then all shapes, batches and dtypes of the decoder."""
    findings.note(
        f"Windows have {check.sizes.window_s:g} s, or the longest window of the shape, and texts of {check.sizes.text_tokens} "
        "tokens. Encoding is measured separately. The plain script scores one window at a time. All variants run without TF32 and "
        "without cuDNN attention. `nll_difference` is the largest difference from transformers in float32 of a code of the first "
        "window."
    )
    findings.note(FLOP_FORMULA)
    _encoding(check, findings)
    sizes = check.sizes
    for number, shape in enumerate(sizes.shapes, start=1):
        with findings.case("Networks", shape=shape) as row:
            networks = Networks.load(shape, check.device)
            row.update(parameters=networks.num_parameters, dtypes=", ".join(DTYPES))
            for dtype in reversed(DTYPES):  # float32 is measured if time remains
                for batch in sizes.batches:
                    if dtype == "bfloat16" or check.has_time(len(sizes.shapes) - number):
                        _measure(check, findings, networks, batch, dtype)
                        release_memory()
                    else:
                        findings.add(SCORING, shape=shape, batch=batch, variant=f"all, {dtype}", error="no time left")
        networks = None  # type: ignore[assignment]
        release_memory()


@torch.inference_mode()
@full_precision()
def _measure(check: Check, findings: Findings, networks: Networks, batch: int, dtype: str) -> None:
    sizes = check.sizes
    num_frames = min(int(sizes.window_s * FRAMES_PER_S), networks.max_frames)
    codes, texts = networks.codes(batch, num_frames), networks.texts(batch, sizes.text_tokens)
    decoder, fused = networks.composites[dtype].decoder, networks.fused[dtype]
    K = codes.shape[1]
    counted = torch.ones(codes.shape, dtype=torch.bool)

    def ours(codes: Tensor, texts: Tensor, counted: Tensor) -> Tensor:
        return score_fused(fused, codes, delays=range(K), counted=counted, texts=fused.text_keys(list(texts))).nll

    variants: dict[str, Callable[[], Tensor]] = {
        f"transformers, {dtype}": lambda: score_by_transformers(decoder, codes, texts),
        f"this package, {dtype}": lambda: ours(codes, texts, counted),
    }
    if dtype == "bfloat16":
        variants["plain script, bfloat16"] = lambda: score_one_by_one(decoder, codes, texts)
    timings = in_turns_or_alone(
        list(variants),
        lambda names: time_in_turns(
            {name: variants[name] for name in names}, check.device, repeats=sizes.repeats, variant_s=sizes.variant_s
        ),
        release_memory,
    )
    first = timings[f"transformers, {dtype}"]
    flop = batch * networks.sizes.window_flop(num_frames=num_frames, text_tokens=sizes.text_tokens)
    for name, timing in timings.items():
        row = findings.add(SCORING, shape=networks.shape, batch=batch, variant=name)
        if timing is None:
            row["error"] = "out of memory"
            continue
        row.update(
            windows_per_s=batch / timing.median_s,
            ms=timing.spread(1e3),
            times_real_time=batch * num_frames / FRAMES_PER_S / timing.median_s,
            ratio=first.median_s / timing.median_s if first else None,
            TFLOP_per_s=flop / timing.median_s / 1e12,
            share_of_peak=check.share_of(matmul_peak(dtype), flop / timing.median_s),
            peak_GB=timing.peak_bytes / 1e9,
        )
        if batch == sizes.batches[0]:
            exact = score_by_transformers(networks.composites["float32"].decoder, codes[:1], texts[:1])[0]
            row["nll_difference"] = float((variants[name]()[0] - exact).abs().max())


def _encoding(check: Check, findings: Findings) -> None:
    """Measures the encoding of audio: by the package in batches of equal lengths, and by transformers one at a time."""
    shape = next((shape for shape in check.sizes.shapes if shape != "demo"), "demo")
    composite = load(shape, device=check.device)
    config = composite.decoder.config
    spec = CodecSpec(32_000, FRAMES_PER_S, 640, config.num_codebooks, config.vocab_size, 1, (0, 1, 2, 3), 1500)
    plain = copy.deepcopy(composite.audio_encoder).to(check.device)
    tokenizer = load_model("demo").tokenizer  # texts are not encoded here
    model = MusicGen(composite, tokenizer, Checkpoint(shape, "", None, None, spec, "given")).to(check.device)
    for batch in check.sizes.batches:
        _encoded_batch(check, findings, model, plain, batch)


@torch.inference_mode()
@full_precision()
def _encoded_batch(check: Check, findings: Findings, model: MusicGen, plain: Any, batch: int) -> None:
    generator = torch.Generator().manual_seed(3)
    audio = [noise(check.sizes.window_s, generator).to(check.device) for _ in range(batch)]
    variants: dict[str, Callable[[], list[Tensor]]] = {
        "transformers, one at a time": lambda audio=audio: [plain.encode(x[None]).audio_codes[0, 0] for x in audio],  # type: ignore[misc]
        "this package": lambda audio=audio: model.encode(audio),  # type: ignore[misc]
    }
    theirs, ours = (torch.stack(variant()) for variant in variants.values())
    timings = time_in_turns(variants, check.device, repeats=check.sizes.repeats, variant_s=check.sizes.variant_s)
    for name, timing in timings.items():
        findings.add(
            "Encoded windows",
            batch=batch,
            variant=name,
            windows_per_s=batch / timing.median_s,
            ms=timing.spread(1e3),
            codes_that_differ=int((ours != theirs).sum()),
            of=ours.numel(),
            peak_GB=timing.peak_bytes / 1e9,
        )
