"""Compares the windows of a continuation and their layouts with brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.inference.sliding_windows import WindowSpan, window_layout, window_spans


def simulated_windows(
    prompt_frames: int, total_frames: int, *, max_frames: int, stride_frames: int
) -> list[tuple[list[int], list[int]]]:
    """Returns the fed and the generated frames of each window, from a window that grows by one frame at a time.

    A full window drops its first stride_frames frames, and the others are fed to the next window.
    """
    fed = list(range(prompt_frames))
    if total_frames > max_frames and prompt_frames >= max_frames:
        fed = fed[-(max_frames - stride_frames) :]
    generated: list[int] = []
    windows = []
    for frame in range(prompt_frames, total_frames):
        if len(fed) + len(generated) == max_frames:
            windows.append((fed, generated))
            fed, generated = (fed + generated)[stride_frames:], []
        generated.append(frame)
    return [*windows, (fed, generated)] if generated else windows


any_lengths = given(prompt=st.integers(0, 60), new=st.integers(0, 200), max_frames=st.integers(2, 50), data=st.data())


@any_lengths
def test_windows_generate_every_frame_once_and_keep_enough_known_frames(prompt, new, max_frames, data):
    stride = data.draw(st.integers(1, max_frames - 1))
    spans = window_spans(prompt, prompt + new, max_frames=max_frames, stride_frames=stride)
    drawn = [frame for span in spans for frame in range(span.known, span.end)]
    assert drawn == list(range(prompt, prompt + new))
    for span in spans:
        assert 0 <= span.start <= span.known < span.end
        assert span.num_frames <= max_frames
    if prompt and prompt + new > max_frames:
        assert all(span.known - span.start >= min(prompt, max_frames - stride) for span in spans)


@any_lengths
def test_window_spans_equal_a_simulation_frame_by_frame(prompt, new, max_frames, data):
    stride = data.draw(st.integers(1, max_frames - 1))
    spans = window_spans(prompt, prompt + new, max_frames=max_frames, stride_frames=stride)
    frames = [(list(range(span.start, span.known)), list(range(span.known, span.end))) for span in spans]
    assert frames == simulated_windows(prompt, prompt + new, max_frames=max_frames, stride_frames=stride)


SPANS = st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 8)).map(
    lambda lengths: WindowSpan(lengths[0], lengths[0] + lengths[1], sum(lengths))
)


@given(
    spans=st.lists(st.none() | SPANS, min_size=1, max_size=4),
    delays=st.lists(st.integers(0, 4), min_size=1, max_size=4),
)
def test_the_window_layout_equals_brute_force(spans, delays):
    layout = window_layout(spans, delays=delays, num_frames=30)
    num_columns = max(0 if span is None else span.end - span.known for span in spans) + max(delays)
    assert layout.frames.shape == layout.is_drawn.shape == layout.is_known.shape == (
        len(spans), len(delays), num_columns,
    )  # fmt: skip
    for row, span in enumerate(spans):
        start, known, end = (0, 0, 0) if span is None else (span.start, span.known, span.end)
        for k, delay in enumerate(delays):
            drawn = {t + delay - known: t for t in range(known, end)}
            fed = {t + delay - known: t for t in range(start, known) if 0 <= t + delay - known < num_columns}
            for column in range(num_columns):
                assert layout.is_drawn[row, k, column] == (column in drawn)
                assert layout.is_known[row, k, column] == (column in fed)
                if column in drawn or column in fed:
                    assert layout.frames[row, k, column] == (drawn | fed)[column]


@pytest.mark.parametrize(
    ("max_frames", "stride_frames", "message"),
    [
        (0, 1, "max_frames must be at least 1, got 0"),
        (10, 0, r"stride_frames must be between 1 and 9 \(below max_frames=10\), got 0"),
        (10, 10, r"stride_frames must be between 1 and 9 \(below max_frames=10\), got 10"),
    ],
)
def test_invalid_window_lengths_raise(max_frames, stride_frames, message):
    with pytest.raises(ValueError, match=message):
        window_spans(4, 20, max_frames=max_frames, stride_frames=stride_frames)
