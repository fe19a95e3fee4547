"""Tests that notes are printed once, on rank 0, on one line each."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

import musicgen_eval
from musicgen_eval.data.notes import print_notes

pytestmark = pytest.mark.usefixtures("cheap_runs")


def test_a_note_is_one_line_on_stderr_with_secrets_redacted(capsys, monkeypatch):
    monkeypatch.setenv("SONG_TOKEN", "hunter2hunter2")
    print_notes(["took a\nfile of hunter2hunter2"])
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "note: took a\\nfile of [redacted]\n")


def test_a_run_prints_the_notes_of_its_source_and_records_them(tmp_path, capsys):
    songs = tmp_path / "songs"
    songs.mkdir()
    soundfile.write(songs / "a.wav", np.random.default_rng(0).normal(0, 0.1, 32000), 32000)
    for name in ("cover.jpg", "back.JPG", "notes.txt", "Makefile"):
        (songs / name).write_text("no music")
    result = musicgen_eval.perplexity(songs, run_dir=tmp_path / "run")
    note = f"{songs}: skipped 4 of 5 files because they have no audio extension: .jpg (2), .txt (1), no extension (1)"
    assert capsys.readouterr().err.splitlines() == [f"note: {note}"]
    assert result.evaluation.recipe["notes"] == [note]
    assert result.evaluation.counts["ignored_files"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("source", ["demo", ["demo"]])
def test_a_local_folder_named_demo_is_noted_and_the_bundled_clips_are_used(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    musicgen_eval.perplexity(source, limit=1)
    assert capsys.readouterr().err == ""
    (tmp_path / "demo").mkdir()
    soundfile.write(tmp_path / "demo" / "mine.wav", np.random.default_rng(0).normal(0, 0.1, 32000), 32000)
    result = musicgen_eval.perplexity(source, limit=1)
    assert capsys.readouterr().err == (
        "note: source demo selects the bundled demo; "
        "use ./demo to select the file or folder of that name in the current folder\n"
    )
    assert list(result.ppl_per_track) == ["dreamy_01"]
    assert list(musicgen_eval.perplexity("./demo").ppl_per_track) == ["mine.wav"]
    assert capsys.readouterr().err == ""


def test_a_local_checkpoint_named_demo_is_noted_and_the_bundled_one_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clips = Path(musicgen_eval.__file__).parent / "data" / "demo"
    (tmp_path / "demo").mkdir()
    musicgen_eval.perplexity(clips / "manifest.csv", limit=1)
    assert capsys.readouterr().err == ""  # the folder contains no checkpoint, so `demo` is not ambiguous
    (tmp_path / "demo" / "config.json").write_text("{}")
    musicgen_eval.perplexity(clips / "manifest.csv", limit=1)
    assert capsys.readouterr().err == (
        "note: checkpoint demo selects the bundled demo; "
        "use ./demo to select the file or folder of that name in the current folder\n"
    )
