"""The metrics of predict."""

import json

import pytest
import soundfile
import torch
from torchmetrics.audio import ScaleInvariantSignalDistortionRatio, SignalNoiseRatio

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import CodebookPerplexity, SeamDiscontinuity
from musicgen_eval.metrics.plugin.contract import MetricEntry
from tests.support.continuations import (
    HOP,
    NUM_FRAMES,
    RATE,
    TEXTS,
    continued,
    decoded,
    encoded,
    nll_of,
    same,
    wave_of,
    witness,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]


def test_nll_is_given_for_continuation_and_reference(songs, model):
    metric, seen = witness("nll", "nll__reference", "codes", "codes__reference", "scored", "rank", "frame_rate_hz")
    result = continued(songs, model, metrics={"witness": metric}, batch_size=3)
    for one in result.continuations:
        track, context = one.window.track, one.window.context_frames
        given = seen[track, 0]
        assert torch.equal(given["codes"], one.codes)
        assert same(given["nll"], nll_of(model, one.codes, context, TEXTS[track]))
        assert torch.equal(given["scored"], given["nll"].isfinite())
        whole = encoded(model, wave_of(songs, track))
        true = torch.cat([one.codes[:, :context], whole[:, context:]], dim=1)
        assert torch.equal(given["codes__reference"], true)
        assert same(given["nll__reference"], nll_of(model, true, context, TEXTS[track]))
        assert given["frame_rate_hz"] == 50
        assert given["window"] == one.window


def test_perplexity_includes_all_continuations_and_all_references(songs, model):
    metrics = {
        "perplexity": CodebookPerplexity(),
        "true": MetricEntry(CodebookPerplexity(), {"nll": "nll__reference"}),
    }
    result = continued(songs, model, metrics=metrics)
    sums, counts = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4)
    for one in result.continuations:
        context = one.window.context_frames
        whole = encoded(model, wave_of(songs, one.window.track))
        for row, target in enumerate((one.codes, whole)):
            codes = torch.cat([one.codes[:, :context], target[:, context:]], dim=1)
            nll = nll_of(model, codes, context, one.text)
            sums[row] += nll.double().nansum(1)
            counts[row] += nll.isfinite().sum(1)
    for name, ce in zip(metrics, (sums / counts).mean(1), strict=True):
        values = result.evaluation.metrics[name]
        assert values["ce"].value == pytest.approx(ce.item(), abs=1e-5)
        assert values["ppl"].num_tracks == 4


def test_codes_beyond_the_limit_are_scored_in_the_window_in_which_they_were_drawn(long_song, short_model):
    metric, seen = witness("nll", "nll__reference")
    result = continued(long_song, short_model, stride_s=0.6, text="drums", metrics={"witness": metric})
    (one,) = result.continuations
    wave = torch.from_numpy(soundfile.read(long_song, dtype="float32")[0])[None]
    true = one.codes[:, :20]
    nll, true_nll = torch.full((2, 4, 120), float("nan"))
    for start, known, end in [(0, 20, 50), (30, 50, 80), (60, 80, 110), (90, 110, 120)]:
        nll[:, known:end] = nll_of(short_model, one.codes[:, start:end], 0, "drums")[:, known - start :]
        window = encoded(short_model, wave[:, (80 + start) * HOP : (80 + end) * HOP])
        true = torch.cat([true, window[:, known - start :]], dim=1)
        true_nll[:, known:end] = nll_of(short_model, true[:, start:end], 0, "drums")[:, known - start :]
    assert same(seen["long.wav", 0]["nll"], nll)
    assert same(seen["long.wav", 0]["nll__reference"], true_nll)


def test_no_text_is_scored_if_there_is_a_text(songs, model):
    metric, seen = witness("nll", "nll__no_text")
    for one in continued(songs, model, metrics={"witness": metric}).continuations:
        found = seen[one.window.track, 0]["nll__no_text"]
        if one.text is None:
            assert found.isnan().all()
        else:
            assert same(found, nll_of(model, one.codes, one.window.context_frames, None))


def test_audio_metrics_of_torchmetrics_compare_continuation_and_reference(songs, model):
    stock = {"snr": SignalNoiseRatio(), "sdr": ScaleInvariantSignalDistortionRatio()}
    result = continued(songs, model, metrics=stock, context_s=0.3, duration_s=0.5)
    by_hand = {"snr": SignalNoiseRatio(), "sdr": ScaleInvariantSignalDistortionRatio()}
    for one in result.continuations:
        reference = wave_of(songs, one.window.track)[:, 15 * HOP : 40 * HOP]
        assert one.reference.shape == reference.shape == (1, min(25, NUM_FRAMES[one.window.track] - 15) * HOP)
        for name, metric in by_hand.items():
            metric.update(one.generated[:, : reference.shape[1]], reference)
            alone = type(metric)()
            alone.update(one.generated[:, : reference.shape[1]], reference)
            track = next(track for track in result.evaluation.tracks if track.id == one.window.track)
            assert track.metrics[name]["value"] == pytest.approx(alone.compute().item(), rel=1e-5)
    for name, metric in by_hand.items():
        assert result.evaluation.metrics[name]["value"].value == pytest.approx(metric.compute().item(), rel=1e-5)


def test_there_is_no_reference_beyond_the_end_of_a_track(songs, model):
    metric, seen = witness("nll", "nll__reference")
    result = continued(
        songs, model, context_s=0.74, duration_s=0.4, limit=3,
        metrics={"snr": SignalNoiseRatio(), "ppl": CodebookPerplexity(), "witness": metric},
    )  # fmt: skip
    by_track = {one.window.track: one for one in result.continuations}
    assert by_track["song 1"].reference is None  # 37 frames, all of them context
    assert by_track["song 0"].reference.shape == (1, 13 * HOP)
    assert by_track["song 2"].reference.shape == (1, 20 * HOP)
    assert all(one.generated.shape == (1, 20 * HOP) for one in result.continuations)
    values = result.evaluation.metrics
    assert (values["snr"]["value"].num_tracks, values["ppl"]["ppl"].num_tracks) == (2, 3)
    expected = SignalNoiseRatio()
    for track in ("song 0", "song 2"):
        one = by_track[track]
        expected.update(one.generated[:, : one.reference.shape[1]], one.reference)
    assert values["snr"]["value"].value == pytest.approx(expected.compute().item(), rel=1e-5)
    assert seen["song 1", 0]["nll__reference"].isnan().all()
    true = seen["song 0", 0]["nll__reference"]
    assert true[:, 37:50].isfinite().all()
    assert true[:, :37].isnan().all()
    assert true[:, 50:].isnan().all()


def test_a_run_without_any_reference_works_and_has_no_audio_metrics(songs, model, tmp_path):
    result = continued(
        songs.parent / "3.wav", model, context_s=0.4, duration_s=0.2, run_dir=tmp_path / "x",
        metrics={
            "snr": SignalNoiseRatio(), "ppl": CodebookPerplexity(),
            "true": MetricEntry(SeamDiscontinuity(), {"generated": "reference_decoded"}),
        },
    )  # fmt: skip
    assert result.evaluation.metrics["snr"] == result.evaluation.metrics["true"] == {}
    assert result.evaluation.metric_errors == {}
    assert result.evaluation.metrics["ppl"]["ppl"].num_tracks == 1
    assert result.continuations[0].reference_path is None
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["counts"]["tracks_ok"] == 1


def test_metrics_receive_the_audio_that_they_name(songs, model):
    names = (
        "generated",
        "reference",
        "context",
        "context_decoded",
        "reference_decoded",
        "sample_rate_hz",
        "text",
        "codes",
    )
    metric, seen = witness(*names)
    for one in continued(songs, model, metrics={"witness": metric}, batch_size=3).continuations:
        given, num_context = seen[one.window.track, 0], one.window.context_frames * HOP
        for name in ("generated", "reference", "context"):
            assert torch.equal(given[name], getattr(one, name))
        whole = decoded(model, one.codes)
        assert torch.equal(given["context_decoded"], whole[:, :num_context])
        assert torch.equal(given["generated"], whole[:, num_context:])
        true = encoded(model, wave_of(songs, one.window.track))
        true = torch.cat([one.codes, true], dim=1)[
            :, [*range(one.window.context_frames), *range(-one.window.target_frames, 0)]
        ]
        assert torch.equal(given["reference_decoded"], decoded(model, true)[:, num_context:])
        assert (given["sample_rate_hz"], given["text"]) == (RATE, one.text)
        assert torch.equal(given["codes"], one.codes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nll__no_context", r"asks for the reading 'no_context' .*did you mean no_text"),
        ("generatd", r"asks for 'generatd', which predict does not provide; did you mean generated"),
        ("generated__no_text", r"asks for 'generated__no_text', which predict does not provide"),
        ("something", r"asks for 'something', which predict does not provide; known: .*generated"),
    ],
)
def test_an_input_that_predict_does_not_offer_is_refused_before_any_audio_is_opened(model, name, message):
    with pytest.raises(MetricError, match=message):
        continued("/nowhere", model, metrics={"m": witness(name)[0]})
