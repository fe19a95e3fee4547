from io import StringIO

from rich.console import Console

from musicgen_eval.results.evaluation_result import EvaluationResult, TrackResult, Value
from musicgen_eval.results.terminal import MAX_TRACK_ROWS, print_result
from tests.support.specs import codec_spec

SPEC = codec_spec(num_codebooks=1, codebook_size=64)


def printed(num_tracks=1, track="song [live].mp3", metrics=None, errors=None):
    value = Value(2.5, "nats", 2.0, 3.0, 1)
    keys = ("ppl", "ce", "bits_per_second", "ppl_q1", "ce_q1")
    ours = {"perplexity": dict.fromkeys(keys, value)}
    result = EvaluationResult(
        metrics={**ours, **(metrics or {})},
        tracks=[
            TrackResult(track, "x", None, "ok", "", 1.0, 1, {"perplexity": {"ppl": 2.5}}) for _ in range(num_tracks)
        ],
        windows=[],
        counts={"tracks_ok": 1, "tracks": 1, "tracks_failed": 0, "tracks_too_short": 0, "tracks_skipped": 0, "windows": 1,
                "scored_seconds": 1.0},
        failures=[],
        recipe={"checkpoint": "[b]odd[/b]", "precision": "32-true", "device": "cpu"},
        spec=SPEC,
        metric_errors=errors or {},
    )  # fmt: skip
    out = StringIO()
    print_result(result, Console(file=out, width=100))
    return out.getvalue()


def test_names_are_not_interpreted_as_markup():
    text = printed()
    assert "song [live].mp3" in text
    assert "[b]odd[/b]" in text
    assert "a [/b].wav" in printed(track="a [/b].wav")


def test_perplexity_is_printed_with_its_ceiling_and_interval():
    text = printed()
    assert "300" in text  # 50 frames x log2(64) bits
    assert "2.00 to 3.00" in text


def test_other_metrics_and_metric_errors_are_printed():
    text = printed(metrics={"odd": {"ppl": Value(7.125, "", None, None, 1)}}, errors={"broken": "ValueError('no')"})
    assert "odd/ppl" in text
    assert "7.1250" in text
    assert "metric broken could not be computed: ValueError('no')" in text


def test_a_long_track_table_is_shortened_with_a_note():
    assert f"the first {MAX_TRACK_ROWS} of {MAX_TRACK_ROWS + 5}" in printed(MAX_TRACK_ROWS + 5)
