import pytest
import torch

from musicgen_eval.data import WindowDataModule
from musicgen_eval.module import MusicGenEvaluation
from musicgen_eval.offers import Offer
from musicgen_eval.progress import EvaluationProgress
from musicgen_eval.records import CodecSpec, ScoredWindow, Window
from musicgen_eval.running import RunningTotals

SPEC = CodecSpec(32000, 50, 640, 2, 64, 1, (0, 1), 1500)


def offer(nll: float) -> Offer:
    window = Window("a", 0, 0, 5, 10)
    values = torch.full((2, 15), nll)
    values[:, :5] = float("nan")
    scored = ~values.isnan()
    codes = torch.zeros(2, 15, dtype=torch.int64)
    return Offer({"": ScoredWindow(window, codes, scored, values, codes)}, 50)


def test_running_totals_count_tracks_seconds_and_perplexity_of_targets():
    running = RunningTotals(SPEC)
    running.add([3, 3], [offer(1.0), offer(2.0)])
    running.add([7], [offer(3.0)])
    assert running.tracks == {3, 7}
    assert running.scored_seconds == pytest.approx(0.6)
    assert running.ppl == pytest.approx(torch.tensor(2.0).exp().item())


def test_the_bar_shows_what_was_measured(oracle, capsys):
    import lightning as L

    module = MusicGenEvaluation(str(oracle / "tiny_musicgen"))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, use_distributed_sampler=False,
        enable_model_summary=False, callbacks=[EvaluationProgress()],
    )  # fmt: skip
    trainer.test(module, WindowDataModule("demo", limit=1, context_s=2, target_s=2), verbose=False)
    said = capsys.readouterr()
    assert f"ppl={module.result.metrics['perplexity']['ppl'].value:.2f}" in said.out + said.err
    assert "tracks=1" in said.out + said.err
    assert "audio s/s=" in said.out + said.err
