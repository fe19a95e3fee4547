"""Section `continuation`: decode steps per second, compared with transformers and a plain loop, and bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from musicgen_eval.models.decoder.fused_decoder import TEXT_LENGTH_MULTIPLE, FusedDecoder
from musicgen_eval.models.decoder.sampling import Sampling
from musicgen_eval.models.decoder.static_steps import BUCKET, StepSizes, static_steps
from musicgen_eval.models.decoder.window_draw import WindowDraw
from musicgen_eval.models.numerics import full_precision
from musicgen_eval.records import StepKernels
from tools.gpu.baselines import GUIDANCE_SCALE, TOP_K, generate, plain_loop
from tools.gpu.costs import BYTES_FORMULA, mean_keys
from tools.gpu.findings import Findings, Row
from tools.gpu.goals import CONTINUATION
from tools.gpu.networks import DTYPES, Networks, release_memory
from tools.gpu.peaks import BANDWIDTH
from tools.gpu.sections import Check
from tools.gpu.timing import Timing, in_turns_or_alone, time_in_turns

FRAMES_PER_S = 50
Loop = Callable[[int], object]
"""A function that runs a given number of decode steps after the prompt."""
StepTime = tuple[dict[str, float], Timing]
"""Seconds per step (median, min, max), and the timing of the long run."""


def run(check: Check, findings: Findings) -> None:
    """Measures all shapes, batches and dtypes."""
    sizes = check.sizes
    findings.note(
        f"Codes are sampled from the {TOP_K} most likely ones with guidance, which doubles the rows, after a prompt of "
        f"{sizes.prompt_frames} frames and with texts of {sizes.text_tokens} tokens. The time of a step is the difference "
        f"between a long run and a run of one step, divided by the number of steps: {sizes.num_turns} for this package, "
        f"{sizes.slow_turns} for the others. Variants run in turns, without TF32 and without cuDNN attention."
    )
    findings.note(BYTES_FORMULA)
    for number, shape in enumerate(sizes.shapes, start=1):
        with findings.case("Networks", shape=shape) as row:
            networks = Networks.load(shape, check.device)
            row.update(parameters=networks.num_parameters, dtypes=", ".join(DTYPES))
            for dtype in reversed(DTYPES):  # float32 is measured if time remains
                for batch in sizes.batches:
                    if dtype == "bfloat16" or check.has_time(len(sizes.shapes) - number):
                        _measure(check, findings, networks, batch, dtype)
                        release_memory(*networks.fused.values())
                    else:
                        findings.add(
                            CONTINUATION, shape=shape, batch=batch, variant=f"all, {dtype}", error="no time left"
                        )
        networks = None  # type: ignore[assignment]
        release_memory()


@torch.inference_mode()
@full_precision()
def _measure(check: Check, findings: Findings, networks: Networks, batch: int, dtype: str) -> None:
    loops = _loops(check, networks, batch, dtype)
    timings = in_turns_or_alone(
        list(loops),
        lambda names: step_times(check, {name: loops[name] for name in names}),
        lambda: release_memory(networks.fused[dtype]),
    )
    for name, found in timings.items():
        row = findings.add(CONTINUATION, shape=networks.shape, batch=batch, variant=name)
        if found is None:
            row["error"] = "out of memory"
        else:
            _fill(row, check, networks, batch, dtype, name, found, timings.get(f"transformers, {dtype}"))


def _loops(check: Check, networks: Networks, batch: int, dtype: str) -> dict[str, tuple[Loop, int]]:
    """Returns name -> loop, and its number of steps in a long run."""
    sizes = check.sizes
    prompt = networks.codes(batch, min(sizes.prompt_frames, networks.max_frames - sizes.num_turns - 4))
    texts = networks.texts(batch, sizes.text_tokens)
    model, fused = networks.composites[dtype], networks.fused[dtype]
    loops: dict[str, tuple[Loop, int]] = {
        f"transformers, {dtype}": (
            lambda turns: generate(model, prompt, num_turns=turns, text_tokens=sizes.text_tokens),
            sizes.slow_turns,
        )
    }
    if dtype == "bfloat16":
        loops["plain loop, bfloat16"] = (
            lambda turns: plain_loop(model.decoder, prompt, texts, num_turns=turns),
            sizes.slow_turns,
        )
    loops[f"this package, {dtype}"] = (OwnLoop(fused, prompt, texts, max_turns=sizes.num_turns), sizes.num_turns)
    return loops


class OwnLoop:
    """Decode steps of the package after a prompt.

    Args:
        decoder: Fused decoder.
        prompt: (B, K, P) codes.
        texts: (B, L, D) text states.
        max_turns: Largest number of steps.
        kernels: Execution of the steps.
        sampling: Temperature, top_k and top_p. None means sampling from the `TOP_K` most likely codes.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        prompt: torch.Tensor,
        texts: torch.Tensor,
        *,
        max_turns: int,
        kernels: StepKernels = "graph",
        sampling: Sampling | None = None,
    ) -> None:
        B, K, _ = prompt.shape
        V = decoder.special_token
        self.decoder, self.texts, self.kernels, self.max_turns = decoder, texts, kernels, max_turns
        self.sampling = sampling or Sampling(top_k=min(TOP_K, V))
        self.prompts = torch.cat([prompt.new_full((B, K, 1), V), prompt], 2)
        self.columns = torch.zeros((B, K, max_turns + 1), dtype=torch.int64, device=prompt.device)
        self.numbers = torch.rand(self.columns.shape, generator=torch.Generator().manual_seed(2)).to(prompt.device)

    def __call__(self, num_turns: int) -> torch.Tensor:
        """Returns (B, K, num_turns + 1) columns: one generated after the prompt, and one per step."""
        B, _, S = self.prompts.shape
        columns = slice(0, num_turns + 1)
        keys = self.decoder.text_keys(list(self.texts))
        assert keys is not None
        steps = static_steps(
            self.decoder,
            StepSizes(
                num_rows=B,
                num_texts=B,
                text_length=keys.length,
                num_steps=S + self.max_turns,
                guidance_scale=GUIDANCE_SCALE,
                sampling=self.sampling,
                kernels=self.kernels,
            ),
        )
        return steps.draw(
            WindowDraw(
                prompts=self.prompts,
                starts=[S] * B,
                columns=self.columns[:, :, columns],
                is_drawn=torch.ones(self.columns[:, :, columns].shape, dtype=torch.bool),
                numbers=None if self.sampling.temperature == 0 else self.numbers[:, :, columns],
                is_idle=[False] * B,
            ),
            keys,
        )


def step_times(check: Check, loops: Mapping[str, tuple[Loop, int]]) -> dict[str, StepTime]:
    """Measures seconds per decode step: a long run minus a run of one step, which excludes the prompt."""
    calls: dict[str, Callable[[], object]] = {}
    for name, (loop, turns) in loops.items():
        calls[f"{name}: long"] = lambda loop=loop, turns=turns: loop(turns)  # type: ignore[misc]
        calls[f"{name}: short"] = lambda loop=loop: loop(1)  # type: ignore[misc]
    timings = time_in_turns(calls, check.device, repeats=check.sizes.repeats, variant_s=check.sizes.variant_s)
    found = {}
    for name, (_, turns) in loops.items():
        long, short = timings[f"{name}: long"], timings[f"{name}: short"]
        steps = [(seconds - short.median_s) / (turns - 1) for seconds in long.seconds]
        found[name] = (Timing(steps).spread(), long)
    return found


def _fill(
    row: Row,
    check: Check,
    networks: Networks,
    batch: int,
    dtype: str,
    name: str,
    found: StepTime,
    first: StepTime | None,
) -> None:
    step, timing = found
    if step["median"] <= 0:
        row["error"] = "too short to measure"
        return
    row.update(
        steps_per_s=1 / step["median"],
        ms_per_step={key: value if key == "measurements" else 1e3 * value for key, value in step.items()},
        times_real_time=batch / step["median"] / FRAMES_PER_S,
        ratio=first[0]["median"] / step["median"] if first else None,
        first_run_s=timing.warm_up_s,
        peak_GB=timing.peak_bytes / 1e9,
    )
    if not name.startswith("this package"):
        return
    sizes, fused = check.sizes, networks.fused[dtype]
    prompt_steps = min(sizes.prompt_frames, networks.max_frames - sizes.num_turns - 4) + 1
    text_keys = sizes.text_tokens + -sizes.text_tokens % TEXT_LENGTH_MULTIPLE
    common = {"itemsize": DTYPES[dtype].itemsize, "rows": 2 * batch, "text_rows": batch}
    read = networks.sizes.step_bytes(
        **common,
        keys=mean_keys(prompt_steps, sizes.num_turns, bucket=BUCKET),
        text_keys=text_keys,
        head_width=fused.marked_width,
    )
    needed = networks.sizes.step_bytes(
        **common,
        keys=mean_keys(prompt_steps, sizes.num_turns),
        text_keys=sizes.text_tokens,
        head_width=fused.head_width,
    )
    row.update(
        MB_per_step=read / 1e6,
        share_of_bandwidth=check.share_of(BANDWIDTH, read / step["median"]),
        share_needed=check.share_of(BANDWIDTH, needed / step["median"]),
    )
