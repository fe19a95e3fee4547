"""Tests that tracks are opened once: the saved index, resumed runs, and tracks with a declared duration."""

import json
import pickle
import shutil
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.data import index_builder
from musicgen_eval.data import plan as plan_module
from musicgen_eval.data.index_builder import OpenOptions, declared_frames
from musicgen_eval.data.plan import Plan
from musicgen_eval.data.plan_builder import NOT_OPENED
from musicgen_eval.data.scoring_plan import plan_evaluation
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.data.track_index import load_index
from musicgen_eval.errors import AudioError, RunError
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.folder import RunFolder
from musicgen_eval.runs.recorder import RunRecorder
from musicgen_eval.runs.settings import RunSettings
from musicgen_eval.runs.window_dataset import WindowDataset
from tests.support.specs import codec_spec

SPEC = codec_spec()
DATA = Path(__file__).parent.parent / "data" / "audio"


def write_wav(path: Path, num_samples: int, sample_rate_hz: int = 32000) -> None:
    soundfile.write(path, np.random.default_rng(num_samples).normal(0, 0.1, num_samples), sample_rate_hz)


def plan(source: Path, options: OpenOptions | None = None, **given) -> Plan:
    settings = DataSettings(**{"source": str(source), "context_s": 0.4, "target_s": 0.6, "max_failures": 9, **given})
    return plan_evaluation(settings, SPEC, options)


def write_rows(folder: Path, *rows: dict) -> Path:
    path = folder / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def folder(tmp_path):
    """Four tracks, of which the third is not audio."""
    for row, name in enumerate("abd"):
        write_wav(tmp_path / f"{name}.wav", 32000 * (row + 1))
    (tmp_path / "c.wav").write_text("no audio")
    write_rows(tmp_path, *({"path": f"{name}.wav", "text": f"song {name}"} for name in "abcd"))
    return tmp_path


@pytest.fixture
def opened(monkeypatch):
    """List to which the name of every file is appended when it is opened."""
    names = []

    probe = index_builder._probe
    monkeypatch.setattr(index_builder, "_probe", lambda path: names.append(path.name) or probe(path))
    return names


def test_tracks_with_a_declared_duration_are_not_opened_before_they_are_read(tmp_path, opened):
    manifest = write_rows(
        tmp_path,
        {"path": "gone.wav", "duration_s": 2.0},
        {"path": "gone.wav", "id": "part", "duration_s": 2.0, "start_s": 0.5, "end_s": 1.5},
        {"path": "gone.wav", "id": "short", "duration_s": 0.019},
        {"path": "gone.wav", "id": "under the minimum", "duration_s": 0.3},
    )
    planned = plan(manifest, min_duration_s=0.4)
    assert opened == []
    assert planned.status == ["ok", "ok", "skipped", "skipped"]
    assert plan(manifest).reasons == {
        2: f"{tmp_path}/gone.wav: 0.019 s is shorter than one frame (0.02 s); remove the track or set data.min_duration_s"
    }
    assert planned.num_frames.tolist() == [100, 50, 0, 0]
    assert planned.resamplers == {NOT_OPENED: 2}
    item = WindowDataset(planned, SPEC)[0]
    assert item.audio is None
    assert item.failure == f"{tmp_path}/gone.wav: no such file"


@pytest.mark.parametrize(("rate_hz", "num_samples"), [(32000, 31999), (32000, 32000), (44100, 50000), (22050, 44101)])
def test_a_declared_duration_does_not_change_the_audio_that_is_read(rate_hz, num_samples, tmp_path):
    write_wav(tmp_path / "a.wav", num_samples, rate_hz)
    duration_s = num_samples / rate_hz
    opened_first = plan(write_rows(tmp_path, {"path": "a.wav", "start_s": 0.1}))
    for written in (duration_s, round(duration_s, 6), floor(duration_s * 1000) / 1000):
        declared = plan(write_rows(tmp_path, {"path": "a.wav", "start_s": 0.1, "duration_s": written}))
        assert declared.num_frames.tolist() == opened_first.num_frames.tolist()
        for row in range(len(opened_first.windows)):
            before, after = WindowDataset(opened_first, SPEC)[row], WindowDataset(declared, SPEC)[row]
            assert after.failure is None
            assert (before.audio == after.audio).all()


@given(
    st.integers(160, 10**8),
    st.sampled_from([8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 192000]),
)
def test_exact_and_rounded_down_durations_give_the_frames_of_the_file(num_samples, rate_hz):
    expected = num_samples * 50 // rate_hz
    exact = Fraction(num_samples, rate_hz)
    milliseconds = floor(exact * 1000) / 1000
    written = [num_samples / rate_hz, round(num_samples / rate_hz, 6), milliseconds]
    assert declared_frames(np.array(written), 50).tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("num_samples", "declared_s", "lasts", "frames", "planned"),
    [
        (31990, 1.0, "0.9996875", 49, 50),  # rounded up to milliseconds, which adds a frame
        (32000, 0.999, "1", 50, 49),
        (32000, 3.0, "1", 50, 150),
        (96000, 1.0, "3", 150, 50),
    ],
)
def test_a_wrong_declared_duration_fails_and_the_message_gives_both_lengths(
    num_samples, declared_s, lasts, frames, planned, tmp_path
):
    write_wav(tmp_path / "a.wav", num_samples)
    item = WindowDataset(plan(write_rows(tmp_path, {"path": "a.wav", "duration_s": declared_s})), SPEC)[0]
    assert item.audio is None
    assert item.failure == (
        f"{tmp_path}/a.wav: the file lasts {lasts} s ({frames} frames of the track), but duration_s is {declared_s:g} "
        f"({planned} frames); set duration_s to the length of the file, rounded down, or remove duration_s"
    )


def test_a_file_that_changes_after_planning_fails(folder):
    planned = plan(folder / "m.jsonl")
    kept = planned.open_track(0)
    assert planned.open_track(0) is kept
    write_wav(folder / "a.wav", 16000)
    with pytest.raises(
        AudioError,
        match=r"a\.wav: the file has changed since the run was planned: expected 64044 bytes, got 32044 bytes",
    ):
        planned.open_track(0)
    write_wav(folder / "b.wav", 64000, 16000)  # of the same size
    with pytest.raises(
        AudioError, match=r"b\.wav: .* changed .*64000 samples at 32000 Hz, .*64000 samples at 16000 Hz"
    ):
        planned.open_track(1)
    (folder / "d.wav").unlink()
    with pytest.raises(AudioError, match=r"d\.wav: no such file"):
        planned.open_track(3)


def test_a_file_that_changes_after_it_was_read_fails_if_its_duration_is_declared(tmp_path):
    write_wav(tmp_path / "a.wav", 32000)
    planned = plan(write_rows(tmp_path, {"path": "a.wav", "duration_s": 1.0}))
    planned.open_track(0)
    write_wav(tmp_path / "a.wav", 32001)
    with pytest.raises(AudioError, match="changed since the run was planned"):
        planned.open_track(0)


def test_a_file_whose_length_requires_decoding_is_not_decoded_again(tmp_path, monkeypatch):
    pytest.importorskip("av")
    shutil.copy(DATA / "aac.m4a", tmp_path / "a.m4a")
    planned = plan(tmp_path / "a.m4a")
    monkeypatch.setattr(index_builder, "probe", lambda path: pytest.fail("the whole file was decoded again"))
    track = planned.open_track(0)
    assert track.read(0, 640, sample_rate_hz=32000, channels=1).shape == (1, 640)


def test_a_file_shared_by_many_tracks_is_probed_once(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", 32000)
    probed = []
    probe = index_builder.probe
    monkeypatch.setattr(index_builder, "probe", lambda path: probed.append(path) or probe(path))
    monkeypatch.setattr(index_builder, "FILES_AT_ONCE", 1)
    rows = ({"path": "a.wav", "id": str(row), "start_s": row / 10, "end_s": row / 10 + 0.5} for row in range(6))
    assert plan(write_rows(tmp_path, *rows)).num_frames.tolist() == [25] * 6
    assert len(probed) == 1


def test_the_number_of_cached_tracks_is_limited(folder, monkeypatch):
    monkeypatch.setattr(plan_module, "TRACKS_KEPT", 2)
    planned = plan(folder / "m.jsonl")
    for row in (0, 1, 3, 0):
        assert planned.open_track(row).num_frames(50) == planned.num_frames[row]
        assert len(planned._opened) <= 2


def columns(planned: Plan) -> list:
    windows = planned.windows
    return [
        planned.num_frames.tolist(),
        list(planned.status),
        planned.reasons,
        planned.resamplers,
        planned.source_digest,
        windows.track.tolist(),
        windows.start_frame.tolist(),
        windows.target_frames.tolist(),
    ]


def test_a_resumed_run_has_the_same_plan_and_opens_no_file(folder, opened):
    options = OpenOptions(index_path=folder / "journal" / "index.npz")
    first = plan(folder / "m.jsonl", options)
    assert sorted(opened) == ["a.wav", "b.wav", "c.wav", "d.wav"]
    opened.clear()
    (folder / "a.wav").unlink()  # fails later, when it is read
    again = plan(folder / "m.jsonl", options)
    assert opened == []
    assert columns(again) == columns(first)
    assert again.index.info(1, Path("b")) == first.index.info(1, Path("b"))
    assert [path.name for path in (folder / "journal").iterdir()] == ["index.npz"]


def test_failed_tracks_are_opened_again_only_with_retry_failures(folder, opened):
    options = OpenOptions(index_path=folder / "index.npz")
    failed = plan(folder / "m.jsonl", options)
    write_wav(folder / "c.wav", 32000)
    assert columns(plan(folder / "m.jsonl", options)) == columns(failed)
    opened.clear()
    assert plan(folder / "m.jsonl", replace(options, retried=frozenset())).status == ["ok"] * 4
    assert opened == ["c.wav"]
    assert plan(folder / "m.jsonl", options).status == ["ok"] * 4


ROWS = [{"path": f"{name}.wav", "text": f"song {name}"} for name in "abcd"]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (ROWS[:3], "the last track, after 'c.wav', is missing (row 4)"),
        ([*ROWS, {"path": "a.wav", "id": "e"}], "track 'e' was added (row 5)"),
        ([{"path": "a.wav", "id": "e"}, *ROWS], "track 'e' was added (row 1)"),
        (ROWS[1:], "a track before 'b.wav' is missing, or the order has changed (row 1)"),
        ([*ROWS[:2], ROWS[2] | {"text": "noise"}, ROWS[3]], "track 'c.wav' has a different text (row 3)"),
        (
            [ROWS[0], ROWS[1] | {"end_s": 1.0}, *ROWS[2:]],
            "track 'b.wav' has a different start_s, end_s or duration_s (row 2)",
        ),
        (
            [ROWS[0] | {"duration_s": 1.0}, *ROWS[1:]],
            "track 'a.wav' has a different start_s, end_s or duration_s (row 1)",
        ),
    ],
)
def test_a_changed_source_raises_and_names_the_first_track_that_differs(rows, what, folder):
    options = OpenOptions(index_path=folder / "index.npz")
    plan(folder / "m.jsonl", options)
    with pytest.raises(RunError) as error:
        plan(write_rows(folder, *rows), options)
    assert f"the source has changed since the run was started: {what}" in str(error.value)


def test_a_changed_file_size_raises_and_names_the_file(folder):
    options = OpenOptions(index_path=folder / "index.npz")
    plan(folder / "m.jsonl", options)
    write_wav(folder / "b.wav", 1000)
    with pytest.raises(RunError, match=r"b\.wav: the file has 2044 bytes but had 128044 when the run started"):
        plan(folder / "m.jsonl", options)


@pytest.mark.parametrize("content", [b"", b"no index", b"PK\x03\x04 and no more"])
def test_a_damaged_index_raises_with_a_remedy(content, folder):
    (folder / "index.npz").write_bytes(content)
    with pytest.raises(RunError, match=r"index\.npz: the file is not a track index, .*delete the file"):
        plan(folder / "m.jsonl", OpenOptions(index_path=folder / "index.npz"))


def test_an_index_with_pickled_objects_raises(folder):
    with (folder / "index.npz").open("wb") as file:
        np.savez(file, num_tracks=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RunError, match="not a track index"):
        load_index(folder / "index.npz")


def test_an_interrupted_start_continues_with_the_pending_tracks(folder, opened, monkeypatch):
    options = OpenOptions(index_path=folder / "index.npz")
    monkeypatch.setattr(index_builder, "ROWS_AT_ONCE", 2)
    whole = index_builder.TrackIndex.note_failed

    def interrupt(self, row, reason):
        raise KeyboardInterrupt

    monkeypatch.setattr(index_builder.TrackIndex, "note_failed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan(folder / "m.jsonl", options)
    monkeypatch.setattr(index_builder.TrackIndex, "note_failed", whole)
    opened.clear()
    again = plan(folder / "m.jsonl", options)
    assert sorted(opened) == ["c.wav", "d.wav"]
    assert columns(again) == columns(plan(folder / "m.jsonl"))


def test_a_long_start_saves_the_index_repeatedly(folder, monkeypatch):
    saved = []
    monkeypatch.setattr(index_builder, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(index_builder, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(
        index_builder, "save_index", lambda path, index, source: saved.append(len(index.rows("pending")))
    )
    plan(folder / "m.jsonl", OpenOptions(index_path=folder / "index.npz"))
    assert saved == [3, 2, 1, 0, 0]


def test_the_digest_covers_the_source_and_not_the_files(folder):
    digests = {plan(folder / "m.jsonl").source_digest}
    assert digests == {plan(folder / "m.jsonl").source_digest}
    digests.add(plan(folder / "m.jsonl", limit=2).source_digest)
    digests.add(plan(write_rows(folder, *ROWS[:3], ROWS[3] | {"text": "noise"})).source_digest)
    digests.add(plan(write_rows(folder, *ROWS[:3], ROWS[3] | {"end_s": 1.0})).source_digest)
    digests.add(plan(write_rows(folder, *ROWS[:3], ROWS[3] | {"id": "e"})).source_digest)
    write_wav(folder / "d.wav", 1000)
    # properties of files are recorded in the index, not in the digest
    assert plan(write_rows(folder, *ROWS)).source_digest in digests
    assert len(digests) == 5
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)


def test_a_pickled_plan_is_complete_and_small(folder):
    planned = plan(folder / "m.jsonl")
    planned.open_track(0)
    received = pickle.loads(pickle.dumps(planned))
    assert columns(received) == columns(planned)
    assert list(received.tracks) == list(planned.tracks)
    assert list(received.other_texts) == list(planned.other_texts)
    assert not received._opened
    assert received.open_track(1).num_samples == 64000
    num_rows = 20_000
    many = plan(write_rows(folder, *({"path": f"{row:06}.wav", "duration_s": 1.0} for row in range(num_rows))))
    sent = pickle.dumps(many)
    assert len(sent) < 40 * num_rows
    received = pickle.loads(sent)
    assert columns(received) == columns(many)
    for column in vars(received.windows).values():
        assert column.dtype == np.int64


def test_the_data_module_keeps_the_index_in_the_folder_of_the_recorder(folder, opened, capsys):
    def set_up(recorder: RunRecorder | None = None) -> Plan:
        data = WindowDataModule(str(folder / "m.jsonl"), max_failures=1)
        data.trainer = SimpleNamespace(
            world_size=1,
            is_global_zero=True,
            lightning_module=SimpleNamespace(spec=SPEC, prepare=lambda task: None),
            progress_bar_callback=None,
            callbacks=[recorder] if recorder is not None else [],
        )
        data.setup("test")
        assert data.plan is not None
        return data.plan

    assert set_up().status == ["ok", "ok", "failed", "ok"]
    assert len(opened) == 4
    run_folder = RunFolder(folder)
    assert not run_folder.index.exists()
    run_folder.journal.mkdir()
    set_up(RunRecorder(run_folder, command="test", config_yaml=""))
    opened.clear()
    set_up(RunRecorder(run_folder, command="test", config_yaml=""))
    assert opened == []
    set_up(RunRecorder(run_folder, command="test", config_yaml="", settings=RunSettings(retry_failures=True)))
    assert opened == ["c.wav"]
    assert capsys.readouterr().err == ""
