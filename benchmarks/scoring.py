"""Frames per second from audio to nll, against the plain script, in one process.

The script encodes one window at a time with transformers' codec, feeds the delayed codes to its decoder, takes log_softmax of all
logits and gathers. Every further line switches one thing on and keeps those above. Variants take turns. Figures are medians, with
the lowest and the highest value in brackets. The ratio depends on the machine, so the machine's best rates are sampled between the
turns, and the share of the limit that follows from them is given. `--threads 1` compares the work itself.

    python -m benchmarks.scoring                       the demo model and musicgen-small's shape, 30 s windows
    python -m benchmarks.scoring --shapes tiny --repeats 1 --seconds 2
    python -m benchmarks.scoring --device cuda         batches, float32 and bfloat16
    python -m benchmarks.scoring --markdown            also writes scoring.md beside this file
"""

from __future__ import annotations

import argparse
import copy
import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor

from benchmarks.limits import Limits, spread
from benchmarks.models import DECODERS, Shape, heading, load, noise, require_causal
from musicgen_eval.inference.scoring import score_codes
from musicgen_eval.models.codec.encoder import SegmentEncoder
from musicgen_eval.models.codec.lockstep_lstm import CACHED_WEIGHTS, MAX_LANES
from musicgen_eval.models.decoder.forward import last_hidden_state
from musicgen_eval.models.decoder.packing import pack_linears
from musicgen_eval.models.delay import delay_codes, realign
from musicgen_eval.models.packed_matrix import can_pack
from musicgen_eval.models.threads import map_single_threaded

HiddenState = Callable[[Any, Tensor, Tensor | None], Tensor]
OWN_FLOAT32 = "+ own forward and attention"
OWN_BFLOAT16 = "+ packed bfloat16 weights"


@dataclass(frozen=True)
class Work:
    """What every variant gets."""

    audio: list[Tensor]  # (1, N) each
    states: Tensor | None  # (L, D) text states, the same for every window
    delays: tuple[int, ...]


@dataclass
class Variant:
    """One line of the table."""

    name: str
    encode: Callable[[Work], list[Tensor]]
    score: Callable[[Work, Sequence[Tensor]], list[Tensor]]
    encode_s: list[float] = field(default_factory=list)
    score_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    codes_moved: int = 0
    nll_error: float = 0.0
    ce_error: float = 0.0


# ---- the plain script


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


# ---- ours, piece by piece


def hidden_by_transformers(decoder: Any, steps: Tensor, states: Tensor | None) -> Tensor:
    states = None if states is None else states[None]
    output = decoder.model.decoder(input_ids=steps, encoder_hidden_states=states, use_cache=False)
    return cast(Tensor, output.last_hidden_state[0])


def score_alone(decoder: Any, work: Work, codes: Sequence[Tensor], hidden_state: HiddenState) -> list[Tensor]:
    """Windows side by side, one thread each, the heads on scored rows only; what `MusicGen.score` does on a CPU."""

    def one(window: Tensor) -> Tensor:
        steps = delay_codes(window[None], delays=work.delays, special_token=decoder.config.vocab_size)[0]
        hidden = hidden_state(decoder, steps, work.states)
        nll = torch.empty(window.shape)
        for k, (delay, row) in enumerate(zip(work.delays, window, strict=True)):
            heard = hidden[delay : delay + len(row)]
            for rows, true, out in zip(heard.split(1024), row.split(1024), nll[k].split(1024), strict=True):
                logits = decoder.lm_heads[k](rows)
                out.copy_(logits.logsumexp(-1) - logits.gather(1, true[:, None])[:, 0])
        return nll

    return map_single_threaded(one, codes)


def score_batch(decoder: Any, work: Work, codes: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """One padded pass on an accelerator."""
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
        Variant("the script", lambda work: plain_encode(model, work), lambda w, c: plain_score(model, w, c)),
        Variant("+ encoder as products in pieces", encode, lambda w, c: plain_score(model, w, c)),
        Variant("+ windows side by side, scored rows only", encode, alone(model.decoder, hidden_by_transformers)),
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
        Variant("the script", lambda work: plain_encode(model, work), lambda w, c: plain_score(model, w, c)),
        Variant("+ one batch, scored rows only", encode, lambda w, c: score_batch(model.decoder, w, c, None)),
        Variant("+ bfloat16 autocast", encode, lambda w, c: score_batch(model.decoder, w, c, half)),
    ]


# ---- measuring


def measure(variants: Sequence[Variant], work: Work, limits: Limits, *, repeats: int) -> None:
    """Runs the variants in turns, once to warm up, and samples the machine's limits between the turns."""
    codes = variants[0].encode(work)
    exact = variants[0].score(work, codes)
    for variant in variants:
        before_mb = _forget_peak()
        moved = zip(variant.encode(work), codes, strict=True)
        variant.codes_moved = int(sum((ours != theirs).sum() for ours, theirs in moved))
        pairs = list(zip(variant.score(work, codes), exact, strict=True))
        variant.peak_mb = _peak_mb() - before_mb
        variant.nll_error = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
        variant.ce_error = max(float((a.double().mean() - b.double().mean()).abs()) for a, b in pairs)
    for _ in range(repeats):
        if work.audio[0].device.type == "cpu":
            limits.sample()
        for variant in variants:
            encode_s, encode_cpu_s = _timed(variant.encode, work)
            score_s, score_cpu_s = _timed(variant.score, work, codes)
            variant.encode_s.append(encode_s)
            variant.score_s.append(score_s)
            variant.cpu_s.append(encode_cpu_s + score_cpu_s)


def _timed(function: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Seconds on the clock, and of the processor over all threads."""
    gc.collect()
    start, cpu_start = time.perf_counter(), time.process_time()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def _forget_peak() -> float:
    """Begins to look for the largest memory; returns what is held now, in MB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _status_mb("VmRSS")


def _peak_mb() -> float:
    """Largest memory since `_forget_peak`: the accelerator's, or this process's where the system tells."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")


@dataclass(frozen=True)
class Arithmetic:
    """GFLOP a window, with a causal attention that computes nothing above the diagonal.

    Attributes:
        encoder: without the recurrent products of the LSTM.
        recurrent: these.
        recurrent_gb: GB of weights that they read in a window; windows in lockstep read them together.
        linears, attention, heads: of the decoder.
    """

    encoder: float
    recurrent: float
    recurrent_gb: float
    linears: float
    attention: float
    heads: float

    def encode_s(self, num_windows: int, limits: Limits) -> float:
        """Seconds for some windows at the machine's rates: each step of the LSTM multiplies, or waits for its weights."""
        lockstep = min(num_windows, MAX_LANES)
        reading = self.recurrent_gb / limits.reread / lockstep if self.recurrent_gb else 0.0
        return num_windows * (
            self.encoder / limits.rate(torch.float32) + max(self.recurrent / limits.rate(torch.float32), reading)
        )

    def score_s(self, num_windows: int, limits: Limits, *, bfloat16: bool) -> float:
        """The same for the decoder, whose heads are float32 in either case."""
        exact, fast = limits.rate(torch.float32), limits.rate(torch.bfloat16 if bfloat16 else torch.float32)
        return num_windows * (self.heads / exact + (self.linears + self.attention) / fast)


def arithmetic(model: Any, work: Work) -> Arithmetic:
    num_frames = work.audio[0].shape[1] // 640
    S = num_frames + max(work.delays)
    config = model.decoder.config
    D, L = config.hidden_size, config.num_hidden_layers
    linears = L * S * (4 * D * D + 2 * D * config.ffn_dim)
    if work.states is not None:
        linears += L * 2 * D * D * (S + len(work.states))
    encoder, recurrent, recurrent_gb = _encoder_work(model.audio_encoder, num_frames)
    return Arithmetic(
        encoder=encoder,
        recurrent=recurrent,
        recurrent_gb=recurrent_gb,
        linears=2 * linears / 1e9,
        attention=2 * L * S * S * D / 1e9,
        heads=2 * num_frames * config.num_codebooks * D * config.vocab_size / 1e9,
    )


def _encoder_work(codec: Any, num_frames: int) -> tuple[float, float, float]:
    """GFLOP without and of recurrent products, and GB that these read, for one window."""
    rows, total, recurrent = num_frames * codec.config.hop_length, 0, 0
    for module in codec.encoder.modules():
        if isinstance(module, torch.nn.Conv1d):
            rows //= module.stride[0]
            total += rows * module.weight.numel()
        elif isinstance(module, torch.nn.LSTM):
            for name, weight in module.named_parameters():
                if name.startswith("weight_ih"):
                    total += num_frames * weight.numel()
                elif name.startswith("weight_hh"):
                    recurrent += num_frames * weight.numel()
    total += num_frames * sum(layer.codebook.embed.numel() for layer in codec.quantizer.layers)
    read = 4 * recurrent if 4 * codec.encoder.layers[-1].conv.in_channels ** 2 > CACHED_WEIGHTS else 0
    return 2 * total / 1e9, 2 * recurrent / 1e9, read / 1e9


# ---- reporting


def table(variants: Sequence[Variant], work: Work, needs: Arithmetic, limits: Limits) -> str:
    num_frames = sum(audio.shape[1] for audio in work.audio) // 640
    lines = [
        "| variant | seconds | frames/s | ratio | encode s | score s | CPU s | CPU ratio | MB on top | codes moved "
        "| largest nll error | ce error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    totals = [[e + s for e, s in zip(v.encode_s, v.score_s, strict=True)] for v in variants]
    for variant, total in zip(variants, totals, strict=True):
        ratios = [first / own for first, own in zip(totals[0], total, strict=True)]
        cpu_ratio = statistics.median(a / b for a, b in zip(variants[0].cpu_s, variant.cpu_s, strict=True))
        encode_s, score_s, cpu_s = map(statistics.median, (variant.encode_s, variant.score_s, variant.cpu_s))
        lines.append(
            f"| {variant.name} | {spread(total, '.2f')} | {num_frames / statistics.median(total):.0f} | {spread(ratios, '.2f')} "
            f"| {encode_s:.2f} | {score_s:.2f} | {cpu_s:.2f} | {cpu_ratio:.2f} | {variant.peak_mb:.0f} "
            f"| {variant.codes_moved} of {num_frames * len(work.delays)} | {variant.nll_error:.1e} | {variant.ce_error:.1e} |"
        )
    if not limits.gflops:
        return "\n".join(lines)
    return "\n".join([*lines, "", limits.describe(), *shares(variants, work, needs, limits)])


def shares(variants: Sequence[Variant], work: Work, needs: Arithmetic, limits: Limits) -> list[str]:
    """How near our variants come to the machine's limit: in all, in the encoder and in the decoder."""
    num_windows = len(work.audio)
    lines = [
        f"A window needs {needs.encoder:.0f} (encoder) + {needs.recurrent:.0f} (steps of its LSTM, which read "
        f"{needs.recurrent_gb:.0f} GB) + {needs.linears:.0f} (linears) + {needs.attention:.0f} (causal attention) + "
        f"{needs.heads:.0f} (heads) GFLOP.",
    ]
    for variant in variants:
        if variant.name not in (OWN_FLOAT32, OWN_BFLOAT16):
            continue
        total_s = statistics.median(e + s for e, s in zip(variant.encode_s, variant.score_s, strict=True))
        encode_s, score_s = map(statistics.median, (variant.encode_s, variant.score_s))
        ideal_encode_s = needs.encode_s(num_windows, limits)
        ideal_score_s = needs.score_s(num_windows, limits, bfloat16=variant.name == OWN_BFLOAT16)
        ideal_s = ideal_encode_s + ideal_score_s
        lines.append(
            f"`{variant.name}`: {ideal_s:.2f} s at the median rates, measured {total_s:.2f} s, {ideal_s / total_s:.0%} of the "
            f"limit (encoder {ideal_encode_s / encode_s:.0%} of {encode_s:.2f} s, decoder {ideal_score_s / score_s:.0%} of "
            f"{score_s:.2f} s)."
        )
    return lines


def run(shape: Shape, arguments: argparse.Namespace) -> str:
    """One shape's section of the report."""
    model = load(shape).to(arguments.device)
    require_causal(model)
    generator = torch.Generator().manual_seed(1)
    seconds = min(arguments.seconds, 10.0) if shape == "demo" else arguments.seconds
    num_windows = arguments.windows or (2 * torch.get_num_threads() if arguments.device == "cpu" else 16)
    width = model.decoder.config.hidden_size
    text = torch.randn(arguments.text_tokens, width, generator=generator) if arguments.text_tokens else None
    audio = [noise(seconds, generator).to(arguments.device) for _ in range(num_windows)]
    num_codebooks = model.decoder.config.num_codebooks
    work = Work(audio, None if text is None else text.to(arguments.device), tuple(range(num_codebooks)))
    on_cpu = arguments.device == "cpu"
    with torch.inference_mode():
        variants = variants_on_cpu(model) if on_cpu else variants_on_cuda(model)
        limits = Limits()
        measure(variants, work, limits, repeats=arguments.repeats)
    parameters = sum(parameter.numel() for parameter in model.decoder.parameters()) / 1e6
    heading = (
        f"## {shape}: decoder of {parameters:.0f} M parameters, {num_windows} windows of {seconds:g} s, "
        f"{arguments.text_tokens} text tokens, medians of {arguments.repeats}"
    )
    return f"{heading}\n\n{table(variants, work, arithmetic(model, work), limits)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["demo", *DECODERS], default=["demo", "small"])
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a window; at most 10 for the demo model")
    parser.add_argument("--windows", type=int, help="default: two a thread, 16 on an accelerator")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--text_tokens", type=int, default=12, help="0: the null condition")
    parser.add_argument("--threads", type=int, help="torch threads; default: as found")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--markdown", action="store_true", help="write scoring.md beside this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    report = heading("Scoring: audio to nll", options, module="benchmarks.scoring")
    print(report, flush=True)
    for shape in options.shapes:
        section = run(shape, options)
        print(section, flush=True)
        report += section + "\n"
    if options.markdown:
        Path(__file__).with_suffix(".md").write_text(report.rstrip() + "\n")


if __name__ == "__main__":
    main()
