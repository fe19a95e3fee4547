"""Compares records that several processes and starts keep in a journal with records of one uninterrupted process in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import CatMetric, MaxMetric, MeanMetric, PearsonCorrCoef
from torchmetrics.classification import MulticlassConfusionMatrix

from musicgen_eval.data.batches import RankBatches, batch_rows, num_batches
from musicgen_eval.data.plan import Plan, StatusColumn
from musicgen_eval.data.sources import TrackList
from musicgen_eval.data.track_index import TrackIndex
from musicgen_eval.data.windows import plan_windows
from musicgen_eval.errors import RunError
from musicgen_eval.metrics import CodebookPerplexity, TextGain
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.metrics.plugin.inputs import WindowData
from musicgen_eval.records import ScoredWindow
from musicgen_eval.results.evaluation_result import EvaluationResult
from musicgen_eval.results.measurements import Measurements, WindowRecord
from musicgen_eval.results.record_store import JournalStore, MeasuredBatches, MemoryStore, batch_numbers, read_measured
from musicgen_eval.results.summary import summarise
from tests.support.specs import codec_spec

SPEC = codec_spec(num_codebooks=2, codebook_size=16, max_frames=20)
FRAMES = [23, 7, 0, 15, 30, 0]  # frames per track; the third track cannot be opened, the last one is too short
TEXTS = ["EDM", None, "jazz", None, None, None]
IDS = ["t0", "t 1\n", "t2", 'a "song" é', "\ud800", "t5"]
BATCH = 3
EXACT = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


pytestmark = pytest.mark.usefixtures("without_fsync", "few_resamples")


@pytest.fixture(scope="module")
def plan() -> Plan:
    tracks = TrackList(list(IDS), [f"{row}.wav" for row in range(6)], np.zeros(6), np.full(6, np.nan), list(TEXTS))
    return Plan(
        tracks=tracks,
        index=TrackIndex.of(tracks),
        frame_rate_hz=50,
        num_frames=np.array(FRAMES),
        status=StatusColumn.of(["ok", "ok", "failed", "ok", "ok", "too_short"]),
        reasons={2: "t2.wav: broken", 5: "too short for a context"},
        windows=plan_windows(FRAMES, 4, 3).in_scoring_order(),
        context_frames=4,
        target_frames=3,
        num_in_source=6,
    )


@pytest.fixture(scope="module")
def bank() -> MetricBank:
    """Metrics with small, list and large states, and metrics that some windows do not update."""
    return MetricBank(
        {
            "ppl": CodebookPerplexity(),
            "text_gain": TextGain(),
            "mean": MetricEntry(MeanMetric(), {"value": "nll"}),
            "worst": MetricEntry(MaxMetric(), {"value": "nll"}),
            "text_mean": MetricEntry(MeanMetric(), {"value": "nll__no_text"}),
            "every": MetricEntry(CatMetric(), {"value": "nll"}),
            "alike": MetricEntry(PearsonCorrCoef(), {"preds": "nll", "target": "nll"}),
            "confusion": MetricEntry(MulticlassConfusionMatrix(16), {"preds": "codes", "target": "codes"}),
        },
        spec=SPEC,
    )


def scored(plan: Plan, row: int, shift: float = 0.0) -> ScoredWindow:
    window = plan.windows.window(row, plan.tracks.ids)
    generator = torch.Generator().manual_seed(row)
    nll = torch.rand((2, window.num_frames), generator=generator) * 5 + shift
    codes = torch.randint(16, nll.shape, generator=generator)
    nll[:, : window.context_frames] = float("nan")
    mask = ~nll.isnan()
    return ScoredWindow(window, codes, mask, nll, torch.zeros_like(codes).masked_fill(~mask, -1))


def record(plan: Plan, bank: MetricBank, row: int) -> WindowRecord:
    track, plain = int(plan.windows.track[row]), scored(plan, row)
    no_text = scored(plan, row, 0.5) if TEXTS[track] else None
    (states,) = bank.update([WindowData({"": plain, "no_text": no_text}, SPEC.frame_rate_hz)])
    return WindowRecord(row, track, states=states, tensors={"nll": plain.nll})


@pytest.fixture(scope="module")
def records(plan, bank) -> list[WindowRecord]:
    return [record(plan, bank, row) for row in range(len(plan.windows))]


def failing(records: Sequence[WindowRecord], *rows: int) -> list[WindowRecord]:
    """Returns the records with the windows of some rows marked as failed."""
    return [
        WindowRecord(one.row, one.track_row, failure=f"gone {one.row}") if one.row in rows else one for one in records
    ]


def keeper(folder: Path, plan: Plan, bank: MetricBank, start: int = 0, rank: int = 0, **kwargs) -> JournalStore:
    return JournalStore(
        folder, plan, bank.metrics, batch_size=BATCH, frame_rate_hz=50, start=start, rank=rank, **kwargs
    )


def one_start(
    folder: Path, plan: Plan, bank: MetricBank, records: Sequence[WindowRecord], *, world: int = 1,
    steps: int | None = None, start: int = 0, retry_failures: bool = False,
) -> MeasuredBatches:  # fmt: skip
    """Runs one start, which measures up to `steps` missing batches per process. Returns the batches done before it."""
    done = read_measured(folder, plan, BATCH, retry_failures=retry_failures)
    for rank in range(world):
        kept = keeper(folder, plan, bank, start, rank, failed=done.failed)
        dealt = RankBatches(len(plan.windows), batch_size=BATCH, rank=rank, world_size=world, done=done.batches)
        for rows in list(dealt)[:steps]:
            kept.keep([records[row] for row in rows])
        assert kept.close() == []
    return done


def from_journal(folder: Path, plan: Plan, bank: MetricBank) -> Measurements:
    return keeper(folder, plan, bank, start=999).measurements([])


def from_memory(plan: Plan, bank: MetricBank, records: Sequence[WindowRecord], world: int = 1) -> Measurements:
    parts = []
    for rank in range(world):
        kept = MemoryStore(plan, bank.metrics)
        for rows in RankBatches(len(plan.windows), batch_size=BATCH, rank=rank, world_size=world):
            kept.keep([records[row] for row in rows])
        parts.append(kept.close())
    return MemoryStore(plan, bank.metrics).measurements(parts)


def everything(measured: Measurements, bank: MetricBank) -> tuple[object, ...]:
    """Returns the content of a result in a form that compares bit for bit. The repr makes NaN equal to NaN."""
    result: EvaluationResult = summarise(measured, bank=bank, recipe={}, max_failures=6)
    curves = {track: (curve.dtype, curve.shape, curve.numpy().tobytes()) for track, curve in result.nll.items()}
    rest = (result.metrics, result.tracks, result.windows, result.counts, result.failures, result.metric_errors)
    return (*map(repr, rest), curves)


def states(measured: Measurements) -> dict[str, object]:
    return {
        name: [bits(table.merged(place, place + 1)) for place in range(len(measured.order))]
        for name, table in measured.tables.items()
    }


def bits(state: Mapping[str, Tensor | list[Tensor]] | None) -> object:
    return state and {
        name: [
            (part.dtype, part.shape, part.numpy().tobytes()) for part in (value if isinstance(value, list) else [value])
        ]
        for name, value in state.items()
    }


@pytest.fixture(scope="module")
def undisturbed(plan, bank, records) -> tuple[object, ...]:
    """The result of one process that keeps its records in memory."""
    return everything(from_memory(plan, bank, records), bank)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_results_from_a_journal_equal_those_from_memory(tmp_path, plan, bank, records, undisturbed, world):
    one_start(tmp_path, plan, bank, records, world=world)
    measured = from_journal(tmp_path, plan, bank)
    expected = from_memory(plan, bank, records, world)
    assert states(measured) == states(expected)
    assert everything(measured, bank) == everything(expected, bank) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_failures_from_a_journal_equal_those_from_memory(tmp_path, plan, bank, records, world):
    failed = failing(records, 1, 5)
    one_start(tmp_path, plan, bank, failed, world=world)
    measured, expected = from_journal(tmp_path, plan, bank), from_memory(plan, bank, failed, world)
    assert measured.failures == expected.failures != {}
    assert everything(measured, bank) == everything(expected, bank)


STARTS = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(0, 10**5)), max_size=5)


@pytest.mark.slow
@given(starts=STARTS, fails=st.sets(st.integers(0, 12), max_size=2))
@settings(max_examples=25, **EXACT)
def test_a_resumed_run_equals_an_uninterrupted_one(plan, bank, records, starts, fails):
    measured_rows = failing(records, *fails)
    with TemporaryDirectory() as name:
        folder = Path(name)
        for number, (world, steps, cut) in enumerate([*starts, (2, None, None)]):
            one_start(folder, plan, bank, measured_rows, world=world, steps=steps, start=number)
            for file in folder.glob(f"{number:03d}-r0.*"):
                if cut is not None:  # killed while writing
                    held = file.read_bytes()
                    file.write_bytes(held[: max(0, len(held) - cut % 700)])
        assert len(read_measured(folder, plan, BATCH, retry_failures=False).batches) == num_batches(
            len(plan.windows), BATCH
        )
        measured = from_journal(folder, plan, bank)
        expected = from_memory(plan, bank, measured_rows)
        assert measured.failures == expected.failures
        assert states(measured) == states(expected)


def test_a_run_resumed_on_other_numbers_of_processes_has_the_same_results(tmp_path, plan, bank, records, undisturbed):
    one_start(tmp_path, plan, bank, records, world=2, steps=1)
    one_start(tmp_path, plan, bank, records, world=3, steps=1, start=1)
    last = one_start(tmp_path, plan, bank, records, start=2)
    assert 0 < len(last.batches) < num_batches(len(plan.windows), BATCH)
    assert everything(from_journal(tmp_path, plan, bank), bank) == undisturbed


# Batches that are measured again


def test_a_batch_measured_again_equals_one_that_never_failed(tmp_path, plan, bank, records, undisturbed):
    one_start(tmp_path, plan, bank, failing(records, 4, 7))
    retried = one_start(tmp_path, plan, bank, records, start=1, retry_failures=True)
    assert set(range(num_batches(len(plan.windows), BATCH))) - retried.batches == {1, 2}
    assert everything(from_journal(tmp_path, plan, bank), bank) == undisturbed


@pytest.mark.slow
def test_a_window_that_fails_again_keeps_no_earlier_state(tmp_path, plan, bank, records):
    one_start(tmp_path, plan, bank, failing(records, 4))
    again = failing(records, 3, 5)
    one_start(tmp_path, plan, bank, again, start=1, retry_failures=True)
    measured, expected = from_journal(tmp_path, plan, bank), from_memory(plan, bank, again)
    assert measured.failures == expected.failures
    assert states(measured) == states(expected)
    assert everything(measured, bank) == everything(expected, bank)


@pytest.mark.parametrize("lost", ["text_mean", "ppl", "every", "confusion"])
def test_a_metric_without_a_state_in_the_later_measurement_has_none(tmp_path, plan, bank, records, lost):
    one_start(tmp_path, plan, bank, failing(records, 4))
    again = [
        replace(one, states={name: state for name, state in one.states.items() if name != lost}, tensors={})
        for one in records
    ]
    one_start(tmp_path, plan, bank, again, start=1, retry_failures=True)
    expected = from_memory(plan, bank, [again[row] if 3 <= row < 6 else one for row, one in enumerate(records)])
    measured = from_journal(tmp_path, plan, bank)
    assert states(measured) == states(expected)
    places = range(len(plan.windows))
    assert [measured.has_tensor(place, "nll") for place in places] == [
        expected.has_tensor(place, "nll") for place in places
    ]


def test_a_damaged_side_file_is_harmless_if_its_batches_were_measured_again(tmp_path, plan, bank, records, undisturbed):
    one_start(tmp_path, plan, bank, records, steps=2)
    (tmp_path / "000-r0.states").write_bytes(b"\0" * 100)
    again = one_start(tmp_path, plan, bank, records, start=1)
    assert again.batches == set()
    assert again.notes == ["000-r0.jsonl: skipped 6 rows with missing or damaged data in the side file"]
    assert everything(from_journal(tmp_path, plan, bank), bank) == undisturbed


@pytest.mark.slow
def test_the_earlier_measurement_counts_if_the_later_one_is_damaged(tmp_path, plan, bank, records):
    first = failing(records, 4)
    one_start(tmp_path, plan, bank, first)
    one_start(tmp_path, plan, bank, records, start=1, retry_failures=True)
    (tmp_path / "001-r0.states").unlink()
    found = read_measured(tmp_path, plan, BATCH, retry_failures=False)
    assert found.failed == {int(plan.windows.track[4]): "gone 4"}
    measured = from_journal(tmp_path, plan, bank)
    assert everything(measured, bank) == everything(from_memory(plan, bank, first), bank)


# Batches that are done


def test_no_batch_is_done_without_a_journal(tmp_path, plan):
    assert read_measured(tmp_path / "nowhere", plan, BATCH, retry_failures=False) == MeasuredBatches()


@given(st.sets(st.integers(0, 12), max_size=13), st.sets(st.integers(0, 40), max_size=3), st.booleans())
@settings(max_examples=30, **EXACT)
def test_complete_batches_are_done(plan, bank, records, numbers, fails, retry_failures):
    num_windows = len(plan.windows)
    rows_of = [list(batch_rows(number, num_windows, BATCH)) for number in range(num_batches(num_windows, BATCH))]
    kept_rows = failing(records, *fails)
    with TemporaryDirectory() as name:
        kept = keeper(Path(name), plan, bank, 2, 1)
        for number in sorted(number % len(rows_of) for number in numbers):
            kept.keep([kept_rows[row] for row in rows_of[number]])
        kept.close()
        found = read_measured(Path(name), plan, BATCH, retry_failures=retry_failures)
    known = {number % len(rows_of) for number in numbers}
    done = {number for number in known if not (retry_failures and fails & set(rows_of[number]))}
    reasons: dict[int, str] = {}
    for row in sorted(row for number in done for row in rows_of[number] if row in fails):
        reasons.setdefault(int(plan.windows.track[row]), f"gone {row}")
    assert found.batches == done
    assert found.windows == sum(len(rows_of[number]) for number in done)
    assert found.failed == reasons
    assert found.starts == (3 if known else 0)
    assert found.notes == []


def test_batches_of_another_batch_size_are_skipped_with_a_note(tmp_path, plan, bank, records):
    one_start(tmp_path, plan, bank, records)
    found = read_measured(tmp_path, plan, BATCH + 1, retry_failures=False)
    assert (found.batches, found.windows, found.failed) == (set(), 0, {})
    assert found.notes == [f"skipped {len(plan.windows)} rows of batches that are not part of this run"]
    other = JournalStore(tmp_path, plan, bank.metrics, batch_size=BATCH + 1, frame_rate_hz=50, start=1, rank=0)
    with pytest.raises(RunError, match=f"{len(plan.windows)} of {len(plan.windows)} windows have no record"):
        other.measurements([]).check_complete()


def test_truncated_files_are_noted(tmp_path, plan, bank, records):
    one_start(tmp_path, plan, bank, records)
    file = tmp_path / "000-r0.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    num_last = len(plan.windows) - (num_batches(len(plan.windows), BATCH) - 1) * BATCH
    found = read_measured(tmp_path, plan, BATCH, retry_failures=False)
    assert found.notes[0] == "000-r0.jsonl: skipped 1 truncated or damaged line"
    assert len(found.notes) == 1 + (num_last > 1)
    assert found.windows == len(plan.windows) - num_last


def test_keys_do_not_depend_on_the_number_of_processes(tmp_path, plan, bank, records):
    for world in (1, 2, 3):
        (tmp_path / str(world)).mkdir()
        one_start(tmp_path / str(world), plan, bank, records, world=world)
        assert len(read_measured(tmp_path / str(world), plan, BATCH, retry_failures=False).batches) == len(
            batch_numbers(plan, BATCH)
        )


def test_a_process_without_batches_writes_no_file(tmp_path, plan, bank):
    kept = keeper(tmp_path, plan, bank)
    kept.keep([])
    assert (kept.close(), list(tmp_path.iterdir())) == ([], [])


def test_failed_holds_the_first_reason_of_each_track(tmp_path, plan, bank, records):
    failed = failing(records, 0, 1, 2)
    for kept in (MemoryStore(plan, bank.metrics), keeper(tmp_path, plan, bank, failed={4: "earlier"})):
        before = dict(kept.failed)
        kept.keep(failed[:3])
        kept.close()
        expected = dict(before)
        for row in range(3):
            expected.setdefault(int(plan.windows.track[row]), f"gone {row}")
        assert kept.failed == expected


def test_a_failed_write_raises_an_error_and_earlier_batches_are_kept(tmp_path, plan, bank, records):
    first = keeper(tmp_path, plan, bank)
    first.keep(records[:3])
    second = keeper(tmp_path, plan, bank)
    with pytest.raises(RunError, match="File exists"):
        second.keep(records[3:6])
    first.close()
    assert read_measured(tmp_path, plan, BATCH, retry_failures=False).batches == {0}
