"""Notes reach the terminal once, on rank 0, in one line each."""

import numpy as np
import soundfile

import musicgen_eval
from musicgen_eval.notes import print_notes


def test_a_note_is_one_line_on_stderr_without_secrets(capsys, monkeypatch):
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
    note = (
        f"{songs}: a folder: skipped 4 of 5 files, which have no audio extension: .jpg (2), .txt (1), no extension (1)"
    )
    assert capsys.readouterr().err.splitlines() == [f"note: {note}"]
    assert result.evaluation.recipe["notes"] == [note]
    assert result.evaluation.counts["ignored_files"] == 4
