"""Measures frames per second from audio to nll and compares them with a plain script, in one process.

The plain script encodes one window at a time with the codec of transformers, feeds the delayed codes to its decoder, computes
log_softmax of all logits and gathers. Each further row of the table adds one change to those of the rows above. The variants run in
turns. Figures are medians, with the lowest and the highest value in brackets. The ratio depends on the machine. Therefore the
machine's best rates are measured between the turns, and the table is followed by the share of the resulting limit. `--threads 1`
compares the work without parallelism.

    python -m benchmarks.scoring                       the demo model and musicgen-small's shape, 30 s windows
    python -m benchmarks.scoring --shapes tiny --repeats 1 --seconds 2
    python -m benchmarks.scoring --device cuda         batches, float32 and bfloat16
    python -m benchmarks.scoring --markdown            also writes scoring.md next to this file
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from benchmarks.arithmetic import Arithmetic, arithmetic
from benchmarks.limits import Limits, spread
from benchmarks.models import DECODERS, Shape, heading, load, noise, require_causal
from benchmarks.peak_memory import peak_mb, reset_peak
from benchmarks.scoring_variants import OWN_BFLOAT16, OWN_FLOAT32, Variant, Work, variants_on_cpu, variants_on_cuda


def measure(variants: Sequence[Variant], work: Work, limits: Limits, *, repeats: int) -> None:
    """Runs the variants in turns, after a first run of each, and measures the machine's limits between the turns."""
    codes = variants[0].encode(work)
    exact = variants[0].score(work, codes)
    for variant in variants:
        before_mb = reset_peak()
        pairs_of_codes = zip(variant.encode(work), codes, strict=True)
        variant.changed_codes = int(sum((ours != theirs).sum() for ours, theirs in pairs_of_codes))
        pairs = list(zip(variant.score(work, codes), exact, strict=True))
        variant.peak_mb = peak_mb() - before_mb
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
    """Returns seconds of wall-clock time, and of processor time over all threads."""
    gc.collect()
    start, cpu_start = time.perf_counter(), time.process_time()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def table(variants: Sequence[Variant], work: Work, needs: Arithmetic, limits: Limits) -> str:
    """Formats the measurements of one shape."""
    num_frames = sum(audio.shape[1] for audio in work.audio) // 640
    lines = [
        "| variant | seconds | frames/s | ratio | encode s | score s | CPU s | CPU ratio | additional MB | changed codes "
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
            f"| {variant.changed_codes} of {num_frames * len(work.delays)} | {variant.nll_error:.1e} | {variant.ce_error:.1e} |"
        )
    if not limits.gflops:
        return "\n".join(lines)
    return "\n".join([*lines, "", limits.describe(), *shares(variants, work, needs, limits)])


def shares(variants: Sequence[Variant], work: Work, needs: Arithmetic, limits: Limits) -> list[str]:
    """Returns sentences on the share of the machine's limit that the package reaches, in total and per model."""
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
    """Measures one shape and returns its section of the report."""
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
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="length of a window in seconds; at most 10 for the demo model"
    )
    parser.add_argument(
        "--windows", type=int, help="number of windows (default: two per thread on a CPU, 16 on an accelerator)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="number of turns")
    parser.add_argument("--text_tokens", type=int, default=12, help="length of the text; 0 means the null condition")
    parser.add_argument("--threads", type=int, help="number of torch threads (default: unchanged)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--markdown", action="store_true", help="write scoring.md next to this file")
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
