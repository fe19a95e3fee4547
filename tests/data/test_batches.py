"""Tests batches against lists built window by window."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.data.batches import RankBatches, batch_key, batch_rows, num_batches
from musicgen_eval.data.plan import Plan, StatusColumn
from musicgen_eval.data.sources import TrackList
from musicgen_eval.data.track_index import TrackIndex
from musicgen_eval.data.windows import WindowPlan, plan_windows
from musicgen_eval.results.record_store import batch_numbers


def plan_of(ids: Sequence[str], frames: Sequence[int], context: int = 3, target: int = 4) -> Plan:
    num = len(ids)
    tracks = TrackList(
        list(ids), [f"{row}.wav" for row in range(num)], np.zeros(num), np.full(num, np.nan), [None] * num
    )
    return Plan(
        tracks=tracks,
        index=TrackIndex.of(tracks),
        frame_rate_hz=50,
        num_frames=np.array(frames),
        status=StatusColumn.of(["ok"] * num),
        reasons={},
        windows=plan_windows(frames, context, target).in_scoring_order(),
        context_frames=context,
        target_frames=target,
        num_in_source=num,
    )


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 6), st.sets(st.integers(0, 70)))
def test_every_remaining_window_is_sampled_once_and_all_ranks_take_equally_many_steps(
    num_windows, batch_size, world_size, done
):
    ranks = [
        RankBatches(num_windows, batch_size=batch_size, rank=rank, world_size=world_size, done=done)
        for rank in range(world_size)
    ]
    dealt = [list(rank) for rank in ranks]
    whole = [list(range(first, min(first + batch_size, num_windows))) for first in range(0, num_windows, batch_size)]
    left = [batch for number, batch in enumerate(whole) if number not in done]
    assert {len(steps) for steps in dealt} == {len(rank) for rank in ranks} == {max(1, -(-len(left) // world_size))}
    in_turn = [batch for step in zip(*dealt, strict=True) for batch in step]
    assert [batch for batch in in_turn if batch] == left
    assert all(not batch for batch in in_turn[len(left) :])
    assert [list(batch_rows(number, num_windows, batch_size)) for number in range(len(whole))] == whole
    assert num_batches(num_windows, batch_size) == len(whole)
    assert list(ranks[0]) == dealt[0]  # iterating again gives the same batches


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 5))
def test_batches_of_a_plan_have_distinct_keys(frames, batch_size):
    plan = plan_of([f"t{row}" for row in range(len(frames))], frames)
    keys = batch_numbers(plan, batch_size)
    assert list(keys.values()) == list(range(num_batches(len(plan.windows), batch_size)))


COLUMNS = ("track", "index", "start_frame", "context_frames", "target_frames")


@pytest.mark.parametrize("column", COLUMNS)
@given(place=st.integers(0, 3), change=st.sampled_from([1, 2, 7, 2**32]))
def test_a_key_changes_with_every_column_of_every_window_in_the_batch(column, place, change):
    windows = WindowPlan(*(np.array([1, 0, 2, 3]) + shift for shift in range(5)))
    plan = replace(plan_of([f"t{row}" for row in range(20)], [0] * 20), windows=windows)
    changed = getattr(windows, column).copy()
    changed[place] += change % 10 if column == "track" else change
    other = replace(plan, windows=replace(windows, **{column: changed}))
    assert batch_key(other, range(4)) != batch_key(plan, range(4))
    without_changed = range(place + 1, 4) if place < 3 else range(3)
    assert batch_key(other, without_changed) == batch_key(plan, without_changed)


def test_a_key_depends_on_the_order_and_number_of_windows():
    plan = plan_of(["a", "b", "c"], [5, 5, 5])
    swapped = replace(plan, windows=plan.windows.take(np.array([1, 0, 2])))
    keys = {
        batch_key(plan, range(2)),
        batch_key(swapped, range(2)),
        batch_key(plan, range(3)),
        batch_key(plan, range(1)),
    }
    assert len(keys) == 4


@given(
    st.lists(st.text(st.characters(), max_size=3), min_size=2, max_size=2),
    st.lists(st.text(max_size=3), min_size=2, max_size=2),
)
def test_keys_differ_exactly_if_the_track_ids_differ(first, second):
    keys = [batch_key(plan_of(ids, [5, 5]), range(2)) for ids in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


def test_keys_differ_for_ids_that_look_alike_when_concatenated():
    pairs = [
        ("a\0b", "c"),
        ("a", "b\0c"),
        ("a', 'b", "c"),
        ("a", "b', 'c"),
        ("é", "c"),
        ("\\xe9", "c"),
        ("\ud800", "c"),
    ]
    assert len({batch_key(plan_of(ids, [5, 5]), range(2)) for ids in pairs}) == len(pairs)


def test_a_key_does_not_depend_on_other_batches():
    short = plan_of(["a", "b"], [5, 6])
    more = plan_of(["x", "a", "b"], [20, 5, 6])
    assert batch_key(short, range(2)) in {batch_key(more, range(first, first + 2)) for first in range(4)}
