"""Tests the order of records and journal rows, and compares results from a journal with those of torchmetrics.

The metrics, and the program whose two processes synchronise, are defined in tests/metrics/plugin/test_states.py.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
import torch
from torchmetrics import CatMetric, SumMetric

from musicgen_eval.data.batches import batch_key
from musicgen_eval.data.plan import Plan, StatusColumn
from musicgen_eval.data.sources import TrackList
from musicgen_eval.data.track_index import TrackIndex
from musicgen_eval.data.windows import plan_windows
from musicgen_eval.errors import RunError
from musicgen_eval.metrics.plugin.states import State, compute_from, merge_states
from musicgen_eval.results.journal.format import JournalEntry, JournalRow, SideFileRef
from musicgen_eval.results.journal.reader import JournalReader
from musicgen_eval.results.journal.writer import JournalWriter
from musicgen_eval.results.measurements import Measurements, WindowRecord, entries_of
from musicgen_eval.results.state_table import layout_of

METRICS = {"sum": SumMetric(), "cat": CatMetric()}


def plan_of(frames: list[int]) -> Plan:
    num = len(frames)
    ids = [f"t{row}" for row in range(num)]
    tracks = TrackList(ids, [f"{name}.wav" for name in ids], np.zeros(num), np.full(num, np.nan), [None] * num)
    return Plan(
        tracks=tracks,
        index=TrackIndex.of(tracks),
        frame_rate_hz=50,
        num_frames=np.array(frames),
        status=StatusColumn.of(["ok"] * num),
        reasons={},
        windows=plan_windows(frames, 2, 3).in_scoring_order(),
        context_frames=2,
        target_frames=3,
        num_in_source=num,
    )


@pytest.fixture
def plan() -> Plan:
    return plan_of([14, 4, 9])


def record(plan: Plan, row: int, **changes) -> WindowRecord:
    """Returns a record whose states hold ten times the track row plus the window index."""
    number = torch.tensor(10.0 * int(plan.windows.track[row]) + int(plan.windows.index[row]))
    states: dict[str, State] = {"sum": {"sum_value": number}, "cat": {"value": [number.reshape(1)] * row}}
    made = WindowRecord(
        row, int(plan.windows.track[row]), states=states, tensors={"nll": torch.full((2, 3), float(row))}
    )
    return replace(made, **changes)


def canonical(plan: Plan) -> list[int]:
    """Returns the rows of the plan in (track, window) order."""
    return sorted(range(len(plan.windows)), key=lambda row: (plan.windows.track[row], plan.windows.index[row]))


def journalled(folder: Path, plan: Plan, batches: list[list[WindowRecord]], layouts=None) -> Measurements:
    """Writes batches to a journal and reads them back."""
    if layouts is None:
        layouts = {name: layout_of(metric) for name, metric in METRICS.items()}
    writer = JournalWriter(folder, start=0, rank=0, layouts=layouts)
    rows_of = {}
    for number, batch in enumerate(batches):
        rows_of[str(number)] = sorted(one.row for one in batch)
        writer.append(str(number), entries_of(batch, plan, 50))
    writer.close()
    measured = Measurements(plan, METRICS)
    for key, rows in JournalReader(folder).batches():
        measured.add_batch(rows_of[key], rows)
    return measured


def values(measured: Measurements, name: str, key: str) -> list[object]:
    """Returns one state of a metric for each place, as lists."""
    merged = [measured.tables[name].merged(place, place + 1) for place in range(len(measured.order))]
    return [
        state and [part.tolist() for part in (state[key] if isinstance(state[key], list) else [state[key]])]
        for state in merged
    ]


@pytest.mark.parametrize("way", ["memory", "journal", "journal of another layout"])
def test_windows_in_any_order_come_to_their_canonical_places(tmp_path, plan, way):
    records = [record(plan, row) for row in range(len(plan.windows))]
    Random(3).shuffle(records)
    if way == "memory":
        measured = Measurements(plan, METRICS)
        measured.add(records)
    else:
        batches = [records[first : first + 3] for first in range(0, len(records), 3)]
        measured = journalled(tmp_path, plan, batches, layouts=None if way == "journal" else {})
    measured.check_complete()
    order = canonical(plan)
    assert measured.order.tolist() == order
    numbers = [10.0 * int(plan.windows.track[row]) + int(plan.windows.index[row]) for row in order]
    assert values(measured, "sum", "sum_value") == [[number] for number in numbers]
    for place, (row, number) in enumerate(zip(order, numbers, strict=True)):
        merged = measured.tables["cat"].merged(place, place + 1)
        expected = merge_states(METRICS["cat"], [{"value": [torch.tensor([number])] * row}])
        assert torch.equal(torch.as_tensor(merged["value"]), torch.as_tensor(expected["value"]))
        assert measured.has_tensor(place, "nll")
        assert not measured.has_tensor(place, "codes")
        assert torch.equal(measured.tensor(place, "nll"), torch.full((2, 3), float(row)))


def test_failures_are_stored_by_place_and_the_later_measurement_counts(tmp_path, plan):
    rows = range(3)
    first = [record(plan, 0, states={}, tensors={}, failure="gone"), record(plan, 1), record(plan, 2)]
    again = [record(plan, 0), record(plan, 1, states={}, tensors={}, failure="now this"), record(plan, 2, tensors={})]
    measured = journalled(tmp_path, plan, [first, again])
    place = {row: canonical(plan).index(row) for row in rows}
    assert measured.failures == {place[1]: "now this"}
    assert [measured.has_tensor(place[row], "nll") for row in rows] == [True, False, False]
    assert measured.tables["sum"].merged(place[1], place[1] + 1) is None
    assert measured.tables["sum"].merged(place[0], place[0] + 1) is not None


def test_a_repeated_batch_counts_once_and_a_repeated_record_is_an_error(tmp_path, plan):
    records = [record(plan, row) for row in range(len(plan.windows))]
    journalled(tmp_path, plan, [records, records]).check_complete()
    measured = Measurements(plan, METRICS)
    measured.add([*records, records[0]])
    with pytest.raises(RunError, match=f"0 of {len(records)} windows have no record and 1 have several"):
        measured.check_complete()
    measured = Measurements(plan, METRICS)
    measured.add(records[2:])
    with pytest.raises(RunError, match=f"2 of {len(records)} windows have no record and 0 have several"):
        measured.check_complete()


def test_tensors_of_a_journal_are_not_kept_in_memory(tmp_path, plan):
    measured = journalled(tmp_path, plan, [[record(plan, row) for row in range(len(plan.windows))]])
    assert {type(kept) for kept in measured._with_tensors.values()} == {SideFileRef}


def test_entries_have_track_ids_and_seconds_in_the_order_of_the_plan(plan):
    records = [record(plan, row) for row in range(len(plan.windows))]
    entries = entries_of(list(reversed(records)), plan, 50)
    for row, entry in enumerate(entries):
        window = plan.windows.window(row, plan.tracks.ids)
        assert (entry.track, entry.window) == (window.track, window.index)
        assert entry.seconds == window.target_frames / 50
        assert (entry.states, entry.tensors) == (records[row].states, records[row].tensors)
    assert sum(entry.seconds for entry in entries) == pytest.approx(27 / 50)


# Comparison with torchmetrics

pytestmark = pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all:UserWarning")
PROGRAM = Path(__file__).parents[1] / "metrics" / "plugin" / "test_states.py"


@pytest.fixture(scope="module")
def merging() -> ModuleType:
    """The module tests/metrics/plugin/test_states.py, which defines the cases."""
    spec = importlib.util.spec_from_file_location("merging_cases", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def synchronised(merging, tmp_path_factory) -> dict[str, tuple[State, dict[str, float]]]:
    """The states and results of each case, as torchmetrics synchronises them between two processes."""
    found: dict[str, tuple[State, dict[str, float]]] = merging.synchronise_in_processes(tmp_path_factory.mktemp("gloo"))
    return found


@pytest.fixture(scope="module")
def from_journal(merging, tmp_path_factory) -> dict[str, dict[str, float]]:
    """Results from a journal that two processes wrote, by metric."""
    folder, num = tmp_path_factory.mktemp("journal"), merging.NUM_WINDOWS
    plan = plan_of([5] * num)
    metrics = {name: make() for name, (make, _) in merging.CASES.items()}
    states = {name: merging.states_of(name) for name in metrics}
    layouts = {name: layout_of(metric) for name, metric in metrics.items()}
    batches = [range(first, first + 2) for first in range(0, num, 2)]
    for rank in (1, 0):
        writer = JournalWriter(folder, start=0, rank=rank, layouts=layouts)
        for rows in batches[rank::2]:
            kept = [
                JournalEntry(f"t{row}", 0, 0.1, states={name: states[name][row] for name in metrics}) for row in rows
            ]
            writer.append(batch_key(plan, rows), kept)
        writer.close()
    rows_of = {batch_key(plan, rows): rows for rows in batches}
    measured = Measurements(plan, metrics)
    for key, found in JournalReader(folder).batches():
        assert all(isinstance(row, JournalRow) for row in found)
        measured.add_batch(rows_of[key], found)
    measured.check_complete()
    results = {}
    for name, metric in metrics.items():
        merged = measured.tables[name].merged(0, num)
        at = measured.tables[name].merged_at(np.ones(num, dtype=bool))
        assert merged is not None
        assert at is not None
        results[name] = compute_from(metric, merged)
        assert results[name] == pytest.approx(compute_from(metric, at), rel=0, abs=0)
    return results


@pytest.mark.slow
def test_results_from_a_journal_equal_those_of_torchmetrics_synchronisation(merging, synchronised, from_journal):
    compared = [name for name in merging.CASES if name not in merging.DEPENDS_ON_PARTS]
    assert len(compared) > 10
    for name in compared:
        relative = 1e-12 if name.startswith("Codebook") else 1e-5
        assert from_journal[name] == pytest.approx(synchronised[name][1], rel=relative, abs=0), name


def test_results_from_a_journal_and_from_memory_are_bit_identical(merging, from_journal):
    for name, (make, _) in merging.CASES.items():
        metric = make()
        in_memory = compute_from(metric, merge_states(metric, merging.states_of(name)))
        assert repr(from_journal[name]) == repr(in_memory), name
