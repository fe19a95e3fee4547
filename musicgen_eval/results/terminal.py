"""Prints results as tables on a terminal."""

from collections.abc import Mapping, Sequence
from math import isfinite, log, log2
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from musicgen_eval.files.redaction import redact
from musicgen_eval.results.evaluation_result import EvaluationResult, Value

MAX_TRACK_ROWS = 40


def print_result(result: EvaluationResult, console: Console, *, files: Sequence[Path] = ()) -> None:
    """Prints the metrics and the tracks as tables, followed by the counts and the paths of the written files."""
    for name, values in result.metrics.items():
        if _is_perplexity(values):
            console.print(_perplexity_table(name, values, result))
    others = {name: values for name, values in result.metrics.items() if not _is_perplexity(values)}
    if any(others.values()):
        console.print(_metric_table(others))
    for name, reason in result.metric_errors.items():
        console.print(f"metric {name} could not be computed: {redact(reason)}", markup=False)
    console.print(_track_table(result))
    console.print(_counts_line(result), highlight=False)
    if files:
        console.print("wrote")
        for path in files:
            console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)


def _is_perplexity(values: Mapping[str, Value]) -> bool:
    return {"ppl", "ce", "bits_per_second", "ppl_q1", "ce_q1"} <= values.keys()


def _perplexity_table(name: str, values: Mapping[str, Value], result: EvaluationResult) -> Table:
    spec = result.spec
    table = Table(title=escape(redact(f"{name}: {result.recipe.get('checkpoint', '')}")), title_justify="left")
    for heading in ("codebook", "ce (nats)", "ppl", "bits/s", "ceiling", "95% of ppl"):
        table.add_column(heading, justify="left" if heading == "codebook" else "right", no_wrap=True)
    bits = spec.frame_rate_hz / log(2)
    for k in range(1, spec.num_codebooks + 1):
        ce, ppl = values[f"ce_q{k}"], values[f"ppl_q{k}"]
        ceiling = spec.frame_rate_hz * log2(spec.codebook_size)
        table.add_row(
            str(k),
            _number(ce.value, 4),
            _number(ppl.value, 2),
            _number(ce.value * bits, 1),
            f"{ceiling:.0f}",
            _interval(ppl),
        )
    table.add_section()
    table.add_row(
        "all",
        _number(values["ce"].value, 4),
        _number(values["ppl"].value, 2),
        _number(values["bits_per_second"].value, 1),
        f"{spec.ceiling_bits_per_second:.0f}",
        _interval(values["ppl"]),
        style="bold",
    )
    return table


def _metric_table(metrics: Mapping[str, Mapping[str, Value]]) -> Table:
    table = Table(title="other metrics", title_justify="left")
    for heading in ("metric", "value", "unit", "95% interval"):
        table.add_column(heading, justify="right" if heading in ("value", "95% interval") else "left")
    for name, values in metrics.items():
        for key, value in values.items():
            label = name if key == "value" else f"{name}/{key}"
            table.add_row(escape(label), _number(value.value, 4), value.unit, _interval(value, digits=4))
    return table


def _track_table(result: EvaluationResult) -> Table:
    keys = [(name, "ppl") for name, values in result.metrics.items() if _is_perplexity(values)]
    table = Table(title="tracks", title_justify="left")
    table.add_column("track", overflow="fold")
    table.add_column("seconds", justify="right")
    table.add_column("continuations" if "generated_seconds" in result.counts else "windows", justify="right")
    for name, key in keys:
        table.add_column(f"{name} {key}", justify="right")
    table.add_column("status")
    for track in result.tracks[:MAX_TRACK_ROWS]:
        numbers = [_number(track.metrics.get(name, {}).get(key, float("nan")), 2) for name, key in keys]
        status = track.status if track.status == "ok" else escape(redact(f"{track.status}: {track.reason}"))
        table.add_row(escape(redact(track.id)), f"{track.duration_s:.2f}", str(track.num_windows), *numbers, status)
    if len(result.tracks) > MAX_TRACK_ROWS:
        table.caption = f"the first {MAX_TRACK_ROWS} of {len(result.tracks)} tracks; tracks.csv lists all tracks"
    return table


def _counts_line(result: EvaluationResult) -> str:
    counts = result.counts
    left_out = ", ".join(
        f"{counts[f'tracks_{name}']} {name.replace('_', ' ')}" for name in ("failed", "too_short", "skipped")
    )
    if "generated_seconds" in counts:
        done = f"{counts['windows']} continuation{'s' * (counts['windows'] != 1)}, {counts['generated_seconds']:.2f} s generated"
    else:
        done = f"{counts['windows']} windows, {counts['scored_seconds']:.2f} s scored"
    return (
        f"{counts['tracks_ok']} of {counts['tracks']} tracks ({left_out}), {done}, "
        f"{result.recipe['precision']} on {result.recipe['device']}"
    )


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if isfinite(value) else "-"


def _interval(value: Value, digits: int = 2) -> str:
    return "-" if value.low is None or value.high is None else f"{value.low:.{digits}f} to {value.high:.{digits}f}"
