import sys

import lightning as L
import pytest
import torch

from musicgen_eval.metrics.plugin.inputs import WindowData
from musicgen_eval.records import ScoredWindow, Window
from musicgen_eval.results.running_totals import RunningTotals
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.progress_bar import EvaluationProgress
from tests.support.specs import codec_spec

SPEC = codec_spec(num_codebooks=2, codebook_size=64)


def data(nll: float) -> WindowData:
    window = Window("a", 0, 0, 5, 10)
    values = torch.full((2, 15), nll)
    values[:, :5] = float("nan")
    scored = ~values.isnan()
    codes = torch.zeros(2, 15, dtype=torch.int64)
    return WindowData({"": ScoredWindow(window, codes, scored, values, codes)}, 50)


def test_running_totals_count_tracks_seconds_and_perplexity_of_targets():
    running = RunningTotals(SPEC)
    running.add([3, 3], [data(1.0), data(2.0)])
    running.add([7], [data(3.0)])
    assert running.tracks == {3, 7}
    assert running.scored_seconds == pytest.approx(0.6)
    assert running.ppl == pytest.approx(torch.tensor(2.0).exp().item())


def run_with_bar(oracle):
    module = MusicGenEvaluation(str(oracle / "tiny_musicgen"))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, use_distributed_sampler=False,
        enable_model_summary=False, callbacks=[EvaluationProgress()],
    )  # fmt: skip
    trainer.test(module, WindowDataModule("demo", limit=1, context_s=2, target_s=2), verbose=False)
    return module.result


def test_the_bar_shows_the_running_totals_on_standard_error(oracle, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = run_with_bar(oracle)
    printed = capsys.readouterr()
    assert f"ppl={result.metrics['perplexity']['ppl'].value:.2f}" in printed.err
    assert "tracks=1" in printed.err
    assert "audio s/s=" in printed.err
    assert "Testing" not in printed.out


def test_there_is_no_bar_if_standard_error_is_not_a_terminal(oracle, capsys):
    run_with_bar(oracle)
    printed = capsys.readouterr()
    assert "Testing" not in printed.out + printed.err
