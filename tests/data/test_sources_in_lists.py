"""Tests lists of files as a source, through the Python functions and the Lightning command."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

import musicgen_eval
from musicgen_eval.cli.main import lightning_main
from musicgen_eval.errors import AudioError, RunError

pytestmark = pytest.mark.usefixtures("cheap_runs")


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    for row, name in enumerate(("rock/a.wav", "jazz/a.wav", "b.wav")):
        path = tmp_path / "songs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(row).normal(0, 0.1, 32_000 * (row + 1)), 32_000)
    return tmp_path / "songs"


@pytest.mark.slow
def test_a_list_of_files_gives_the_perplexities_of_the_single_files(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = [songs / "rock" / "a.wav", str(songs / "jazz" / "a.wav"), songs / "b.wav"]
    result = musicgen_eval.perplexity(files, run_dir=tmp_path / "run", batch_size=1)
    assert list(result.ppl_per_track) == ["rock/a.wav", "jazz/a.wav", "b.wav"]
    for id, file in zip(result.ppl_per_track, files, strict=True):
        assert result.ppl_per_track[id] == musicgen_eval.perplexity(file, batch_size=1).ppl
    assert result.evaluation.recipe["source"] == list(map(str, files))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["recipe"]["source"] == list(map(str, files))

    monkeypatch.chdir(songs)  # the same files by relative paths
    again = musicgen_eval.perplexity(["rock/a.wav", "jazz/a.wav", "b.wav"], run_dir=tmp_path / "run", batch_size=1)
    assert again.ppl == result.ppl
    with pytest.raises(
        RunError,
        match=r"the source has changed since the run was started: .*(a track before|was added|missing|order has changed)",
    ):
        musicgen_eval.perplexity(["jazz/a.wav", "rock/a.wav", "b.wav"], run_dir=tmp_path / "run", batch_size=1)


def test_a_list_of_files_is_continued(songs: Path):
    result = musicgen_eval.generate((songs / "rock" / "a.wav", songs / "b.wav"), duration_s=0.1)
    assert [one.window.track for one in result.continuations] == ["rock/a.wav", "b.wav"]


def test_a_list_of_anything_but_paths_raises(songs: Path):
    with pytest.raises(AudioError, match="audio must be a path, a list of paths or a torch tensor, got list"):
        musicgen_eval.perplexity([songs / "b.wav", torch.zeros(1, 10)])  # type: ignore[list-item]


@pytest.mark.slow
def test_the_lightning_command_accepts_a_list_and_writes_it_to_config_yaml(songs: Path, tmp_path: Path):
    sources = [str(songs / "b.wav"), str(songs / "jazz")]
    config = tmp_path / "sources.yaml"
    config.write_text(yaml.safe_dump({"data": {"source": sources}}))
    given = {"file": ["--config", str(config)], "option": ["--data.source", json.dumps(sources)]}
    for name, options in given.items():
        run = tmp_path / name
        args = ["test", *options, "--model.checkpoint", "demo", "--trainer.accelerator", "cpu", "--run_dir", str(run)]
        assert lightning_main(args) == 0
        assert yaml.safe_load((run / "config.yaml").read_text())["data"]["source"] == sources
        summary = json.loads((run / "summary.json").read_text())
        assert summary["counts"]["tracks_ok"] == 2
