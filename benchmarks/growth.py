"""Measures time, memory and disk space of runs with different numbers of tracks. The cost per track must be constant.

    python -m benchmarks.growth --tracks 100 1000 10000 100000

Everything except the model is real: a manifest with durations, windows that are read from a file, the data loader, a metric, the
journal, results with intervals, and a second start that resumes the completed run. The model is replaced by a formula, so that the
benchmark runs on any machine. Each size runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import soundfile
import torch

from musicgen_eval.metrics.plugin.inputs import WindowData
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.records import ScoredWindow
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.runner import run_evaluation
from musicgen_eval.runs.scoring_step import ScoringStep, Step
from musicgen_eval.runs.settings import RunSettings
from musicgen_eval.runs.window_dataset import WindowAudio

SECONDS = 2  # length of each track, which has three windows


class FormulaStep(ScoringStep):
    """A scoring step whose codes and nll are computed from the position of the window."""

    def score(self, windows: Sequence[WindowAudio]) -> list[WindowData]:
        """Returns the metric inputs of each window, computed by the formula."""
        return [WindowData({"": self._scored(window)}, self.model.spec.frame_rate_hz) for window in windows]

    def _scored(self, window: WindowAudio) -> ScoredWindow:
        frames = window.window.num_frames
        steps = torch.arange(self.model.spec.num_codebooks * frames, dtype=torch.float32).reshape(-1, frames)
        nll = ((steps + window.row) * 0.61803).remainder(1.0) * 4
        nll[:, : window.window.context_frames] = float("nan")
        scored = ~nll.isnan()
        codes = torch.zeros(nll.shape, dtype=torch.int64)
        return ScoredWindow(window.window, codes, scored, nll, codes.masked_fill(~scored, -1))


class FormulaEvaluation(MusicGenEvaluation):
    """An evaluation without a model."""

    def configure_model(self) -> None:
        """Loads nothing."""

    def make_step(self) -> Step:
        """Returns a step that does not need a model."""
        model = SimpleNamespace(spec=self.spec, device=torch.device("cpu"))
        return FormulaStep(
            cast(MusicGen, model),
            self.bank,
            self.context.plan,
            tail=self.settings.tail,
            seed=self.settings.seed,
            save_nll=self.settings.save_nll,
            precision=str(self.trainer.precision),
            totals=self.context.totals,
        )


def main() -> None:
    """Measures the requested sizes and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tracks", type=int, nargs="+", default=[100, 1000, 10_000, 100_000], help="numbers of tracks")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(_measure(arguments.one)))
        return
    columns = ("planning and scoring, ms per track", "results, ms per track", "second start, ms per track")
    print(f"| tracks | {' | '.join(columns)} | peak MB | journal, bytes per track |")
    print("|---:|---:|---:|---:|---:|---:|")
    for num_tracks in arguments.tracks:
        command = [sys.executable, "-m", "benchmarks.growth", "--one", str(num_tracks)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        per_track = [1000 * found[name] / num_tracks for name in ("measure_s", "results_s", "again_s")]
        print(
            f"| {num_tracks} | {' | '.join(f'{value:.2f}' for value in per_track)} | {found['peak_mb']:.0f} | "
            f"{found['journal_bytes'] / num_tracks:.0f} |",
            flush=True,
        )


def _measure(num_tracks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        manifest = _write_manifest(Path(folder), num_tracks)
        run_dir = Path(folder) / "run"
        began = time.perf_counter()
        module = _run(manifest, run_dir)
        first_s = time.perf_counter() - began
        began = time.perf_counter()
        _run(manifest, run_dir)
        again_s = time.perf_counter() - began
        journal_bytes = sum(path.stat().st_size for path in (run_dir / "journal").glob("[0-9]*"))
    return {
        "measure_s": first_s - module.results_s,
        "results_s": module.results_s,
        "again_s": again_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "journal_bytes": journal_bytes,
    }


class _Timed(FormulaEvaluation):
    """An evaluation that measures the seconds from the last window to the results."""

    results_s = 0.0

    def on_test_epoch_end(self) -> None:
        began = time.perf_counter()
        super().on_test_epoch_end()
        self.results_s = time.perf_counter() - began


def _run(manifest: Path, run_dir: Path) -> _Timed:
    module = _Timed("demo")
    data = WindowDataModule(str(manifest), context_s=0.5, target_s=0.5, batch_size=8)
    run_evaluation(module, data, RunSettings(accelerator="cpu", run_dir=run_dir))
    return module


def _write_manifest(folder: Path, num_tracks: int) -> Path:
    """Writes a manifest with many tracks of one file and their durations, and returns its path."""
    wave = np.random.default_rng(0).normal(0, 0.1, SECONDS * 32_000).astype(np.float32)
    soundfile.write(folder / "song.wav", wave, 32_000, subtype="PCM_16")
    rows = "".join(f"song.wav,track {number},{SECONDS}\n" for number in range(num_tracks))
    (folder / "songs.csv").write_text("path,id,duration_s\n" + rows)
    return folder / "songs.csv"


if __name__ == "__main__":
    main()
