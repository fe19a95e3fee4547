"""Bad files of every kind: each gives either an error that names the file or the correct samples, without hanging."""

import io
import math
import os
import signal
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import musicgen_eval
from musicgen_eval.audio.decoding import MAX_SAMPLES_PER_BYTE
from musicgen_eval.audio.formats import mp3 as mpeg
from musicgen_eval.audio.formats import ogg
from musicgen_eval.audio.formats import pyav as av_decoder
from musicgen_eval.audio.reader import open_track, probe
from musicgen_eval.errors import AudioError
from musicgen_eval.files.printable import printable
from tests.support.bad_files import KINDS, RATE_HZ, BadFile, make_bad_files, music, write_av

pytestmark = pytest.mark.usefixtures("cheap_runs")

FileIO, open_path = io.FileIO, Path.open
TIMEOUT_S = 20.0  # per file; each takes milliseconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def bad_files(folder: Path) -> Iterator[list[BadFile]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_bad_files(folder)
    torch.set_num_threads(threads)


def run_with_timeout(seconds: float, function: Callable[[], Any]) -> Any:
    """Returns the result of a function, the exception that it raised, or a `TimeoutError`."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)  # a daemon, so that a hanging function does not block the exit
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else TimeoutError(f"no end within {seconds} s")


def read(path: Path) -> np.ndarray:
    """Returns (N, C) of a whole file, after checking slices at its own rate and reading its end at the model's rate."""
    track = open_track(path)
    rate_hz, channels, num_samples = track.info.sample_rate_hz, track.info.num_channels, track.num_samples
    assert num_samples <= path.stat().st_size * MAX_SAMPLES_PER_BYTE
    whole = track.read(0, num_samples, sample_rate_hz=rate_hz, channels=channels)
    for start in sorted({0, num_samples // 3, num_samples // 2, num_samples - 1}):
        num = min(700, num_samples - start)
        part = track.read(start, num, sample_rate_hz=rate_hz, channels=channels)
        torch.testing.assert_close(part, whole[:, start : start + num], rtol=0, atol=1e-6)
    num_resampled = track.num_samples_at(RATE_HZ)
    end = track.read(max(0, num_resampled - 900), min(900, num_resampled), sample_rate_hz=RATE_HZ, channels=1)
    assert end.isfinite().all()
    return whole.numpy().T


def find_fault(file: BadFile, outcome: Any) -> str | None:
    """Returns a description of an unexpected outcome, or None if the outcome is as expected."""
    if isinstance(outcome, AudioError):
        if file.expected == "right":
            return f"failed: {outcome}"
        if not str(outcome).startswith(printable(f"{file.path}: ")) or not str(outcome).isprintable():
            return f"an error that does not name the file in one line: {outcome!r}"
        return None
    if not isinstance(outcome, np.ndarray):
        return repr(outcome)
    if file.expected == "failure":
        return f"was read, {len(outcome)} samples"
    if file.num_samples is not None and len(outcome) != file.num_samples:
        return f"{len(outcome)} samples instead of {file.num_samples}"
    if file.samples is not None:
        np.testing.assert_allclose(outcome, file.samples, rtol=0, atol=file.tolerance, err_msg=str(file.path))
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_gives_an_error_that_names_it_or_correct_samples(kind: str, bad_files: list[BadFile]):
    files = [file for file in bad_files if file.kind == kind]
    outcomes = [run_with_timeout(TIMEOUT_S, lambda file=file: read(file.path)) for file in files]
    faults = {str(file.path): find_fault(file, outcome) for file, outcome in zip(files, outcomes, strict=True)}
    assert {path: fault for path, fault in faults.items() if fault is not None} == {}


def test_at_least_150_bad_files_are_made_reproducibly(bad_files: list[BadFile], folder: Path, tmp_path: Path):
    assert len(bad_files) >= 150
    again = make_bad_files(tmp_path / "again")
    for file, other in zip(bad_files, again, strict=True):
        assert file.path.relative_to(folder) == other.path.relative_to(tmp_path / "again")
        if file.path.is_file() and not file.path.is_symlink() and os.access(file.path, os.R_OK):
            assert file.path.read_bytes() == other.path.read_bytes()


def test_headers_that_declare_too_much_do_not_use_much_memory(bad_files: list[BadFile]):
    tracemalloc.start()
    try:
        for file in bad_files:
            if file.kind in ("huge length", "channels", "absurd rate", "wrong header"):
                run_with_timeout(TIMEOUT_S, lambda file=file: read(file.path))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 32 << 20


def test_impossible_lengths_are_refused_on_opening(bad_files: list[BadFile]):
    for file in bad_files:
        if file.kind == "huge length" and file.expected == "failure":
            with pytest.raises(AudioError):
                open_track(file.path)


@pytest.fixture(scope="module")
def evaluated(bad_files: list[BadFile], folder: Path) -> musicgen_eval.PerplexityResult:
    """Returns the result of one run over all files."""
    return musicgen_eval.perplexity(
        folder, "demo", context_s=1.0, target_s=2.0, max_failures=10**6, accelerator="cpu", batch_size=16
    )


@pytest.mark.slow
def test_a_run_over_all_bad_files_gives_a_number_or_a_reason_for_each(
    bad_files: list[BadFile], evaluated: musicgen_eval.PerplexityResult
):
    tracks = {track.path: track for track in evaluated.evaluation.tracks}
    assert set(tracks) == {str(file.path) for file in bad_files if file.is_track}
    assert len(tracks) == len(evaluated.evaluation.tracks)
    for file in bad_files:
        if not file.is_track:
            continue
        track = tracks[str(file.path)]
        if track.status == "failed":
            assert printable(str(file.path)) in printable(track.reason)
            assert track.num_windows == 0
            assert track.metrics.get("perplexity", {}) == {}
            less_than_a_frame = "shorter than one frame" in track.reason and file.num_samples in (1, 2, 639)
            assert file.expected != "right" or less_than_a_frame, track.reason
        else:
            assert track.status == "ok"
            assert file.expected != "failure", file.path
            info = probe(file.path)
            assert math.isclose(track.duration_s, info.num_samples * 50 // info.sample_rate_hz / 50, abs_tol=1e-9)
            assert file.num_samples in (None, info.num_samples)
            assert track.num_windows >= 1
            assert all(math.isfinite(value) for value in track.metrics["perplexity"].values())
    assert math.isfinite(evaluated.ppl)


@pytest.mark.slow
def test_every_failure_of_a_run_is_counted(bad_files: list[BadFile], evaluated: musicgen_eval.PerplexityResult):
    counts, tracks = evaluated.evaluation.counts, evaluated.evaluation.tracks
    assert counts["tracks"] == counts["tracks_ok"] + counts["tracks_failed"] == len(tracks)
    assert counts["tracks_failed"] == sum(track.status == "failed" for track in tracks)
    assert counts["tracks_failed"] >= sum(file.expected == "failure" and file.is_track for file in bad_files)


@pytest.mark.slow
def test_a_run_without_the_bad_files_gives_the_same_numbers(
    bad_files: list[BadFile], evaluated: musicgen_eval.PerplexityResult, tmp_path: Path
):
    ok = [track for track in evaluated.evaluation.tracks if track.status == "ok"]
    ce = {track.id: track.metrics["perplexity"]["ce"] for track in ok if track.id.startswith("whole/")}
    manifest = tmp_path / "whole.csv"
    rows = [f"{track.path},{track.id}" for track in ok if track.id.startswith("whole/")]
    manifest.write_text("\n".join(["path,id", *rows]))
    alone = musicgen_eval.perplexity(manifest, "demo", context_s=1.0, target_s=2.0, accelerator="cpu", batch_size=16)
    assert len(alone.evaluation.tracks) == len(ce) == sum(file.kind == "whole" for file in bad_files)
    for track in alone.evaluation.tracks:
        assert math.isclose(track.metrics["perplexity"]["ce"], ce[track.id], rel_tol=1e-4)


def test_missing_packets_in_an_unseekable_file_are_an_error(tmp_path: Path):
    samples = music(3 * RATE_HZ)
    write_av(tmp_path / "whole.mka", samples, codec="pcm_s16le", container="matroska")
    with (
        av.open(str(tmp_path / "whole.mka")) as whole,
        av.open(str(tmp_path / "gap.mka"), "w", format="matroska") as gap,
    ):
        stream = gap.add_stream_from_template(whole.streams.audio[0])
        for number, packet in enumerate(whole.demux(audio=0)):
            if packet.size and number not in (20, 21):
                packet.stream = stream
                gap.mux(packet)
    assert probe(tmp_path / "whole.mka").num_samples == len(samples)
    with pytest.raises(
        AudioError, match=r"gap\.mka: 0\.\d+ s of audio is missing from the Matroska .* file at \d\.\d+ s"
    ):
        probe(tmp_path / "gap.mka")


def test_a_forked_process_can_read_files_that_its_parent_has_open(tmp_path: Path):
    paths = [tmp_path / f"{number}.wv" for number in range(av_decoder.MAX_CACHED_READERS + 2)]
    for path in paths:
        write_av(path, music(), codec="wavpack", container="wv")
    tracks = [open_track(path) for path in paths]
    for track in tracks:
        track.read(0, 100, sample_rate_hz=RATE_HZ, channels=1)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # kills the process if it hangs
        for track in tracks:
            track.read(50, 100, sample_rate_hz=RATE_HZ, channels=1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_cached_readers_close_their_files(tmp_path: Path):
    def num_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    paths = [tmp_path / f"{number}.wv" for number in range(3 * av_decoder.MAX_CACHED_READERS)]
    for path in paths:
        write_av(path, music(), codec="wavpack", container="wv")
    before = num_open()
    for path in paths:
        open_track(path).read(0, 100, sample_rate_hz=RATE_HZ, channels=1)
    assert num_open() <= before + av_decoder.MAX_CACHED_READERS


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3"])
def test_a_damaged_file_is_scanned_once_and_again_after_a_change(
    name: str, bad_files: list[BadFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / name
    scan = {"ogg": ogg.check_ogg_pages, "mp3": mpeg.index_stream}[name[-3:]]
    source = {"ogg": "vorbis.ogg", "mp3": "tagged.mp3"}[name[-3:]]
    whole = next(file.path for file in bad_files if file.kind == "whole" and file.path.name == source).read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 7])
    opened = []
    monkeypatch.setattr(io, "FileIO", lambda *args, **kwargs: opened.append(args) or FileIO(*args, **kwargs))
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: opened.append(args) or open_path(*args, **kwargs))
    for _ in range(3):
        with pytest.raises(AudioError, match="truncated"):
            scan(path)  # type: ignore[operator]
    assert len(opened) <= 2  # once for the frames, once for the bytes after them
    path.write_bytes(whole)
    scan(path)  # type: ignore[operator]
