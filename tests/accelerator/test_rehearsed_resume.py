"""Tests that runs on the pretend device have the bytes of an uninterrupted run if they are stopped and resumed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from musicgen_eval.api import generate, perplexity
from musicgen_eval.cli.main import main
from musicgen_eval.errors import RunError
from musicgen_eval.results.journal.writer import JournalWriter
from tests.support.pretend_cuda import pretend_cuda

pytestmark = pytest.mark.slow

RESULTS = ("summary.json", "tracks.csv", "windows.csv", "nll.safetensors", "continuations.csv")


@pytest.fixture
def stop_after_one_batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Returns a function that stops the next run at its second batch, as a full disk does, until `monkeypatch.undo()`."""
    append = JournalWriter.append

    def stop() -> None:
        kept: list[int] = []

        def append_once(writer: JournalWriter, batch: Any, entries: Any) -> None:
            if kept:
                raise RunError("no room is left")
            kept.append(1)
            append(writer, batch, entries)

        monkeypatch.setattr(JournalWriter, "append", append_once)

    yield stop
    monkeypatch.undo()


def files(folder: Path) -> dict[str, bytes]:
    """Returns name -> content of the results and the audio of a run."""
    names = [folder / name for name in RESULTS] + sorted(folder.rglob("*.flac"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in names if path.exists()}


def evaluated(songs: Path, run_dir: Path, **settings: Any) -> Any:
    given = {"context_s": 0.3, "target_s": 0.3, "batch_size": 4, "precision": "bf16-mixed", "accelerator": "gpu"}
    return perplexity(songs, run_dir=run_dir, **{**given, **settings})


def continued(songs: Path, run_dir: Path, checkpoint: Path) -> Any:
    drawing = {"top_k": 40, "num_continuations": 2, "max_new_frames": 8}
    given = {"checkpoint": str(checkpoint), "batch_size": 2, "accelerator": "gpu", "layout": "joined"}
    return generate(songs, run_dir=run_dir, **drawing, **given)


def test_a_stopped_test_run_can_be_resumed(songs, tmp_path, stop_after_one_batch, monkeypatch):
    with pretend_cuda():
        uninterrupted = evaluated(songs, tmp_path / "uninterrupted")
        stop_after_one_batch()
        with pytest.raises(RunError, match="no room is left"):
            evaluated(songs, tmp_path / "x")
        monkeypatch.undo()
        with pytest.raises(RunError, match=r"accelerator|device|machine"):
            evaluated(songs, tmp_path / "x", accelerator="cpu")
        resumed = evaluated(songs, tmp_path / "x")
    assert resumed.ppl == uninterrupted.ppl
    assert len(files(tmp_path / "x")) == 4
    assert files(tmp_path / "x") == files(tmp_path / "uninterrupted")


def test_a_stopped_predict_run_can_be_resumed(songs, stereo_checkpoint, tmp_path, stop_after_one_batch, monkeypatch):
    with pretend_cuda():
        continued(songs, tmp_path / "uninterrupted", stereo_checkpoint)
        stop_after_one_batch()
        with pytest.raises(RunError, match="no room is left"):
            continued(songs, tmp_path / "x", stereo_checkpoint)
        monkeypatch.undo()
        assert main(["generate", "--resume", str(tmp_path / "x")]) == 0
    found, expected = files(tmp_path / "x"), files(tmp_path / "uninterrupted")
    assert len([name for name in found if name.endswith(".flac")]) >= 6
    assert found == expected
