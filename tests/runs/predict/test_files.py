"""The files that predict writes."""

import csv
from pathlib import Path

import pytest
import soundfile
import torch
from torchmetrics.audio import SignalNoiseRatio

from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.metrics import CodebookPerplexity, SeamDiscontinuity
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.runner import run_continuation
from musicgen_eval.runs.settings import RunSettings
from tests.support.continuations import (
    DRAWING,
    HOP,
    NUM_FRAMES,
    TEXTS,
    THREADS,
    audio_files,
    continued,
    decoded,
    read,
)
from tests.support.run_folders import continuation_rows
from tests.support.songs import write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]


def test_files_contain_the_audio_that_a_run_without_files_returns(songs, model, tmp_path):
    in_memory = continued(songs, model, num_continuations=2).continuations
    result = continued(songs, model, num_continuations=2, format="wav", run_dir=tmp_path / "x")
    rows = continuation_rows(tmp_path / "x")
    assert [(row["track"], row["continuation"]) for row in rows] == [
        (track, str(index)) for track in NUM_FRAMES for index in (0, 1)
    ]
    listed = {row[name] for row in rows for name in ("path", "context_path", "reference_path")}
    assert sorted(listed) == audio_files(tmp_path / "x")
    assert len(listed) == 4 * (2 + 1 + 1)
    for one, kept, row in zip(result.continuations, in_memory, rows, strict=True):
        assert (one.generated, one.context, one.reference) == (None, None, None)
        assert torch.equal(one.codes, kept.codes)
        for name, path in (
            ("path", one.path),
            ("context_path", one.context_path),
            ("reference_path", one.reference_path),
        ):
            assert tmp_path / "x" / row[name] == path
            assert not Path(row[name]).is_absolute()
        assert torch.equal(read(one.path), kept.generated)
        assert torch.equal(read(one.context_path), kept.context)
        assert torch.equal(read(one.reference_path), kept.reference)
        assert one.path.parent == one.context_path.parent == one.reference_path.parent
        num_frames = NUM_FRAMES[one.window.track]
        times = [float(row[name]) for name in ("context_s", "prompt_s", "generated_s", "reference_s")]
        assert times == pytest.approx(
            [count / 50 for count in (num_frames // 2, num_frames // 2, *2 * [num_frames - num_frames // 2])]
        )
        assert (row["text"], row["seed"], row["temperature"], row["top_k"]) == (
            TEXTS[row["track"]] or "",
            "0",
            "1.0",
            "40",
        )
        assert (row["top_p"], row["guidance_scale"], row["stride_s"]) == ("", "3.0", "18.0")
    held = {path.name for path in (tmp_path / "x").iterdir()}
    assert held == {
        "audio", "continuations.csv", "config.yaml", "run.json", "summary.json", "tracks.csv", "windows.csv", "journal",
    }  # fmt: skip


def test_the_table_contains_the_length_of_the_prompt_beyond_the_limit(long_song, short_model, tmp_path):
    result = continued(long_song, short_model, stride_s=0.6, run_dir=tmp_path / "x", format="wav")
    (row,) = continuation_rows(tmp_path / "x")
    times = [float(row[name]) for name in ("context_s", "prompt_s", "generated_s", "reference_s", "stride_s")]
    assert times == [2.0, 0.4, 2.0, 2.0, 0.6]
    assert read(result.continuations[0].context_path).shape == (1, 100 * HOP)


@pytest.mark.parametrize("format", ["flac", "wav", "mp3"])
def test_every_format_is_written(songs, model, tmp_path, format):
    result = continued(songs, model, limit=2, run_dir=tmp_path / "x", format=format, batch_size=4)
    in_memory = continued(songs, model, limit=2, batch_size=4).continuations
    expected = {f"{name}.{format}" for name in ("continuation_0", "context", "reference")}
    for one, kept in zip(result.continuations, in_memory, strict=True):
        assert {path.name for path in one.path.parent.iterdir()} == expected
        written = read(one.path)
        assert soundfile.info(one.path).format == format.upper()
        if format == "mp3":
            assert written.shape[1] == pytest.approx(kept.generated.shape[1], abs=3000)
        else:
            assert written.shape == kept.generated.shape
            assert (written - kept.generated.clamp(-1, 1)).abs().max() < 1e-6


def test_joined_files_contain_the_track_up_to_the_boundary_and_the_continuation(songs, model, tmp_path):
    result = continued(songs, model, run_dir=tmp_path / "x", format="wav", layout="joined", batch_size=4)
    in_memory = continued(songs, model, batch_size=4).continuations
    for one, kept in zip(result.continuations, in_memory, strict=True):
        joined, num_context = read(one.path), kept.context.shape[1]
        assert joined.shape == (1, num_context + kept.generated.shape[1])
        assert torch.equal(joined[:, num_context:], kept.generated)
        num_faded = 2 * HOP
        assert torch.equal(joined[:, : num_context - num_faded], kept.context[:, :-num_faded])
        prompt = decoded(model, kept.codes)[:, num_context - num_faded : num_context]
        original, faded = kept.context[:, -num_faded:], joined[:, num_context - num_faded : num_context]
        low, high = torch.minimum(original, prompt), torch.maximum(original, prompt)
        assert ((low - 1e-6 <= faded) & (faded <= high + 1e-6)).all()
        assert (faded[:, 0] - original[:, 0]).abs() < (original - prompt)[:, 0].abs() / 100 + 1e-6
        assert (faded[:, -1] - prompt[:, -1]).abs() < (original - prompt)[:, -1].abs() / 100 + 1e-6
        assert torch.equal(read(one.context_path), kept.context)


def test_a_joined_file_beyond_the_limit_begins_with_the_whole_context(long_song, short_model, tmp_path):
    (one,) = continued(long_song, short_model, run_dir=tmp_path / "x", format="wav", layout="joined").continuations
    joined, wave = read(one.path), read(long_song)
    assert joined.shape == (1, 200 * HOP)
    assert torch.equal(joined[:, : 98 * HOP], wave[:, : 98 * HOP])


def test_a_context_of_one_frame_can_be_joined(songs, model, tmp_path):
    (one,) = continued(
        songs.parent / "3.wav", model, context_s=0.02, run_dir=tmp_path / "x", format="wav", layout="joined"
    ).continuations
    assert read(one.path).shape == (1, 20 * HOP)


@pytest.mark.parametrize("layout", ["continuation", "joined"])
def test_without_originals_only_continuations_are_written(songs, model, tmp_path, layout):
    result = continued(songs, model, run_dir=tmp_path / "x", originals=False, layout=layout, num_continuations=2)
    assert len(audio_files(tmp_path / "x")) == 8
    assert all(
        Path(name).name in ("continuation_0.flac", "continuation_1.flac") for name in audio_files(tmp_path / "x")
    )
    assert {(row["context_path"], row["reference_path"]) for row in continuation_rows(tmp_path / "x")} == {("", "")}
    assert all(one.context_path is None and one.reference_path is None for one in result.continuations)


def test_metrics_are_the_same_with_and_without_files(songs, model, tmp_path):
    def metrics():
        return {
            "snr": SignalNoiseRatio(), "ppl": CodebookPerplexity(),
            "true": MetricEntry(SeamDiscontinuity(), {"generated": "reference_decoded"}),
        }  # fmt: skip

    written = continued(songs, model, metrics=metrics(), run_dir=tmp_path / "x", originals=False, limit=1)
    assert written.evaluation.metrics == continued(songs, model, metrics=metrics(), limit=1).evaluation.metrics
    assert all(one.generated is None for one in written.continuations)
    rows = list(csv.DictReader((tmp_path / "x" / "windows.csv").open()))
    assert [row["track"] for row in rows] == ["song 0"]
    assert all(row["snr/value"] for row in rows)


HOSTILE_IDS = [
    "../x", "../../x", "/etc/x", "a/b.mp3", "a_b.mp3", "Song", "song", "SONG", "x" * 300, "x" * 301, ".", "..", ".hidden",
    "trailing.", "ä/ö\\ü", "日本語", "CON", "a\nb", "-rf", "%s", "a:b|c?*",
]  # fmt: skip


def test_every_id_has_its_own_folder_inside_the_run_folder(songs, model, tmp_path):
    rows = [(str(songs.parent / "3.wav"), track, None) for track in HOSTILE_IDS]
    manifest = write_manifest(tmp_path / "hostile.csv", rows)
    before = set(tmp_path.rglob("*"))
    run_dir = tmp_path / "runs" / "x"
    result = continued(manifest, model, run_dir=run_dir, max_new_frames=2, batch_size=32, originals=False)
    folders = [one.path.parent for one in result.continuations]
    assert [one.window.track for one in result.continuations] == HOSTILE_IDS
    assert all(folder.resolve().parent == (run_dir / "audio").resolve() for folder in folders)
    assert len({folder.name.lower() for folder in folders}) == len(HOSTILE_IDS)
    assert all(len(folder.name.encode()) < 200 for folder in folders)
    assert [row["track"] for row in continuation_rows(run_dir)] == HOSTILE_IDS
    assert all((run_dir / row["path"]).is_file() for row in continuation_rows(run_dir))
    elsewhere = {path for path in tmp_path.rglob("*") if run_dir not in path.parents} - before
    assert elsewhere == {tmp_path / "runs", run_dir}


def test_no_continuations_are_returned_if_none_are_requested(songs, oracle, tmp_path):
    module = MusicGenEvaluation(
        str(oracle / "tiny_musicgen"), metrics={}, continuation=ContinuationSettings(**DRAWING, **THREADS)
    )
    settings = RunSettings(accelerator="cpu", run_dir=str(tmp_path / "x"))
    result = run_continuation(module, WindowDataModule(str(songs)), settings, return_continuations=False)
    assert result.continuations == []
    assert len(continuation_rows(tmp_path / "x")) == 4
    assert [track.status for track in result.evaluation.tracks] == ["ok"] * 4
