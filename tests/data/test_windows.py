import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.data.windows import check_limit, plan_continuations, plan_windows
from musicgen_eval.errors import WindowError
from musicgen_eval.records import Window
from tests.support.specs import codec_spec

LENGTHS = st.lists(st.integers(0, 60), max_size=6)
SPEC = codec_spec()


def brute_force(num_frames: int, context: int, target: int, head: str) -> list[tuple[int, int, int]]:
    """Returns (start, context, target) of each window of one track, built window by window."""
    windows = []
    position = context
    if head == "score":
        position = min(num_frames, context + target)
        if position:
            windows.append((0, 0, position))
    while position < num_frames:
        length = min(target, num_frames - position)
        windows.append((position - context, context, length))
        position += length
    return windows


@given(LENGTHS, st.integers(0, 12), st.integers(1, 12), st.sampled_from(["score", "skip"]))
def test_plan_equals_brute_force(lengths, context, target, head):
    plan = plan_windows(lengths, context, target, head)
    expected = [
        (track, index, *window)
        for track, length in enumerate(lengths)
        for index, window in enumerate(brute_force(length, context, target, head))
    ]
    columns = (plan.track, plan.index, plan.start_frame, plan.context_frames, plan.target_frames)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


@given(LENGTHS, st.integers(0, 12), st.integers(1, 12), st.sampled_from(["score", "skip"]))
def test_every_code_is_scored_exactly_once(lengths, context, target, head):
    plan = plan_windows(lengths, context, target, head).in_scoring_order()
    times_scored = [np.zeros(length, dtype=int) for length in lengths]
    for row in range(len(plan)):
        window = plan.window(row, [str(i) for i in range(len(lengths))])
        assert window.start_frame >= 0
        assert window.num_frames <= context + target
        times_scored[int(window.track)][window.scored_from_frame : window.start_frame + window.num_frames] += 1
    skipped = context if head == "skip" else 0
    for counts in times_scored:
        assert (counts[:skipped] == 0).all()
        assert (counts[skipped:] == 1).all()


@given(LENGTHS)
def test_scoring_order_sorts_by_length_then_track_then_index(lengths):
    plan = plan_windows(lengths, 3, 5).in_scoring_order()
    keys = list(zip(plan.num_frames.tolist(), plan.track.tolist(), plan.index.tolist(), strict=True))
    assert keys == sorted(keys)


def test_frames_of_a_window_are_counted_from_the_start_of_the_track():
    plan = plan_windows([13], 3, 4)
    assert plan.window(1, ["song"]) == Window("song", 1, 4, 3, 4)
    assert plan.window(2, ["song"]).scored_from_frame == 11


@pytest.mark.parametrize(("context", "target", "head"), [(-1, 5, "score"), (0, 0, "score"), (0, 5, "both")])
def test_invalid_settings_raise(context, target, head):
    with pytest.raises(WindowError):
        plan_windows([10], context, target, head)


def test_whole_frames_raises_with_the_nearest_valid_lengths():
    assert SPEC.whole_frames(15.0, setting="context_s") == 750
    assert SPEC.whole_frames(0.02, setting="context_s") == 1
    with pytest.raises(WindowError, match=r"context_s=0\.33 s is 16\.5 frames.*set context_s to 0\.32 or 0\.34"):
        SPEC.whole_frames(0.33, setting="context_s")


def test_windows_over_the_limit_raise_unless_allowed():
    check_limit(750, 750, SPEC, allow_beyond_limit=False)
    with pytest.raises(WindowError, match="1501 frames, which exceeds the checkpoint's limit of 1500"):
        check_limit(750, 751, SPEC, allow_beyond_limit=False)
    check_limit(750, 751, SPEC, allow_beyond_limit=True)


@given(
    LENGTHS,
    st.none() | st.integers(1, 20),
    st.none() | st.integers(1, 20),
    st.integers(2, 30),
    st.data(),
    st.integers(1, 3),
)
def test_continuations_equal_brute_force(lengths, context, target, max_frames, data, num_continuations):
    stride = data.draw(st.integers(1, max_frames - 1))
    plan = plan_continuations(
        lengths, context, target, max_frames=max_frames, stride_frames=stride, num_continuations=num_continuations
    )
    expected = []
    for track, length in enumerate(lengths):
        for index in range(num_continuations if length else 0):
            boundary = length // 2 if context is None else context
            generated = length - boundary if target is None else target
            prompt = boundary
            if boundary + generated > max_frames:
                prompt = min(boundary, max_frames - stride)
            expected.append((track, index, boundary - prompt, prompt, generated))
    columns = (plan.track, plan.index, plan.start_frame, plan.context_frames, plan.target_frames)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
