"""Measures seconds per generated second of audio and compares them with `generate` of transformers, in one process.

All variants are given the same prompt of codes and the same text. They decode greedily with guidance, so that their codes can be
compared. Decoding the codes to audio is not included. The variants run in turns. Figures are medians, with the lowest and the
highest value in brackets. The ratio depends on the machine. Therefore the memory bandwidth of the steps, including keys and values,
is given as a share of the measured bandwidth of the machine.

    python -m benchmarks.continuation                    the demo model and musicgen-small's shape, batches of 1 and 8
    python -m benchmarks.continuation --shapes tiny --repeats 1 --prompt_s 0.5 --new_s 0.5
    python -m benchmarks.continuation --device cuda      float32 and bfloat16, on an accelerator
    python -m benchmarks.continuation --markdown         also writes continuation.md next to this file
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.limits import Limits, spread
from benchmarks.models import DECODERS, Shape, heading, load, require_causal
from musicgen_eval.inference.continuation import continue_codes
from musicgen_eval.models.decoder.packing import pack_linears
from musicgen_eval.models.packed_matrix import can_pack

FRAMES_PER_S = 50
WARM_UP_FRAMES = 8


@dataclass(frozen=True)
class Work:
    """Input of every variant."""

    prompt: Tensor  # (B, K, P)
    text_ids: Tensor  # (B, L)
    states: Tensor  # (B, L, D), projected
    num_frames: int  # length of prompt and continuation together
    key_bytes: int  # size of one key and value of one row in all layers, in float32

    @property
    def short(self) -> Work:
        """The same input with a continuation of a few frames."""
        return replace(self, num_frames=self.prompt.shape[-1] + WARM_UP_FRAMES)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that an average step reads, for the rows with and without the text."""
        num_keys = (self.short.num_frames + self.num_frames) // 2
        return 2 * len(self.prompt) * num_keys * self.key_bytes

    @property
    def new_s(self) -> float:
        """Generated seconds of audio, summed over the rows."""
        B, _, P = self.prompt.shape
        return B * (self.num_frames - P) / FRAMES_PER_S


@dataclass
class Variant:
    """One row of the table."""

    name: str
    run: Callable[[Work], Tensor]
    weight_bytes: int
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    short_s: list[float] = field(default_factory=list)
    codes: Tensor | None = None


def by_transformers(model: Any, work: Work, *, autocast: torch.dtype | None = None) -> Tensor:
    """Continues with `generate` and returns the codes that it passes to its codec."""
    B, K, P = work.prompt.shape
    caught: list[Tensor] = []

    def decode(codes: Tensor, **_: Any) -> SimpleNamespace:
        caught.append(codes[0])
        return SimpleNamespace(audio_values=torch.zeros(B, 1, 1))

    with _replaced(model.audio_encoder, "decode", decode), torch.autocast(model.device.type, autocast, bool(autocast)):
        model.generate(
            input_ids=work.text_ids,
            attention_mask=torch.ones_like(work.text_ids),
            decoder_input_ids=work.prompt.reshape(B * K, P),
            do_sample=False,
            guidance_scale=3.0,
            max_new_tokens=work.num_frames - P + K - 1,  # includes the delay of the last codebook
        )
    return caught[0].reshape(B, K, -1)


def by_us(decoder: Any, work: Work, **settings: Any) -> Tensor:
    """Continues with `continue_codes`."""
    K = work.prompt.shape[1]
    return continue_codes(
        decoder,
        work.prompt,
        total_frames=work.num_frames,
        delays=range(K),
        max_frames=max(1500, work.num_frames),
        encoder_hidden_states=work.states,
        **settings,
    )


def sampled_by_us(decoder: Any, work: Work) -> Tensor:
    """Continues with `continue_codes`, sampling from the 250 most likely codes."""
    B, K, _ = work.prompt.shape
    uniforms = torch.rand(B, K, work.num_frames, generator=torch.Generator().manual_seed(0))
    return by_us(decoder, work, temperature=1.0, top_k=min(250, decoder.config.vocab_size), uniforms=uniforms)


def variants(model: Any) -> list[Variant]:
    """Returns the variants for the device of the model; the baseline is the first."""
    greedy: Any = partial(by_us, temperature=0)
    decoder = model.decoder
    size, half_size = weight_bytes(decoder), weight_bytes(decoder, num_bytes=2)
    lines = [Variant("transformers' generate, float32", partial(by_transformers, model), size)]
    if model.device.type == "cuda":
        half = copy.deepcopy(decoder).to(torch.bfloat16)
        return [
            *lines,
            Variant("continue_codes, float32", partial(greedy, decoder), size),
            Variant("continue_codes, bfloat16", partial(greedy, half), half_size),
        ]
    packed = copy.deepcopy(decoder)
    if pack_linears(packed):
        lines.append(Variant("continue_codes, packed float32", partial(greedy, packed), size))
    else:
        lines.append(Variant("continue_codes, float32", partial(greedy, decoder), size))
    if can_pack(torch.bfloat16):
        half = copy.deepcopy(decoder)
        pack_linears(half, torch.bfloat16)
        lines.append(Variant("continue_codes, packed bfloat16", partial(greedy, half), half_size))
        lines.append(Variant("the same, sampling from 250 codes", partial(sampled_by_us, half), half_size))
    return lines


def weight_bytes(decoder: Any, *, num_bytes: int = 4) -> int:
    """Returns the bytes of weights that a step reads: all matrices except tables and the keys and values of cross-attention.

    Args:
        decoder: Decoder in float32.
        num_bytes: Bytes per weight of all matrices except the output heads, which are float32.
    """
    return sum(
        parameter.numel() * (4 if "lm_heads" in name else num_bytes)
        for name, parameter in decoder.named_parameters()
        if parameter.ndim == 2
        and "embed" not in name
        and "encoder_attn.k_proj" not in name
        and "encoder_attn.v_proj" not in name
    )


def work_of(model: Any, *, batch: int, prompt_s: float, new_s: float, text_tokens: int) -> Work:
    """Returns random codes and a random text, which are the same in each run."""
    generator = torch.Generator().manual_seed(batch)
    config = model.decoder.config
    P = int(prompt_s * FRAMES_PER_S)
    prompt = torch.randint(0, config.vocab_size, (batch, config.num_codebooks, P), generator=generator)
    ids = torch.randint(3, model.config.text_encoder.vocab_size, (batch, text_tokens), generator=generator)
    ids, prompt = ids.to(model.device), prompt.to(model.device)
    states = model.text_encoder(input_ids=ids).last_hidden_state
    states = model.enc_to_dec_proj(states) if hasattr(model, "enc_to_dec_proj") else states
    key_bytes = 2 * 4 * config.num_hidden_layers * config.hidden_size
    return Work(prompt, ids, states, P + int(new_s * FRAMES_PER_S), key_bytes)


def measure(lines: Sequence[Variant], work: Work, limits: Limits, *, repeats: int) -> None:
    """Runs the variants in turns, also for a few frames only. The difference is the time of the steps."""
    for line in lines:
        line.run(work.short)
    for _ in range(repeats):
        if work.prompt.device.type == "cpu":
            limits.sample()
        for line in lines:
            line.short_s.append(_timed(line, work.short)[0])
            seconds, cpu_s = _timed(line, work)
            line.seconds.append(seconds)
            line.cpu_s.append(cpu_s)


def _timed(line: Variant, work: Work) -> tuple[float, float]:
    """Returns seconds of wall-clock time and of processor time, and stores the codes in the variant."""
    _synchronise(work.prompt.device)
    start, cpu_start = time.perf_counter(), time.process_time()
    line.codes = line.run(work)
    _synchronise(work.prompt.device)
    return time.perf_counter() - start, time.process_time() - cpu_start


def table(lines: Sequence[Variant], work: Work, limits: Limits) -> str:
    """Formats the figures of one batch size."""
    rows = [
        "| variant | s per generated s | ratio | CPU s per generated s | steps/s | GB/s read | share of bandwidth "
        "| equal codes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = lines[0]
    num_steps = work.num_frames - work.short.num_frames
    for line in lines:
        assert line.codes is not None
        assert first.codes is not None
        ratios = [a / b for a, b in zip(first.seconds, line.seconds, strict=True)]
        step_s = statistics.median(a - b for a, b in zip(line.seconds, line.short_s, strict=True)) / num_steps
        rate = (line.weight_bytes + work.cache_bytes) / step_s / 1e9
        share = f"{rate / limits.bandwidth:.0%}" if limits.read_gb_s else "-"
        same = (line.codes.cpu() == first.codes.cpu()).float().mean().item()
        rows.append(
            f"| {line.name} | {spread([seconds / work.new_s for seconds in line.seconds], '.3f')} | {spread(ratios, '.2f')} "
            f"| {statistics.median(line.cpu_s) / work.new_s:.3f} | {1 / step_s:.1f} | {rate:.1f} | {share} "
            f"| {'all' if same == 1 else f'{same:.0%}'} |"
        )
    return "\n".join([*rows, "", limits.describe()] if limits.read_gb_s else rows)


def run(shape: Shape, options: argparse.Namespace) -> str:
    """Measures one shape and returns its section of the report."""
    model = load(shape).to(options.device)
    require_causal(model)
    V = model.decoder.config.vocab_size
    for setting in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
        setattr(model.generation_config, setting, V)
    model.generation_config.max_length = None
    limit_s = 10.0 if shape == "demo" else 30.0
    prompt_s = min(options.prompt_s, limit_s / 2)
    new_s = min(options.new_s, limit_s - prompt_s)
    parameters = sum(parameter.numel() for parameter in model.decoder.parameters()) / 1e6
    parts = [f"## {shape}: decoder of {parameters:.0f} M parameters, {new_s:g} s after a prompt of {prompt_s:g} s\n"]
    with torch.inference_mode():
        for batch in options.batches:
            lines = variants(model)
            work = work_of(model, batch=batch, prompt_s=prompt_s, new_s=new_s, text_tokens=options.text_tokens)
            limits = Limits()
            measure(lines, work, limits, repeats=options.repeats)
            parts.append(
                f"Batch {batch}, guidance 3 ({2 * batch} rows), {options.text_tokens} text tokens:\n\n"
                f"{table(lines, work, limits)}\n"
            )
            print(parts[-1], flush=True)
    return "\n".join(parts)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)  # removes the attribute of the instance, which hid the method of the class


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["demo", *DECODERS], default=["demo", "small"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--prompt_s", type=float, default=10.0, help="length of the prompt in seconds; at most 5 for the demo model"
    )
    parser.add_argument("--new_s", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text_tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, help="number of torch threads (default: unchanged)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--markdown", action="store_true", help="write continuation.md next to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    report = heading("Continuation: codes to more codes", options, module="benchmarks.continuation")
    print(report, flush=True)
    for shape in options.shapes:
        report += run(shape, options) + "\n"
    if options.markdown:
        Path(__file__).with_suffix(".md").write_text(report.rstrip() + "\n")


if __name__ == "__main__":
    main()
