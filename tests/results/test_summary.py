from dataclasses import replace
from math import exp, fsum, isnan, log
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric

from musicgen_eval.data.plan import Plan, StatusColumn
from musicgen_eval.data.sources import TrackList
from musicgen_eval.data.track_index import TrackIndex
from musicgen_eval.data.windows import plan_windows
from musicgen_eval.errors import RunError
from musicgen_eval.metrics import CodebookPerplexity, TextGain
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.metrics.plugin.inputs import WindowData
from musicgen_eval.metrics.plugin.states import merge_states
from musicgen_eval.records import ScoredWindow
from musicgen_eval.results.measurements import Measurements, WindowRecord
from musicgen_eval.results.summary import interval, summarise
from tests.support.specs import codec_spec

SPEC = codec_spec(num_codebooks=2, codebook_size=16, max_frames=20)
FRAMES = [23, 7, 0, 15, 30, 0]  # frames per track; the third track cannot be opened, the last one is too short
STATUS = ["ok", "ok", "failed", "ok", "ok", "too_short"]
CONTEXT, TARGET = 4, 6
TEXTS = ["EDM", None, "jazz", None, None, None]


@pytest.fixture
def plan() -> Plan:
    ids = [f"t{row}" for row in range(6)]
    tracks = TrackList(ids, [f"{name}.wav" for name in ids], np.zeros(6), np.full(6, np.nan), list(TEXTS))
    return Plan(
        tracks=tracks,
        index=TrackIndex.of(tracks),
        frame_rate_hz=SPEC.frame_rate_hz,
        num_frames=np.array(FRAMES),
        status=StatusColumn.of(STATUS),
        reasons={2: "t2.wav: broken", 5: "too short for a context"},
        windows=plan_windows(FRAMES, CONTEXT, TARGET).in_scoring_order(),
        context_frames=CONTEXT,
        target_frames=TARGET,
        num_in_source=9,
        ignored_files=2,
    )


@pytest.fixture(scope="module")
def bank() -> MetricBank:
    return MetricBank(
        {
            "ppl": CodebookPerplexity(),
            "text_gain": TextGain(),
            "mean": MetricEntry(MeanMetric(), {"value": "nll"}),
            "worst": MetricEntry(MaxMetric(), {"value": "nll"}),
            "text_mean": MetricEntry(MeanMetric(), {"value": "nll__no_text"}),
        },
        spec=SPEC,
    )


def nats_of(plan: Plan, row: int, shift: float = 0.0) -> Tensor:
    """Returns random (K, T) nats of a window, NaN on its context."""
    window = plan.windows.window(row, plan.tracks.ids)
    generator = torch.Generator().manual_seed(1000 * int(plan.windows.track[row]) + window.index)
    nll = torch.rand((2, window.num_frames), generator=generator) * 5 + shift
    nll[:, : window.context_frames] = float("nan")
    return nll


def scored(plan: Plan, row: int, nll: Tensor) -> ScoredWindow:
    mask = ~nll.isnan()
    return ScoredWindow(
        window=plan.windows.window(row, plan.tracks.ids),
        codes=torch.zeros(nll.shape, dtype=torch.int64),
        scored=mask,
        nll=nll,
        rank=torch.zeros(nll.shape, dtype=torch.int64).masked_fill(~mask, -1),
    )


@pytest.fixture
def records(plan, bank) -> list[WindowRecord]:
    """One record per window, in scoring order."""
    made = []
    for row in range(len(plan.windows)):
        track = int(plan.windows.track[row])
        no_text = scored(plan, row, nats_of(plan, row, 0.5)) if TEXTS[track] else None
        data = WindowData({"": scored(plan, row, nats_of(plan, row)), "no_text": no_text}, SPEC.frame_rate_hz)
        (states,) = bank.update([data])
        made.append(WindowRecord(row, track, states=states, tensors={"nll": nats_of(plan, row)}))
    return made


def brute_force(plan: Plan, tracks: set[int], windows: set[int] | None = None) -> dict[str, float]:
    """Computes the perplexity over the windows of some tracks in a plain loop."""
    ce = []
    for k in range(2):
        counted = [
            value
            for row in range(len(plan.windows))
            if int(plan.windows.track[row]) in tracks and (windows is None or row in windows)
            for value in nats_of(plan, row)[k].double().tolist()
            if value == value
        ]
        ce.append(fsum(counted) / len(counted))
    mean = fsum(ce) / 2
    results = {"ppl": exp(mean), "ce": mean, "bits_per_second": 50 * fsum(ce) / log(2)}
    for k, value in enumerate(ce, start=1):
        results |= {f"ce_q{k}": value, f"ppl_q{k}": exp(value)}
    return results


def summarised(records, plan, bank, max_failures=1):
    measured = Measurements(plan, bank.metrics)
    measured.add(records)
    return summarise(measured, bank=bank, recipe={"checkpoint": "random"}, max_failures=max_failures)


def numbers(result, name: str) -> dict[str, float]:
    return {key: value.value for key, value in result.metrics[name].items()}


def test_totals_tracks_and_windows_equal_brute_force(records, plan, bank):
    result = summarised(records, plan, bank)
    assert numbers(result, "ppl") == pytest.approx(brute_force(plan, {0, 1, 3, 4}), rel=1e-12)
    for row in (0, 1, 3, 4):
        assert result.tracks[row].metrics["ppl"] == pytest.approx(brute_force(plan, {row}), rel=1e-12)
    assert [track.status for track in result.tracks] == STATUS
    assert result.tracks[2].metrics == {}
    assert result.tracks[2].reason == "t2.wav: broken"
    order = sorted(range(len(plan.windows)), key=lambda row: (plan.windows.track[row], plan.windows.index[row]))
    assert [window.window for window in result.windows] == [plan.windows.window(row, plan.tracks.ids) for row in order]
    for row, window in zip(order, result.windows, strict=True):
        expected = brute_force(plan, set(range(6)), {row})
        assert window.metrics["ppl"] == pytest.approx(expected, rel=1e-12)


def test_results_do_not_depend_on_the_order_of_records(records, plan, bank):
    first = summarised(records, plan, bank)
    for seed in range(3):
        mixed = list(records)
        Random(seed).shuffle(mixed)
        again = summarised(mixed, plan, bank)
        assert again.metrics["ppl"] == first.metrics["ppl"]
        assert again.metrics["mean"] == first.metrics["mean"]
        assert again.metrics["text_gain"] == first.metrics["text_gain"]
        assert [track.metrics["ppl"] for track in again.tracks if track.metrics] == [
            track.metrics["ppl"] for track in first.tracks if track.metrics
        ]
        assert repr(again.windows) == repr(first.windows)  # repr makes NaN equal to NaN
        assert (again.counts, again.failures) == (first.counts, first.failures)


def test_a_failed_window_excludes_its_whole_track_from_every_number(records, plan, bank):
    row = next(row for row in range(len(plan.windows)) if plan.windows.track[row] == 4 and plan.windows.index[row] == 2)
    records[row] = WindowRecord(row, 4, failure="t4.wav: cut short")
    result = summarised(records, plan, bank, max_failures=2)
    assert numbers(result, "ppl") == pytest.approx(brute_force(plan, {0, 1, 3}), rel=1e-12)
    assert result.tracks[4].status == "failed"
    assert result.tracks[4].reason == "t4.wav: cut short"
    assert (result.tracks[4].metrics, result.tracks[4].num_windows) == ({}, 0)
    assert {window.window.track for window in result.windows} == {"t0", "t1", "t3"}
    assert "t4" not in result.nll
    assert [failure.track for failure in result.failures] == ["t2", "t4"]
    assert result.metrics["ppl"]["ppl"].num_tracks == 3


def test_too_many_failed_tracks_raise_an_error_that_names_the_setting(records, plan, bank):
    for row, record in enumerate(records):
        if record.track_row == 0:
            records[row] = WindowRecord(row, 0, failure="t0.wav: cut short")
    with pytest.raises(
        RunError, match=r"2 tracks failed, but data.max_failures is 1; set data.max_failures to 2"
    ) as error:
        summarised(records, plan, bank)
    assert "t0.wav: cut short" in str(error.value)
    assert "t2.wav: broken" in str(error.value)
    summarised(records, plan, bank, max_failures=2)


def test_an_error_is_raised_if_every_track_failed(records, plan, bank):
    failed = [WindowRecord(record.row, record.track_row, failure="gone") for record in records]
    with pytest.raises(RunError, match="no track could be measured: "):
        summarised(failed, plan, bank, max_failures=6)


def test_a_missing_or_repeated_window_is_an_error(records, plan, bank):
    with pytest.raises(RunError, match=f"1 of {len(records)} windows have no record and 0 have several"):
        summarised(records[1:], plan, bank)
    with pytest.raises(RunError, match=f"0 of {len(records)} windows have no record and 1 have several"):
        summarised([*records, records[3]], plan, bank)


def test_counts_include_tracks_by_outcome_windows_and_seconds(records, plan, bank):
    assert summarised(records, plan, bank).counts == {
        "tracks_in_source": 9,
        "tracks": 6,
        "tracks_ok": 4,
        "tracks_failed": 1,
        "tracks_too_short": 1,
        "tracks_skipped": 0,
        "ignored_files": 2,
        "windows": len(plan.windows),
        "scored_seconds": (23 + 7 + 15 + 30) / 50,
    }


def test_curves_join_the_targets_of_all_windows(records, plan, bank):
    result = summarised(records, plan, bank)
    assert list(result.nll) == ["t0", "t1", "t3", "t4"]
    for track, curve in result.nll.items():
        row_of_track = plan.tracks.ids.index(track)
        expected = torch.full((2, FRAMES[row_of_track]), float("nan"))
        for row in range(len(plan.windows)):
            if plan.windows.track[row] != row_of_track:
                continue
            nll, start = nats_of(plan, row), int(plan.windows.start_frame[row])
            for t in range(nll.shape[1]):
                if not nll[0, t].isnan():
                    expected[:, start + t] = nll[:, t]
        assert curve.dtype == torch.float32
        assert torch.equal(curve, expected)
        assert not curve.isnan().any()
    without = [replace(record, tensors={}) for record in records]
    assert summarised(without, plan, bank).nll.keys() == set()


def test_curves_are_nan_at_unscored_frames(plan, bank):
    skipping = replace(plan, windows=plan_windows(FRAMES, CONTEXT, TARGET, "skip").in_scoring_order())
    made = []
    for row in range(len(skipping.windows)):
        nll = nats_of(skipping, row)
        (states,) = bank.update([WindowData({"": scored(skipping, row, nll), "no_text": None}, 50)])
        made.append(WindowRecord(row, int(skipping.windows.track[row]), states=states, tensors={"nll": nll}))
    for curve in summarised(made, skipping, bank).nll.values():
        assert curve[:, :CONTEXT].isnan().all()
        assert not curve[:, CONTEXT:].isnan().any()


def test_intervals_equal_a_bootstrap_over_tracks(records, plan, bank):
    value = summarised(records, plan, bank).metrics["ppl"]["ppl"]
    per_track = []
    for row in (0, 1, 3, 4):
        nll = torch.cat([nats_of(plan, window) for window in np.flatnonzero(plan.windows.track == row)], dim=1).double()
        per_track.append([*nll.nansum(1).tolist(), (~nll.isnan()).sum(1)[0].item()])
    draws = np.random.default_rng(20240).multinomial(4, [0.25] * 4, size=2000)
    first, second, count = (draws @ np.array(per_track)).T
    low, high = np.quantile(np.exp((first / count + second / count) / 2), [0.025, 0.975])
    assert (value.low, value.high) == pytest.approx((low, high), rel=1e-9)
    assert low < value.value < high
    assert (value.unit, value.num_tracks) == ("", 4)


def test_there_is_no_interval_for_other_reductions_or_fewer_than_two_tracks(records, plan, bank):
    worst = summarised(records, plan, bank).metrics["worst"]["value"]
    assert worst.value == max(nats_of(plan, row).nan_to_num(-1).max().item() for row in range(len(plan.windows)))
    assert (worst.low, worst.high, worst.num_tracks) == (None, None, 4)
    alone = [
        record if record.track_row == 0 else WindowRecord(record.row, record.track_row, failure="gone")
        for record in records
    ]
    lone = summarised(alone, plan, bank, max_failures=6).metrics["ppl"]["ppl"]
    assert (lone.low, lone.high, lone.num_tracks) == (None, None, 1)
    states = [record.states["ppl"] for record in records[:1]]
    assert interval(bank.metrics["ppl"], [merge_states(bank.metrics["ppl"], states)]) == {}


class OwnIntervals(MaxMetric):
    """Defines its intervals, because its state is not a sum."""

    def intervals(self, track_states):
        values = [float(state["max_value"]) for state in track_states]
        return {"value": (min(values), max(values))}


def test_a_metric_can_define_its_own_intervals(bank):
    states = [{"max_value": torch.tensor(value)} for value in (2.0, 5.0, 3.0)]
    assert interval(OwnIntervals(), states) == {"value": (2.0, 5.0)}
    assert interval(OwnIntervals(), states[:1]) == {}


def test_num_tracks_counts_only_tracks_with_a_value(records, plan, bank):
    result = summarised(records, plan, bank)
    gain = result.metrics["text_gain"]["nats_per_second"]
    assert gain.value == pytest.approx(0.5 * 2 * 50, rel=1e-6)
    assert (gain.low, gain.high, gain.num_tracks, gain.unit) == (None, None, 1, "nats/s")
    assert isnan(result.tracks[1].metrics["text_gain"]["nats_per_second"])
    flat = result.metrics["text_mean"]["value"]
    assert flat.num_tracks == 1
    assert result.tracks[0].metrics["text_mean"]["value"] == flat.value
    assert result.tracks[1].metrics["text_mean"] == {}


def test_a_metric_without_states_has_no_values(records, plan, bank):
    without = [
        replace(record, states={name: state for name, state in record.states.items() if name != "text_mean"})
        for record in records
    ]
    result = summarised(without, plan, bank)
    assert result.metrics["text_mean"] == {}
    assert numbers(result, "ppl") == pytest.approx(brute_force(plan, {0, 1, 3, 4}), rel=1e-12)
