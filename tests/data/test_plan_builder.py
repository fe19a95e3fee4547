from math import isfinite

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.data.columns import Strings, Texts
from musicgen_eval.data.continuation_plan import plan_continuation
from musicgen_eval.data.plan import OtherTexts
from musicgen_eval.data.plan_builder import refuse_failures
from musicgen_eval.data.scoring_plan import plan_evaluation, settle_windows
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.data.windows import plan_windows
from musicgen_eval.errors import RunError, WindowError
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.records import Failure
from tests.support.specs import codec_spec

SPEC = codec_spec()


def write_wav(path, num_samples: int, sample_rate_hz: int = 32000) -> None:
    noise = np.random.default_rng(num_samples).normal(0, 0.1, num_samples)
    soundfile.write(path, noise, sample_rate_hz)


@pytest.fixture
def folder(tmp_path):
    """Six tracks: long, 44.1 kHz, shorter than a frame, short, not audio, and one sample short of a second."""
    write_wav(tmp_path / "a_long.wav", 32000 * 2)
    write_wav(tmp_path / "b_44100.wav", 44100, 44100)
    write_wav(tmp_path / "c_tiny.wav", 639)
    write_wav(tmp_path / "d_short.wav", 6400)
    (tmp_path / "e_text.wav").write_text("no audio at all")
    write_wav(tmp_path / "f_ragged.wav", 32000 - 1)
    (tmp_path / "notes.txt").write_text("not a track")
    return tmp_path


def settings(folder, **given) -> DataSettings:
    return DataSettings(**{"source": str(folder), "context_s": 0.4, "target_s": 0.6, "max_failures": 6, **given})


def test_every_track_gets_a_status_a_reason_and_whole_frames(folder):
    plan = plan_evaluation(settings(folder), SPEC)
    assert plan.tracks.ids == ["a_long.wav", "b_44100.wav", "c_tiny.wav", "d_short.wav", "e_text.wav", "f_ragged.wav"]
    assert plan.status == ["ok", "ok", "failed", "ok", "failed", "ok"]
    assert plan.num_frames.tolist() == [100, 50, 0, 10, 0, 49]
    assert set(plan.reasons) == {2, 4}
    assert plan.reasons[2].endswith(
        "c_tiny.wav: 0.01997 s is shorter than one frame (0.02 s); remove the track or set data.min_duration_s"
    )
    assert "e_text.wav" in plan.reasons[4]
    assert [failure.track for failure in plan.failures] == ["c_tiny.wav", "e_text.wav"]
    assert plan.status.rows("ok").tolist() == [0, 1, 3, 5]
    assert (plan.num_in_source, plan.ignored_files) == (6, 1)
    assert (plan.context_frames, plan.target_frames) == (20, 30)


def test_windows_cover_every_frame_of_the_measured_tracks(folder):
    plan = plan_evaluation(settings(folder), SPEC)
    scored = [0] * len(plan.tracks)
    for row in range(len(plan.windows)):
        scored[int(plan.windows.track[row])] += int(plan.windows.target_frames[row])
    assert scored == plan.num_frames.tolist()
    lengths = plan.windows.num_frames.tolist()
    assert lengths == sorted(lengths)


def test_tracks_shorter_than_the_minimum_are_skipped_and_do_not_fail(folder):
    plan = plan_evaluation(settings(folder, min_duration_s=0.5, max_failures=1), SPEC)
    assert plan.status == ["ok", "ok", "skipped", "skipped", "failed", "ok"]
    assert plan.reasons[3] == "0.2 s is shorter than data.min_duration_s=0.5"
    assert plan.num_frames.tolist() == [100, 50, 0, 0, 0, 49]


def test_a_track_without_a_full_context_is_too_short_and_does_not_fail(folder):
    plan = plan_evaluation(settings(folder, head="skip", context_s=1.0, target_s=1.0), SPEC)
    assert plan.status == ["ok", "too_short", "failed", "too_short", "failed", "too_short"]
    assert plan.reasons[1] == "1 s is not longer than the context of 1 s, and data.head is skip"
    assert len(plan.windows) == 1
    assert (plan.windows.context_frames[0], plan.windows.target_frames[0]) == (50, 50)


def test_a_limit_selects_the_first_tracks_and_records_the_number_in_the_source(folder):
    plan = plan_evaluation(settings(folder, limit=2, max_failures=0), SPEC)
    assert plan.tracks.ids == ["a_long.wav", "b_44100.wav"]
    assert len(plan.tracks) == len(plan.status) == len(plan.other_texts) == 2
    assert plan.num_in_source == 6
    assert [str(track.path) for track in plan.tracks] == [str(folder / name) for name in plan.tracks.ids]
    assert len(plan_evaluation(settings(folder, limit=100), SPEC).tracks) == 6


def test_resamplers_are_counted_over_the_measured_tracks(folder):
    plan = plan_evaluation(settings(folder), SPEC)
    assert sum(plan.resamplers.values()) == 4
    assert sorted(plan.resamplers.values()) == [1, 3]


def test_more_failures_than_allowed_raise_with_the_reasons(folder):
    with pytest.raises(RunError) as error:
        plan_evaluation(settings(folder, max_failures=1), SPEC)
    message = str(error.value)
    assert message.startswith(
        "2 tracks failed, but data.max_failures is 1; set data.max_failures to 2 to record the failures and continue:"
    )
    assert "c_tiny.wav: 0.01997 s is shorter" in message
    assert "e_text.wav" in message


def test_a_plan_without_windows_raises_with_the_status_of_the_tracks(folder):
    with pytest.raises(RunError, match=r"nothing to score.*1 track failed, 5 tracks skipped; first reason: "):
        plan_evaluation(settings(folder, min_duration_s=10.0), SPEC)


def test_other_texts_come_from_the_texts_of_a_manifest(tmp_path):
    rows = ["path,text"]
    for name, text in (("a", "EDM"), ("b", ""), ("c", "EDM"), ("d", "jazz")):
        write_wav(tmp_path / f"{name}.wav", 3200)
        rows.append(f"{name}.wav,{text}")
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    plan = plan_evaluation(settings(tmp_path / "list.csv"), SPEC)
    assert plan.other_texts == ["jazz", "EDM", "jazz", "EDM"]
    alike = plan_evaluation(settings(tmp_path / "list.csv", limit=3), SPEC)
    assert alike.other_texts == [None, "EDM", None]


@given(st.lists(st.sampled_from([None, "", "a", "b", "c"]), max_size=12))
def test_other_texts_equal_brute_force(texts):
    expected = []
    for row, own in enumerate(texts):
        following = [texts[(row + step) % len(texts)] for step in range(1, len(texts))]
        expected.append(next((text for text in following if text and text != own), None))
    assert list(OtherTexts(texts)) == expected
    assert list(OtherTexts(Texts(Strings.of(text or "" for text in texts)))) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"max_failures": -1}, "max_failures must be at least 0, got -1"),
        ({"min_duration_s": -0.5}, "min_duration_s must be at least 0, got -0.5"),
        ({"min_duration_s": float("nan")}, "min_duration_s must be a finite number, got nan"),
    ],
)
def test_invalid_settings_raise_before_anything_is_opened(given, message):
    with pytest.raises(RunError, match=message):
        plan_evaluation(settings("/nowhere/at/all", **given), SPEC)


def test_context_and_target_default_to_half_of_the_limit():
    assert settle_windows(DataSettings("x"), SPEC) == (750, 750)
    assert settle_windows(DataSettings("x", context_s=0.0, target_s=30.0), SPEC) == (0, 1500)
    assert settle_windows(DataSettings("x", context_s=1.0), SPEC) == (50, 750)


def test_windows_over_the_limit_or_not_in_whole_frames_raise():
    with pytest.raises(WindowError, match="exceeds the checkpoint's limit of 1500"):
        settle_windows(DataSettings("x", target_s=20.0), SPEC)
    assert settle_windows(DataSettings("x", target_s=20.0, allow_beyond_limit=True), SPEC) == (750, 1000)
    with pytest.raises(WindowError, match=r"context_s=0\.03 s is 1\.5 frames"):
        settle_windows(DataSettings("x", context_s=0.03), SPEC)
    with pytest.raises(WindowError, match="target at least 1"):
        settle_windows(DataSettings("x", target_s=1e-9), SPEC)


@given(
    st.none() | st.floats() | st.integers(-10, 3000).map(lambda frames: frames / 50),
    st.none() | st.floats() | st.integers(-10, 3000).map(lambda frames: frames / 50),
    st.sampled_from(["score", "skip"]),
    st.booleans(),
    st.lists(st.integers(0, 10_000), min_size=1, max_size=4),
)
def test_any_context_and_target_raise_or_give_windows_within_the_limit(context_s, target_s, head, beyond, lengths):
    try:
        given = DataSettings("x", context_s=context_s, target_s=target_s, head=head, allow_beyond_limit=beyond)
        context, target = settle_windows(given, SPEC)
    except WindowError:
        return
    except RunError:
        is_finite = all(seconds is None or isfinite(seconds) for seconds in (context_s, target_s))
        in_range = (context_s is None or context_s >= 0) and (target_s is None or target_s > 0)
        assert not (is_finite and in_range)
        return
    windows = plan_windows(lengths, context, target, head)
    assert (windows.num_frames <= (10_000 if beyond else SPEC.max_frames)).all()
    assert (windows.target_frames >= 1).all()
    scored = np.bincount(windows.track, windows.target_frames, len(lengths))
    assert scored.tolist() == [max(0, length - context) if head == "skip" else length for length in lengths]


def test_a_track_that_failed_twice_counts_once():
    twice = [Failure("a", "a: broken"), Failure("a", "a: still broken")]
    refuse_failures(twice, 1)
    with pytest.raises(RunError, match=r"1 track failed, but data\.max_failures is 0"):
        refuse_failures(twice, 0)


def test_at_most_five_failures_are_listed():
    with pytest.raises(RunError) as error:
        refuse_failures([Failure(f"track{index}", "broken") for index in range(9)], 3)
    lines = str(error.value).splitlines()
    assert lines[1] == "  track0: broken"
    assert lines[-1] == "  and 4 more"
    assert len(lines) == 7


def continuation_plan(folder, continuation=None, **given):
    given = {"context_s": None, "target_s": None, **given}
    continuation = continuation or ContinuationSettings()
    return plan_continuation(
        settings(folder, **given),
        SPEC,
        stride_frames=continuation.stride_frames(SPEC),
        num_continuations=continuation.num_continuations,
    )


def test_the_default_boundary_is_the_middle_of_each_track(folder):
    plan = continuation_plan(folder)
    assert plan.task == "continue"
    assert plan.status == ["ok", "ok", "failed", "ok", "failed", "ok"]
    columns = (plan.windows.track, plan.windows.context_frames, plan.windows.target_frames)
    found = sorted(zip(*(column.tolist() for column in columns), strict=True))
    assert found == [(0, 50, 50), (1, 25, 25), (3, 5, 5), (5, 24, 25)]
    assert (plan.context_frames, plan.target_frames) == (None, None)


def test_a_track_shorter_than_the_context_is_too_short(folder):
    plan = continuation_plan(folder, context_s=1.0)
    assert plan.status == ["ok", "too_short", "failed", "too_short", "failed", "too_short"]
    assert (
        plan.reasons[1]
        == "1 s is not longer than a context of 1 s; set data.target_s to continue past the end of the track"
    )
    beyond = continuation_plan(folder, context_s=1.0, target_s=0.5)  # may extend past the end of a track
    assert beyond.status == ["ok", "ok", "failed", "too_short", "failed", "too_short"]
    assert beyond.reasons[3] == "0.2 s is shorter than a context of 1 s"


def test_every_continuation_is_a_window(folder):
    plan = continuation_plan(folder, ContinuationSettings(num_continuations=3))
    assert len(plan.windows) == 4 * 3
    pairs = set(zip(plan.windows.track.tolist(), plan.windows.index.tolist(), strict=True))
    assert pairs == {(track, index) for track in (0, 1, 3, 5) for index in range(3)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": "skip"}, r"data\.head does not apply to predict"),
        ({"allow_beyond_limit": True}, r"data\.allow_beyond_limit does not apply to predict"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_scoring_settings_raise_in_predict(folder, given, message):
    with pytest.raises(RunError, match=message):
        continuation_plan(folder, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"context_s": 0.0}, r"context_s=0 is shorter than one frame \(0\.02 s\)"),
        ({"target_s": 0.01}, r"target_s=0\.01 is shorter than one frame"),
        ({"context_s": 0.01}, r"context_s=0\.01 is shorter than one frame"),
        (
            {"context_s": 20.0, "target_s": 20.0},
            "together exceed the checkpoint's limit of 30 s, so the window slides by 18 s and the context must be at most 12 s",
        ),
    ],
)
def test_a_context_that_is_empty_or_does_not_fit_the_window_raises(folder, given, message):
    with pytest.raises(WindowError, match=message):
        continuation_plan(folder, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stride_s": 0.0}, r"stride_s must be above 0, got 0\.0"),
        ({"stride_s": 30.0}, "stride_s must be above 0 and below the checkpoint's window of 30 s, got 30"),
        ({"stride_s": 0.03}, r"stride_s=0\.03 s is 1\.5 frames"),
        ({"top_k": 2049}, "top_k must be between 1 and 2048"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"num_continuations": 0}, "num_continuations must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_invalid_continuation_settings_raise(given, message):
    with pytest.raises((RunError, WindowError), match=message):
        ContinuationSettings(**given).check_for(SPEC)


def test_the_stride_defaults_to_three_fifths_of_the_limit():
    assert ContinuationSettings().stride_frames(SPEC) == 900
    assert ContinuationSettings(stride_s=29.98).stride_frames(SPEC) == 1499
