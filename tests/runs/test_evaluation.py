"""The whole pipeline from files to results, on one process and on two, in every precision that a CPU supports."""

import re
import signal
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from torchmetrics import MeanMetric

from musicgen_eval.api import perplexity
from musicgen_eval.errors import AudioError, EvaluationError, MetricError, RunError
from musicgen_eval.inference.scoring import score_codes
from musicgen_eval.metrics import CodebookPerplexity, ContextGain, TextGain
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.models.threads import single_threaded
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.runner import run_evaluation
from musicgen_eval.runs.settings import RunSettings
from tests.support.programs import SCRIPT, Program, run_script
from tests.support.songs import write_songs

pytestmark = pytest.mark.usefixtures("cheap_runs")

DURATIONS_S = (1.0, 2.3, 0.7, 3.1, 0.02, 1.5, 2.0)


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    """Returns a manifest of seven songs, some with a text."""
    num_samples = {str(index): int(duration_s * 32000) for index, duration_s in enumerate(DURATIONS_S)}
    texts = {str(index): f"drums and bass {index}" for index in range(len(DURATIONS_S)) if index % 3}
    return write_songs(tmp_path_factory.mktemp("songs"), num_samples, texts=texts)


@pytest.fixture(scope="module")
def tiny_folder(oracle):
    return str(oracle / "tiny_musicgen")


def evaluate(source, checkpoint, *, metrics=None, tail="score", save_nll=False, precision="32-true", **data):
    module = MusicGenEvaluation(str(checkpoint), metrics=metrics, tail=tail, save_nll=save_nll)
    settings = {"context_s": 0.5, "target_s": 0.5, "batch_size": 3, **data}
    return run_evaluation(
        module, WindowDataModule(str(source), **settings), RunSettings(precision=precision, accelerator="cpu")
    )


@pytest.mark.parametrize("tail", ["score", "drop"])
def test_the_result_equals_the_definition(songs, tiny_folder, tiny_model, tail):
    result = evaluate(songs, tiny_folder, tail=tail, save_nll=True)
    sums, counts, by_track = torch.zeros(4, dtype=torch.float64), torch.zeros(4), {}
    for index, duration_s in enumerate(DURATIONS_S):
        wave = torch.from_numpy(soundfile.read(songs.parent / f"{index}.wav", dtype="float32")[0])
        frames = int(duration_s * 32000) // 640
        windows = [(0, 0, min(frames, 50))]
        windows += [(at - 25, 25, min(25, frames - at)) for at in range(50, frames, 25)]
        text = None if index % 3 == 0 else f"drums and bass {index}"
        curve = torch.full((4, frames), float("nan"))
        for start, context, target in windows:
            length = context + target
            with torch.inference_mode(), single_threaded():
                codes = tiny_model.encode([wave[None, start * 640 : (start + length) * 640]])[0][None]
                states = tiny_model.encode_text(text)
                nll = score_codes(
                    tiny_model.decoder, codes, delays=(0, 1, 2, 3), tail=tail,
                    encoder_hidden_states=None if states is None else states[None],
                )[0]  # fmt: skip
            curve[:, start + context : start + length] = nll[:, context:]
        by_track[f"song {index}"] = curve
        sums += curve.double().nan_to_num().sum(1)
        counts += (~curve.isnan()).sum(1)
    ce = (sums / counts).mean()
    values = result.metrics["perplexity"]
    assert values["ce"].value == pytest.approx(ce.item(), abs=1e-5)
    assert values["ppl"].value == pytest.approx(ce.exp().item(), rel=1e-5)
    assert values["bits_per_second"].value == pytest.approx(50 * 4 * ce.item() / np.log(2), rel=1e-5)
    for track, curve in by_track.items():
        assert torch.equal(result.nll[track].isnan(), curve.isnan())
        assert (result.nll[track] - curve).abs().nan_to_num().max() < 1e-4
    assert values["ppl"].low < values["ppl"].value < values["ppl"].high
    result.nll["song 0"].nan_to_num_()  # an ordinary tensor, which can be changed in place


@pytest.mark.slow
def test_results_are_bit_identical_for_any_batch_size_and_number_of_workers(songs, tiny_folder):
    one = evaluate(songs, tiny_folder, save_nll=True, batch_size=1)
    other = evaluate(songs, tiny_folder, save_nll=True, batch_size=8, num_workers=1)
    assert one.metrics == other.metrics
    assert all(torch.equal(one.nll[track].nan_to_num(), other.nll[track].nan_to_num()) for track in one.nll)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precisions_are_close_and_do_not_change_codes_and_sums(songs, tiny_folder, precision):
    exact = evaluate(songs, tiny_folder)
    rounded = evaluate(songs, tiny_folder, precision=precision)
    assert rounded.recipe["precision"] == precision
    ce = rounded.metrics["perplexity"]["ce"].value
    assert ce != exact.metrics["perplexity"]["ce"].value
    assert ce == pytest.approx(exact.metrics["perplexity"]["ce"].value, abs=0.03)
    assert torch.get_default_dtype() == torch.float32


def test_gains_count_only_windows_with_a_text_or_a_context(songs, tiny_folder):
    result = evaluate(songs, tiny_folder, metrics={"text": TextGain(), "context": ContextGain()})
    with_text = {f"song {index}" for index in range(7) if index % 3}
    for track in result.tracks:
        gain = track.metrics["text"]["nats_per_second"]
        assert np.isfinite(gain) == (track.id in with_text)
    with_context = {window.window.track for window in result.windows if window.window.context_frames}
    assert with_context == {
        track.id for track in result.tracks if np.isfinite(track.metrics["context"]["nats_per_second"])
    }


def test_a_renamed_torchmetrics_class_agrees_with_this_package(songs, tiny_folder):
    metrics = {"ours": CodebookPerplexity(), "mean": MetricEntry(MeanMetric(), {"value": "nll"})}
    result = evaluate(songs, tiny_folder, metrics=metrics)
    sums = [result.metrics["ours"][f"ce_q{k}"].value for k in range(1, 5)]
    assert result.metrics["mean"]["value"].value == pytest.approx(np.mean(sums), rel=1e-5)


@pytest.mark.slow
def test_a_failed_track_is_counted_and_none_of_its_windows(songs, tiny_folder, tmp_path):
    bad = np.zeros(64000, dtype=np.float32)
    bad[60000] = np.nan
    soundfile.write(songs.parent / "nan.wav", bad, 32000, subtype="FLOAT")
    manifest = songs.parent / "with_bad.csv"
    manifest.write_text(songs.read_text() + "nan.wav,bad,\n")
    with pytest.raises(RunError, match=r"1 track failed, but data.max_failures is 0.*\n.*nan\.wav"):
        evaluate(manifest, tiny_folder)
    result = evaluate(manifest, tiny_folder, max_failures=1)
    clean = evaluate(songs, tiny_folder)
    assert result.metrics["perplexity"]["ppl"].value == pytest.approx(
        clean.metrics["perplexity"]["ppl"].value, rel=1e-12
    )
    assert [failure.track for failure in result.failures] == ["bad"]
    assert (result.counts["tracks_ok"], result.counts["tracks_failed"]) == (7, 1)
    assert result.tracks[-1].status == "failed"
    assert "nan.wav" in result.tracks[-1].reason


def test_a_failed_run_leaves_no_folder(tiny_folder, tmp_path):
    (tmp_path / "text.wav").write_text("this is no audio at all, whatever its name says")
    run_dir = tmp_path / "runs" / "x"
    module = MusicGenEvaluation(tiny_folder)
    with pytest.raises(RunError, match=r"text\.wav"):
        run_evaluation(
            module, WindowDataModule(str(tmp_path / "text.wav")), RunSettings(accelerator="cpu", run_dir=run_dir)
        )
    assert not run_dir.parent.exists()


@pytest.mark.slow
def test_validate_and_test_give_the_same_result(songs, tiny_folder):
    module = MusicGenEvaluation(tiny_folder)
    data = WindowDataModule(str(songs), context_s=0.5, target_s=0.5)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.validate(module, data, verbose=False)
    assert module.result.metrics == evaluate(songs, tiny_folder).metrics


def test_other_text_is_refused_if_there_is_no_other_text(songs, tiny_folder):
    class OtherText(MeanMetric):
        def update(self, nll__other_text: torch.Tensor) -> None:  # type: ignore[override]
            super().update(nll__other_text.nan_to_num())

    with pytest.raises(RunError, match="a metric needs the text of another track"):
        evaluate(songs.parent / "0.wav", tiny_folder, metrics={"other": OtherText()})


def test_a_wrong_metric_is_refused_before_any_audio_is_opened(tiny_folder):
    with pytest.raises(MetricError, match="asks for 'value'"):
        evaluate("/nowhere", tiny_folder, metrics={"mean": MeanMetric()})


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    """Returns a model for these tests alone. An evaluation prepares it for a precision in place."""
    return load_model(tiny_folder)


def test_perplexity_of_a_tensor_equals_that_of_its_file(songs, loaded):
    path = songs.parent / "3.wav"
    wave = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    from_file = perplexity(path, loaded, context_s=0.5, target_s=0.5, text="drums", accelerator="cpu")
    from_tensor = perplexity(
        wave, loaded, sample_rate_hz=32000, context_s=0.5, target_s=0.5, text="drums", accelerator="cpu"
    )
    assert from_tensor.ppl == from_file.ppl
    assert from_file.ppl == pytest.approx(np.exp(from_file.ce))
    assert len(from_file.ppl_per_codebook) == 4
    assert from_file.ppl_per_track == {"3.wav": from_file.ppl}
    assert from_file.nll["3.wav"].shape == (4, 155)


@pytest.mark.parametrize(
    ("audio", "settings", "message"),
    [
        (torch.zeros(308700, 1), {"sample_rate_hz": 44100}, "with one or two channels, got torch.float32 (308700, 1)"),
        (torch.zeros(1, 0), {"sample_rate_hz": 44100}, "one or two channels"),
        (np.zeros(10), {}, "got ndarray; convert numpy arrays with torch.from_numpy"),
        (torch.full((32000,), 30000.0), {"sample_rate_hz": 32000}, "samples reach 30000"),
        ("x.wav", {"precision": "fp8"}, "precision must be one of"),
        ("x.wav", {"accelerator": "tpux"}, "tpux"),
        ("x.wav", {"metrics": {"perplexity": CodebookPerplexity()}}, "the name 'perplexity', which is reserved"),
        ("x.wav", {"max_frames": 50}, "revision and max_frames have no effect on a loaded model"),
    ],
)
def test_wrong_arguments_of_perplexity_are_refused_by_name(loaded, audio, settings, message):
    with pytest.raises(EvaluationError, match=re.escape(message)):
        perplexity(audio, loaded, **settings)


def test_a_tensor_without_a_rate_is_refused(loaded):
    with pytest.raises(AudioError, match="sample_rate_hz must be a number above 0"):
        perplexity(torch.zeros(32000), loaded)


def common_arguments(tiny_folder, source) -> list[str]:
    return [
        f"--model.checkpoint={tiny_folder}", f"--data.source={source}", "--data.context_s=0.5", "--data.target_s=0.5",
        "--data.batch_size=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_failure_on_one_of_two_processes_stops_both_with_its_reason(songs, tiny_folder, tmp_path):
    """The track can be opened, so planning succeeds. Its last window, which only one rank reads, contains a NaN."""
    bad = np.zeros(64000, dtype=np.float32)
    bad[-1] = np.nan
    soundfile.write(songs.parent / "late_nan.wav", bad, 32000, subtype="FLOAT")
    manifest = songs.parent / "late_nan.csv"
    manifest.write_text(songs.read_text() + "late_nan.wav,late,\n")
    arguments = [*common_arguments(tiny_folder, manifest), "--trainer.devices=2", f"--run_dir={tmp_path / 'x'}"]
    done = run_script("test", *arguments, num_launched=1)
    assert done.returncode == 1
    assert "error: 1 track failed, but data.max_failures is 0" in done.stderr
    assert "late_nan.wav" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["config.yaml", "journal", "run.json"]


@pytest.mark.slow
def test_a_failure_while_planning_stops_two_processes_with_one_message(tiny_folder, tmp_path):
    arguments = [*common_arguments(tiny_folder, tmp_path), "--trainer.devices=2", f"--run_dir={tmp_path / 'x'}"]
    done = run_script("test", *arguments, num_launched=1)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "message"), [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_stops_a_run_with_its_status_and_keeps_completed_batches(tiny_folder, tmp_path, sent, status, message):
    noise = np.random.default_rng(0).normal(0, 0.1, 8000 * 3600).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", noise, 8000)  # one hour, so the signal arrives during the run
    command = [
        str(SCRIPT), "test", "--wandb.mode=offline",
        *common_arguments(tiny_folder, tmp_path / "long.wav"), f"--run_dir={tmp_path / 'x'}",
    ]  # fmt: skip
    with Program(command) as process:
        while not list(tmp_path.glob("x/journal/*.jsonl")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(sent)
        _, printed = process.communicate(timeout=120)
    assert process.returncode == status, printed[-2000:]
    assert message in printed
    (journal,) = (tmp_path / "x" / "journal").glob("*.jsonl")
    lines = journal.read_text().splitlines()
    assert len(lines) > 1
    assert (len(lines) - 1) % 3 == 0  # the current batch was completed
