"""Runs on the pretend device that end after their first batch and are resumed: to the bytes of an undisturbed run."""

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
    """Ends the next run at its second batch, as a full disk would; `undo` of monkeypatch lets later runs pass."""
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
    """The results of a run, and its audio."""
    names = [folder / name for name in RESULTS] + sorted(folder.rglob("*.flac"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in names if path.exists()}


def evaluated(songs: Path, run_dir: Path, **settings: Any) -> Any:
    given = {"context_s": 0.3, "target_s": 0.3, "batch_size": 4, "precision": "bf16-mixed", "accelerator": "gpu"}
    return perplexity(songs, run_dir=run_dir, **{**given, **settings})


def continued(songs: Path, run_dir: Path, checkpoint: Path) -> Any:
    drawing = {"top_k": 40, "num_continuations": 2, "max_new_frames": 8}
    given = {"checkpoint": str(checkpoint), "batch_size": 2, "accelerator": "gpu", "hold": "joined"}
    return generate(songs, run_dir=run_dir, **drawing, **given)


def test_a_test_is_resumed_in_its_middle(songs, tmp_path, stop_after_one_batch, monkeypatch):
    with pretend_cuda():
        undisturbed = evaluated(songs, tmp_path / "undisturbed")
        stop_after_one_batch()
        with pytest.raises(RunError, match="no room is left"):
            evaluated(songs, tmp_path / "x")
        monkeypatch.undo()
        with pytest.raises(RunError, match=r"accelerator|device|machine"):
            evaluated(songs, tmp_path / "x", accelerator="cpu")
        resumed = evaluated(songs, tmp_path / "x")
    assert resumed.ppl == undisturbed.ppl
    assert len(files(tmp_path / "x")) == 4
    assert files(tmp_path / "x") == files(tmp_path / "undisturbed")


def test_continuations_are_resumed_in_their_middle(
    songs, stereo_checkpoint, tmp_path, stop_after_one_batch, monkeypatch
):
    with pretend_cuda():
        continued(songs, tmp_path / "undisturbed", stereo_checkpoint)
        stop_after_one_batch()
        with pytest.raises(RunError, match="no room is left"):
            continued(songs, tmp_path / "x", stereo_checkpoint)
        monkeypatch.undo()
        assert main(["generate", "--resume", str(tmp_path / "x")]) == 0
    found, expected = files(tmp_path / "x"), files(tmp_path / "undisturbed")
    assert len([name for name in found if name.endswith(".flac")]) >= 6
    assert found == expected
