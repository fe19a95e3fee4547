"""Prints the numbers of host waits and kernel launches for the demo on the pretend device.

python -m tests.support.launch_table               takes about a minute on one core
python -m tests.support.launch_table --places      also prints the places of waits and copies
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import torch

from musicgen_eval.inference.continuation import continue_codes
from musicgen_eval.models.musicgen import MusicGen, load_model
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.library_output import quiet_libraries
from musicgen_eval.runs.module import MusicGenEvaluation
from tests.support.pretend_cuda import Log, pretend_cuda

PRECISIONS = ("32-true", "bf16-mixed")
NUM_WINDOWS = 8
SHORT_FRAMES, LONG_FRAMES = 40, 60
BEGIN, END = "<!-- begin: launch table -->", "<!-- end: launch table -->"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        work: Description of the work.
        precision: Precision of the decoder.
        num_waits: Number of waits of the host.
        num_pageable: Number of non-blocking copies from memory that is not pinned.
        num_launches: Number of operators that launched kernels. A replay of a graph counts as one.
        num_replayed: Number of operators with kernels in replayed graphs.
        places: Number of syncs per kind and place.
    """

    work: str
    precision: str
    num_waits: float
    num_pageable: float
    num_launches: float
    num_replayed: float
    places: Counter[tuple[str, str]]


def measured(log: Log, *, work: str, precision: str) -> Row:
    """Returns the counts of the log as a row."""
    pageable = log.by_kind()["h2d pageable"]
    return Row(work, precision, log.num_waits, pageable, log.num_launches, log.num_replayed, Counter(log.by_place()))


def per_step(long: Row, short: Row, num_steps: int, work: str) -> Row:
    """Returns the difference between two continuations per step."""
    places = Counter({place: count for place, count in (long.places - short.places).items() if count > 0})
    return Row(
        work,
        long.precision,
        (long.num_waits - short.num_waits) / num_steps,
        (long.num_pageable - short.num_pageable) / num_steps,
        (long.num_launches - short.num_launches) / num_steps,
        (long.num_replayed - short.num_replayed) / num_steps,
        places,
    )


class CountsOfBatches(L.Callback):
    """Counts each batch of a test separately."""

    def __init__(self, log: Log, precision: str) -> None:
        self.device_log = log
        self.precision = precision
        self.rows: list[Row] = []

    def on_test_batch_start(self, *args: object) -> None:
        self.device_log.clear()

    def on_test_batch_end(self, *args: object) -> None:
        work = f"a scored batch of {NUM_WINDOWS} windows"
        self.rows.append(measured(self.device_log, work=work, precision=self.precision))


def scored_batch(log: Log, precision: str) -> Row:
    """Returns the row of the second batch of a test through the Trainer."""
    counts = CountsOfBatches(log, precision)
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[counts],
    )
    data = WindowDataModule("demo", context_s=1.0, target_s=1.0, batch_size=NUM_WINDOWS, limit=3)
    trainer.test(MusicGenEvaluation("demo"), datamodule=data, verbose=False)
    return counts.rows[1]


@contextlib.contextmanager
def autocast(precision: str) -> Iterator[None]:
    """Enables the autocast of a precision."""
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
        yield


def prepared_model(precision: str) -> MusicGen:
    """Returns the demo on the device, prepared for a precision."""
    model = load_model("demo").to("cuda")
    model.prepare(precision)
    return model


@torch.inference_mode()
def encoded_windows(log: Log, model: MusicGen, precision: str) -> Row:
    """Returns the row of encoding windows of equal length."""
    generator = torch.Generator().manual_seed(0)
    spec = model.spec
    num_samples = 2 * spec.frame_rate_hz * spec.hop_samples
    segments = [torch.rand(spec.channels, num_samples, generator=generator) - 0.5 for _ in range(NUM_WINDOWS)]
    with autocast(precision):
        model.encode(segments)
        log.clear()
        model.encode(segments)
    return measured(log, work=f"encoding {NUM_WINDOWS} windows", precision=precision)


@torch.inference_mode()
def decode_step(
    log: Log, model: MusicGen, precision: str, *, work: str, prompts: Sequence[int], texts: Sequence[str]
) -> Row:
    """Returns the row of a decode step, as the difference between two lengths with warm caches."""
    generator = torch.Generator().manual_seed(0)
    num_rows, spec = len(prompts), model.spec
    prompt = torch.randint(0, spec.codebook_size, (num_rows, spec.num_codebooks, max(prompts)), generator=generator)
    states = [model.encode_text(text) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence([one for one in states if one is not None], batch_first=True)
    lengths = torch.tensor([len(one) for one in states if one is not None])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to("cuda")

    def counted(total_frames: int) -> Row:
        uniforms = torch.rand(num_rows, spec.num_codebooks, total_frames, generator=generator)
        run: Callable[[], object] = partial(
            continue_codes,
            model.decoder,
            prompt.to("cuda"),
            prompt_frames=list(prompts),
            total_frames=total_frames,
            delays=spec.delays,
            encoder_hidden_states=padded,
            encoder_attention_mask=mask,
            uniforms=uniforms,
        )
        with autocast(precision):
            run()
            log.clear()
            run()
        return measured(log, work=work, precision=precision)

    return per_step(counted(LONG_FRAMES), counted(SHORT_FRAMES), LONG_FRAMES - SHORT_FRAMES, work)


def table_rows(precisions: Sequence[str] = PRECISIONS) -> list[Row]:
    """Returns all rows of the table."""
    rows: list[Row] = []
    with pretend_cuda() as log, quiet_libraries():
        for precision in precisions:
            rows.append(scored_batch(log, precision))
            model = prepared_model(precision)
            rows.append(encoded_windows(log, model, precision))
            step = partial(decode_step, log, model, precision)
            rows.append(step(work="a decode step, 2 rows, equal prompts", prompts=[20, 20], texts=["drums", "drums"]))
            mixed_texts = ["drums", "slow piano with many strings"]
            rows.append(step(work="a decode step, 2 rows, mixed prompts and texts", prompts=[20, 7], texts=mixed_texts))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Formats the rows as a Markdown table."""
    lines = ["| | precision | host waits | pageable copies | launches | in graphs |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        figures = " | ".join(
            f"{figure:g}" for figure in (row.num_waits, row.num_pageable, row.num_launches, row.num_replayed)
        )
        lines.append(f"| {row.work} | {row.precision} | {figures} |")
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """Returns a page with another table between its two markers.

    Raises:
        ValueError: The page has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", action="store_true", help="also print the places of waits and copies")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table between the markers of this page")
    options = parser.parse_args()
    rows = table_rows()
    print(markdown(rows))
    for row in rows if options.places else []:
        print(f"\n{row.work}, {row.precision}")
        for (kind, where), count in row.places.most_common():
            print(f"{count:6d} {kind:13s} {where}")
    if options.write:
        options.write.write_text(with_table(options.write.read_text(), markdown(rows)))


if __name__ == "__main__":
    main()
