"""Tracks that fail in predict, and settings that it refuses."""

import errno
import json
import os
from pathlib import Path

import pytest
import soundfile
import torch
from torchmetrics.audio import SignalNoiseRatio

from musicgen_eval.api import generate
from musicgen_eval.audio.writer import AudioWriter
from musicgen_eval.errors import RunError
from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.models.musicgen import load_model
from tests.support.continuations import HOP, NUM_FRAMES, TEXTS, audio_files, continued
from tests.support.run_folders import continuation_rows
from tests.support.songs import write_manifest, write_noise

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]


@pytest.fixture
def with_bad(songs, tmp_path) -> Path:
    """Returns the manifest of the songs and of one whose second half contains a NaN."""
    write_noise(tmp_path / "bad.wav", 44 * HOP, nan_at=40 * HOP)
    rows = [(str(songs.parent / f"{index}.wav"), track, TEXTS[track]) for index, track in enumerate(NUM_FRAMES)]
    return write_manifest(tmp_path / "bad.csv", [*rows[:2], ("bad.wav", "bad", None), *rows[2:]])


@pytest.mark.parametrize("storage", ["files", "memory"])
def test_a_track_that_cannot_be_read_after_the_boundary_is_a_recorded_failure(
    with_bad, songs, model, tmp_path, storage
):
    run_dir = tmp_path / "x" if storage == "files" else None
    metrics = {"snr": SignalNoiseRatio()}
    result = continued(with_bad, model, max_failures=1, run_dir=run_dir, metrics=metrics, batch_size=1)
    assert [failure.track for failure in result.evaluation.failures] == ["bad"]
    assert "bad.wav" in result.evaluation.failures[0].reason
    assert [one.window.track for one in result.continuations] == list(NUM_FRAMES)
    clean = continued(songs, model, metrics={"snr": SignalNoiseRatio()}, batch_size=1)
    assert result.evaluation.metrics == clean.evaluation.metrics
    if run_dir is not None:
        assert [row["track"] for row in continuation_rows(run_dir)] == list(NUM_FRAMES)
        listed = {
            row[name] for row in continuation_rows(run_dir) for name in ("path", "context_path", "reference_path")
        }
        assert [name for name in audio_files(run_dir) if "/continuation_" in name and name not in listed] == []
        assert json.loads((run_dir / "summary.json").read_text())["counts"]["tracks_failed"] == 1


@pytest.mark.parametrize("metric", [{"true": MetricEntry(CodebookPerplexity(), {"nll": "nll__reference"})}, {}])
def test_too_many_failures_stop_the_run_and_written_continuations_stay_listed(with_bad, model, tmp_path, metric):
    with pytest.raises(RunError, match=r"1 track failed, but data.max_failures is 0.*\n.*bad\.wav"):
        continued(with_bad, model, run_dir=tmp_path / "x", metrics=metric, batch_size=1)
    rows = continuation_rows(tmp_path / "x")
    assert [row["track"] for row in rows] == [
        "song 3",
        "song 1",
    ]  # tracks that are shorter than the damaged one come first
    assert all((tmp_path / "x" / row["path"]).is_file() for row in rows)
    begun = {"config.yaml", "run.json", "journal"}
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"audio", "continuations.csv", *begun}


def test_a_damaged_reference_is_not_read_if_it_is_not_needed(with_bad, model, tmp_path):
    result = continued(with_bad, model, run_dir=tmp_path / "x", originals=False)
    assert len(result.continuations) == 5
    beyond = continued(with_bad, model, context_s=0.2, duration_s=0.2)
    assert len(beyond.continuations) == 5


def test_tracks_that_are_too_short_are_counted(songs, model, tmp_path):
    write_noise(tmp_path / "frame.wav", HOP + 1)
    rows = [(str(songs.parent / "0.wav"), "song 0", None), ("frame.wav", "one frame", None)]
    manifest = write_manifest(tmp_path / "short.csv", rows)
    by_half = continued(manifest, model).evaluation
    assert [track.status for track in by_half.tracks] == ["ok", "too_short"]
    assert by_half.counts["tracks_too_short"] == 1
    (one,) = continued(manifest, model, context_s=0.04, limit=1).continuations
    assert one.window.context_frames == 2
    longer = continued(songs, model, context_s=0.8).evaluation  # 40 frames: two songs are long enough
    assert [track.status for track in longer.tracks] == ["ok", "too_short", "ok", "too_short"]
    whole = continued(songs, model, context_s=1.0).evaluation  # the boundary is at the end of the first song
    assert [track.status for track in whole.tracks] == ["too_short", "too_short", "ok", "too_short"]
    with pytest.raises(RunError, match=r"nothing to continue.*1 track too short"):
        continued(tmp_path / "frame.wav", model)


def test_a_folder_that_cannot_be_created_is_refused(songs, model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"run_dir .*file/x cannot be used: Not a directory"):
        continued(songs, model, run_dir=tmp_path / "file" / "x")
    with pytest.raises(RunError, match=r"run_dir /proc/x cannot be used"):
        continued(songs, model, run_dir="/proc/x")


def test_a_run_dir_that_is_a_file_or_contains_other_files_is_refused_and_not_changed(songs, model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"run_dir .*file cannot be used"):
        continued(songs, model, run_dir=tmp_path / "file")
    with pytest.raises(RunError, match=r"is not empty \(file\)"):
        continued(songs, model, run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("originals", [False, True])
def test_a_full_disk_leaves_complete_files_and_is_reported(songs, model, tmp_path, monkeypatch, originals):
    write, opened = AudioWriter.write, []

    def until_full(writer, audio):
        if writer.path not in opened:
            opened.append(writer.path)
        write(writer, audio)
        if len(opened) > (7 if originals else 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(AudioWriter, "write", until_full)
    run_dir = tmp_path / "x"
    with pytest.raises(RunError) as error:
        continued(songs, model, run_dir=run_dir, originals=originals, batch_size=2)
    message = str(error.value)
    assert f"run_dir {run_dir}" in message
    assert "No space left on device" in message
    assert "written 2 continuations" in message
    assert "\n" not in message
    rows = continuation_rows(run_dir)
    assert [row["track"] for row in rows] == ["song 3", "song 1"]
    continuations = [name for name in audio_files(run_dir) if Path(name).name.startswith("continuation")]
    assert sorted(row["path"] for row in rows) == continuations
    assert not [name for name in audio_files(run_dir) if Path(name).name.startswith(".")]
    assert opened[-1].exists() is False
    assert all(soundfile.info(run_dir / name).frames for name in audio_files(run_dir))
    begun = {"config.yaml", "run.json", "journal"}
    assert {path.name for path in run_dir.iterdir()} == {"audio", "continuations.csv", *begun}


def test_a_run_that_fails_before_the_first_continuation_leaves_no_file(songs, model, tmp_path, monkeypatch):
    def full(writer, audio):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(AudioWriter, "write", full)
    with pytest.raises(RunError, match="written 0 continuations"):
        continued(songs, model, run_dir=tmp_path / "runs" / "x")
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_a_table_that_cannot_be_extended_stops_the_run_and_lists_the_written_continuations(
    songs, model, tmp_path, monkeypatch
):
    """The disk fills up while the table is written. The last line of the table is complete, and its file is removed."""
    from musicgen_eval.runs import continuation_table

    class Full(continuation_table.csv.DictWriter):
        def writerow(self, row):
            if row["track"] == "song 0":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().writerow(row)

    monkeypatch.setattr(continuation_table.csv, "DictWriter", Full)
    with pytest.raises(RunError, match="written 2 continuations"):
        continued(songs, model, run_dir=tmp_path / "x", originals=False, batch_size=2)
    assert [row["track"] for row in continuation_rows(tmp_path / "x")] == ["song 3", "song 1"]
    assert (tmp_path / "x" / "continuations.csv").read_text().endswith("\n")


def test_a_decoder_with_nan_logits_is_an_error_and_nothing_is_written(songs, oracle, tmp_path):
    broken = load_model(oracle / "tiny_musicgen")
    broken.decoder.model.decoder.layer_norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="logits are NaN or infinite; set the precision to bf16-mixed or 32-true"):
        generate(str(songs), checkpoint=broken, top_k=20, limit=2, run_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_recipe_contains_the_number_of_threads(songs, model):
    found = generate(str(songs), checkpoint=model, top_k=20, limit=1).evaluation.recipe["threads"]
    assert found == torch.get_num_threads()
    given = generate(str(songs), checkpoint=model, top_k=20, limit=1, threads=1).evaluation.recipe["threads"]
    assert given == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "ogg", "run_dir": "x"}, "format must be one of flac, wav, mp3, got 'ogg'"),
        ({"layout": "both", "run_dir": "x"}, "layout must be one of continuation, joined"),
        ({"layout": "joined"}, "have no effect without run_dir; specify run_dir"),
        ({"temperature": 0, "num_continuations": 2}, "continuations of a track are identical"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(songs, model, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=message):
        generate(str(songs), checkpoint=model, **{"top_k": 20, **settings})
    assert list(tmp_path.iterdir()) == []
