"""Measures the time and the disk space that the journal costs, from alternating runs with and without it in one process.

    python -m benchmarks.journal --repeats 7 --markdown

The runs evaluate the demo with `test`. Without a journal, records stay in memory until the end, and everything else is equal.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import lightning as L

from benchmarks.models import heading
from musicgen_eval.metrics import CodebookAccuracy, CodebookPerplexity
from musicgen_eval.models.musicgen import MusicGen, load_model
from musicgen_eval.results.record_store import MemoryStore
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.runner import run_evaluation
from musicgen_eval.runs.settings import RunSettings

SETTINGS: Mapping[str, Mapping[str, bool]] = {
    "perplexity": {},
    "perplexity, accuracy": {"accuracy": True},
    "perplexity, nll of every code": {"save_nll": True},
}


class _WithoutJournal(L.Callback):
    """Keeps the records in memory, as in runs without a run folder."""

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MusicGenEvaluation)
        context = pl_module.context
        context.store = MemoryStore(context.plan, pl_module.bank.metrics)


def main() -> None:
    """Measures all settings and prints the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="number of runs with and without a journal")
    parser.add_argument("--markdown", action="store_true", help="print a table for the benchmark page")
    arguments = parser.parse_args()
    arguments.device = "cpu"
    model = load_model("demo")
    rows = []
    for name, settings in SETTINGS.items():
        _run(model, settings, with_journal=True)  # warm-up
        times: dict[bool, list[float]] = {True: [], False: []}
        num_bytes = seconds = 0.0
        for repeat in range(arguments.repeats):
            for with_journal in (True, False) if repeat % 2 else (False, True):
                elapsed, kept, scored_s = _run(model, settings, with_journal=with_journal)
                times[with_journal].append(elapsed)
                num_bytes, seconds = (kept, scored_s) if with_journal else (num_bytes, seconds)
        pairs = [one / other for one, other in zip(times[True], times[False], strict=True)]
        rows.append(
            (name, median(times[True]), median(times[False]), median(pairs), num_bytes / 1e3 / (seconds / 3600))
        )
    if arguments.markdown:
        print(heading("Cost of the journal", arguments, module="benchmarks.journal"))
        print(
            "| records | with journal, s | without journal, s | ratio | kB per hour of audio |\n|---|---:|---:|---:|---:|"
        )
        for name, with_s, without_s, ratio, kilobytes in rows:
            print(f"| {name} | {with_s:.2f} | {without_s:.2f} | {ratio:.3f} | {kilobytes:.0f} |")
    else:
        for row in rows:
            print(*row)


def _run(model: MusicGen, settings: Mapping[str, bool], *, with_journal: bool) -> tuple[float, float, float]:
    """Runs one evaluation. Returns its seconds, the bytes of its journal, and the scored seconds of audio."""
    metrics = {
        "perplexity": CodebookPerplexity(),
        **({"accuracy": CodebookAccuracy()} if "accuracy" in settings else {}),
    }
    module = MusicGenEvaluation.from_loaded(model, metrics=metrics, save_nll="save_nll" in settings)
    data = WindowDataModule("demo", batch_size=2)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "x"
        began = time.perf_counter()
        result = run_evaluation(
            module,
            data,
            RunSettings(accelerator="cpu", run_dir=run_dir),
            callbacks=[] if with_journal else [_WithoutJournal()],
        )
        elapsed = time.perf_counter() - began
        kept = sum(path.stat().st_size for path in (run_dir / "journal").glob("[0-9]*"))
    return elapsed, kept, float(result.counts["scored_seconds"])


if __name__ == "__main__":
    main()
