"""Opening tracks once: what is kept of them, what a run that goes on finds, and tracks whose durations are given."""

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

from musicgen_eval.data import index_builder as track_opening
from musicgen_eval.data import plan as plan_module
from musicgen_eval.data.index_builder import Opening, declared_frames
from musicgen_eval.data.plan import Plan
from musicgen_eval.data.planning import NOT_OPENED, DataSettings, plan_evaluation
from musicgen_eval.data.track_index import load_index
from musicgen_eval.errors import AudioError, RunError
from musicgen_eval.records import CodecSpec
from musicgen_eval.runs.datamodule import WindowDataModule, WindowDataset
from musicgen_eval.runs.folder import RunFolder
from musicgen_eval.runs.recorder import RunRecorder

SPEC = CodecSpec(32000, 50, 640, 4, 2048, 1, (0, 1, 2, 3), 1500)
DATA = Path(__file__).parent.parent / "data" / "audio"


def write_wav(path: Path, num_samples: int, sample_rate_hz: int = 32000) -> None:
    soundfile.write(path, np.random.default_rng(num_samples).normal(0, 0.1, num_samples), sample_rate_hz)


def plan(source: Path, opening: Opening | None = None, **given) -> Plan:
    settings = DataSettings(**{"source": str(source), "context_s": 0.4, "target_s": 0.6, "max_failures": 9, **given})
    return plan_evaluation(settings, SPEC, opening)


def write_rows(folder: Path, *rows: dict) -> Path:
    path = folder / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def folder(tmp_path):
    """Four tracks, the third of which is no audio."""
    for row, name in enumerate("abd"):
        write_wav(tmp_path / f"{name}.wav", 32000 * (row + 1))
    (tmp_path / "c.wav").write_text("no audio")
    write_rows(tmp_path, *({"path": f"{name}.wav", "text": f"song {name}"} for name in "abcd"))
    return tmp_path


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened from here on."""
    names = []

    look_into = track_opening._probe
    monkeypatch.setattr(track_opening, "_probe", lambda path: names.append(path.name) or look_into(path))
    return names


def test_tracks_whose_durations_are_given_are_not_opened_before_they_are_read(tmp_path, opened):
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
        2: f"{tmp_path}/gone.wav: 0.019 s is shorter than one frame (0.02 s); remove it or set min_duration_s"
    }
    assert planned.num_frames.tolist() == [100, 50, 0, 0]
    assert planned.resamplers == {NOT_OPENED: 2}
    item = WindowDataset(planned, SPEC)[0]
    assert item.audio is None
    assert item.failure == f"{tmp_path}/gone.wav: no such file"


@pytest.mark.parametrize(("rate_hz", "num_samples"), [(32000, 31999), (32000, 32000), (44100, 50000), (22050, 44101)])
def test_a_given_duration_changes_nothing_in_what_is_read(rate_hz, num_samples, tmp_path):
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
def test_durations_that_are_exact_or_rounded_down_give_the_frames_of_the_file(num_samples, rate_hz):
    expected = num_samples * 50 // rate_hz
    exact = Fraction(num_samples, rate_hz)
    milliseconds = floor(exact * 1000) / 1000
    written = [num_samples / rate_hz, round(num_samples / rate_hz, 6), milliseconds]
    assert declared_frames(np.array(written), 50).tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("num_samples", "declared_s", "lasts", "frames", "planned"),
    [
        (31990, 1.0, "0.9996875", 49, 50),  # rounded to milliseconds, up: a frame that is not there
        (32000, 0.999, "1", 50, 49),
        (32000, 3.0, "1", 50, 150),
        (96000, 1.0, "3", 150, 50),
    ],
)
def test_a_file_that_is_not_as_long_as_was_said_is_a_failure_that_names_both(
    num_samples, declared_s, lasts, frames, planned, tmp_path
):
    write_wav(tmp_path / "a.wav", num_samples)
    item = WindowDataset(plan(write_rows(tmp_path, {"path": "a.wav", "duration_s": declared_s})), SPEC)[0]
    assert item.audio is None
    assert item.failure == (
        f"{tmp_path}/a.wav: lasts {lasts} s, which gives the track {frames} frames, and {planned} by its duration_s of "
        f"{declared_s:g}; give duration_s exactly or rounded down, or leave it out"
    )


def test_a_file_that_changes_after_planning_is_a_failure(folder):
    planned = plan(folder / "m.jsonl")
    kept = planned.open_track(0)
    assert planned.open_track(0) is kept
    write_wav(folder / "a.wav", 16000)
    with pytest.raises(AudioError, match=r"a\.wav: changed since the run was planned: 32044 bytes, and 64044 then"):
        planned.open_track(0)
    write_wav(folder / "b.wav", 64000, 16000)  # of the same size
    with pytest.raises(AudioError, match=r"b\.wav: changed .*64000 samples at 16000 Hz, .*64000 samples at 32000 Hz"):
        planned.open_track(1)
    (folder / "d.wav").unlink()
    with pytest.raises(AudioError, match=r"d\.wav: no such file"):
        planned.open_track(3)


def test_a_file_that_changes_once_it_was_read_is_a_failure_also_where_its_duration_was_given(tmp_path):
    write_wav(tmp_path / "a.wav", 32000)
    planned = plan(write_rows(tmp_path, {"path": "a.wav", "duration_s": 1.0}))
    planned.open_track(0)
    write_wav(tmp_path / "a.wav", 32001)
    with pytest.raises(AudioError, match="changed since the run was planned"):
        planned.open_track(0)


def test_what_only_decoding_would_tell_is_not_asked_again(tmp_path, monkeypatch):
    pytest.importorskip("av")
    shutil.copy(DATA / "aac.m4a", tmp_path / "a.m4a")
    planned = plan(tmp_path / "a.m4a")
    monkeypatch.setattr(track_opening, "probe", lambda path: pytest.fail("decoded whole once more"))
    track = planned.open_track(0)
    assert track.read(0, 640, sample_rate_hz=32000, channels=1).shape == (1, 640)


def test_a_file_of_many_tracks_is_looked_into_once(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", 32000)
    probed = []
    probe = track_opening.probe
    monkeypatch.setattr(track_opening, "probe", lambda path: probed.append(path) or probe(path))
    monkeypatch.setattr(track_opening, "FILES_AT_ONCE", 1)
    rows = ({"path": "a.wav", "id": str(row), "start_s": row / 10, "end_s": row / 10 + 0.5} for row in range(6))
    assert plan(write_rows(tmp_path, *rows)).num_frames.tolist() == [25] * 6
    assert len(probed) == 1


def test_few_tracks_are_remembered(folder, monkeypatch):
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


def test_a_run_that_goes_on_finds_the_same_plan_and_opens_nothing(folder, opened):
    opening = Opening(index_path=folder / "journal" / "index.npz")
    first = plan(folder / "m.jsonl", opening)
    assert sorted(opened) == ["a.wav", "b.wav", "c.wav", "d.wav"]
    opened.clear()
    (folder / "a.wav").unlink()  # will fail when it is read
    again = plan(folder / "m.jsonl", opening)
    assert opened == []
    assert columns(again) == columns(first)
    assert again.index.info(1, Path("b")) == first.index.info(1, Path("b"))
    assert [path.name for path in (folder / "journal").iterdir()] == ["index.npz"]


def test_failures_stay_until_they_are_tried_again(folder, opened):
    opening = Opening(index_path=folder / "index.npz")
    failed = plan(folder / "m.jsonl", opening)
    write_wav(folder / "c.wav", 32000)
    assert columns(plan(folder / "m.jsonl", opening)) == columns(failed)
    opened.clear()
    assert plan(folder / "m.jsonl", replace(opening, retry_failures=True)).status == ["ok"] * 4
    assert opened == ["c.wav"]
    assert plan(folder / "m.jsonl", opening).status == ["ok"] * 4


ROWS = [{"path": f"{name}.wav", "text": f"song {name}"} for name in "abcd"]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (ROWS[:3], "1 tracks behind 'c.wav' are gone (row 4)"),
        ([*ROWS, {"path": "a.wav", "id": "e"}], "track 'e' was added (row 5)"),
        ([{"path": "a.wav", "id": "e"}, *ROWS], "track 'e' was added (row 1)"),
        (ROWS[1:], "a track that stood before 'b.wav' is gone, or the order is another (row 1)"),
        ([*ROWS[:2], ROWS[2] | {"text": "noise"}, ROWS[3]], "track 'c.wav' has another text (row 3)"),
        (
            [ROWS[0], ROWS[1] | {"end_s": 1.0}, *ROWS[2:]],
            "track 'b.wav' has another part of its file, or another duration_s (row 2)",
        ),
        (
            [ROWS[0] | {"duration_s": 1.0}, *ROWS[1:]],
            "track 'a.wav' has another part of its file, or another duration_s (row 1)",
        ),
    ],
)
def test_another_source_is_refused_by_the_first_track_that_differs(rows, what, folder):
    opening = Opening(index_path=folder / "index.npz")
    plan(folder / "m.jsonl", opening)
    with pytest.raises(RunError) as error:
        plan(write_rows(folder, *rows), opening)
    assert f"the source is not what this run began with: {what}" in str(error.value)


def test_a_file_of_another_size_is_refused_by_name(folder):
    opening = Opening(index_path=folder / "index.npz")
    plan(folder / "m.jsonl", opening)
    write_wav(folder / "b.wav", 1000)
    with pytest.raises(RunError, match=r"b\.wav: 2044 bytes, and 128044 when this run began"):
        plan(folder / "m.jsonl", opening)


@pytest.mark.parametrize("content", [b"", b"no index", b"PK\x03\x04 and no more"])
def test_a_damaged_index_says_what_to_do(content, folder):
    (folder / "index.npz").write_bytes(content)
    with pytest.raises(RunError, match=r"index\.npz: not an index of tracks, .*delete it"):
        plan(folder / "m.jsonl", Opening(index_path=folder / "index.npz"))


def test_an_index_that_holds_objects_is_refused(folder):
    with (folder / "index.npz").open("wb") as file:
        np.savez(file, num_tracks=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RunError, match="not an index of tracks"):
        load_index(folder / "index.npz")


def test_a_start_that_is_interrupted_goes_on_where_it_was(folder, opened, monkeypatch):
    opening = Opening(index_path=folder / "index.npz")
    monkeypatch.setattr(track_opening, "ROWS_AT_ONCE", 2)
    whole = track_opening.TrackIndex.note_failed

    def interrupt(self, row, reason):
        raise KeyboardInterrupt

    monkeypatch.setattr(track_opening.TrackIndex, "note_failed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan(folder / "m.jsonl", opening)
    monkeypatch.setattr(track_opening.TrackIndex, "note_failed", whole)
    opened.clear()
    again = plan(folder / "m.jsonl", opening)
    assert sorted(opened) == ["c.wav", "d.wav"]
    assert columns(again) == columns(plan(folder / "m.jsonl"))


def test_a_long_start_is_kept_as_it_goes(folder, monkeypatch):
    saved = []
    monkeypatch.setattr(track_opening, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(track_opening, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(
        track_opening, "save_index", lambda path, index, source: saved.append(len(index.rows("pending")))
    )
    plan(folder / "m.jsonl", Opening(index_path=folder / "index.npz"))
    assert saved == [3, 2, 1, 0, 0]


def test_the_digest_is_of_what_is_measured(folder):
    digests = {plan(folder / "m.jsonl").source_digest}
    assert digests == {plan(folder / "m.jsonl").source_digest}
    digests.add(plan(folder / "m.jsonl", limit=2).source_digest)
    digests.add(plan(write_rows(folder, *ROWS[:3], ROWS[3] | {"text": "noise"})).source_digest)
    digests.add(plan(write_rows(folder, *ROWS[:3], ROWS[3] | {"end_s": 1.0})).source_digest)
    digests.add(plan(write_rows(folder, *ROWS[:3], ROWS[3] | {"id": "e"})).source_digest)
    write_wav(folder / "d.wav", 1000)
    assert plan(write_rows(folder, *ROWS)).source_digest in digests  # what files hold is the index's to know
    assert len(digests) == 5
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)


def test_a_plan_travels_whole_and_light(folder):
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
    set_up(RunRecorder(run_folder, command="test", config_yaml="", retry_failures=True))
    assert opened == ["c.wav"]
    assert capsys.readouterr().err == ""
