"""Formats the figures as parts of `docs/by_hand.md`, inserts them between the page's markers, and compares them with the page.

    <!-- table -->
    ...                generated; everything outside of the markers is written by hand
    <!-- /table -->

Independent of models and audio.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from math import isinf

from by_hand import mistakes as scripts
from by_hand.asides import Leak, Sound
from by_hand.demo import Figure
from by_hand.mistakes import Mistake

SHORT = ("undelayed", "labels_undelayed", "mean_of_windows", "silence_scored")
MINUS = "\u2212"
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Row:
    """A mistake, its figure and the right figure."""

    mistake: Mistake
    figure: Figure
    right: Figure

    @property
    def ratio(self) -> float:
        """Ratio of the perplexity to the right perplexity."""
        return self.figure.ppl / self.right.ppl


@dataclass(frozen=True)
class Measured:
    """All figures of the page.

    Attributes:
        right: Figure of the package.
        right_by_hand: Figure of the four functions.
        right_without_text: Figure of the package without a text.
        rows: Mistakes.
        leak: Effect of the target on the codes of the context.
        sounds: Music, noise and silence.
        num_windows: Number of scored windows.
    """

    right: Figure
    right_by_hand: Figure
    right_without_text: Figure
    rows: list[Row]
    leak: Leak
    sounds: list[Sound]
    num_windows: int


def parts(measured: Measured) -> dict[str, str]:
    """Returns marker -> Markdown between the marker and its end."""
    return {
        "short": _short(measured),
        "loop": _loop(measured),
        "table": _table(measured),
        "mistakes": _mistakes(measured),
        "leak": _leak(measured.leak),
        "noise": _noise(measured.sounds),
    }


def fill(page: str, made: Mapping[str, str]) -> str:
    """Returns the page with each part between its markers.

    Raises:
        ValueError: A marker is missing or occurs twice.
    """
    for name, text in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page, num_found = pattern.subn(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)  # type: ignore[misc]
        if num_found != 1:
            raise ValueError(f"the page must contain <!-- {name} --> ... <!-- /{name} --> once, found {num_found}")
    return page


def differences(committed: str, measured: str) -> Iterator[str]:
    """Yields the lines with other words, or with a number that differs by more than one in its last printed digit."""
    old_lines, new_lines = committed.splitlines(), measured.splitlines()
    if len(old_lines) != len(new_lines):
        yield f"{len(old_lines)} lines, measured {len(new_lines)}"
    for old, new in zip(old_lines, new_lines, strict=False):
        same_words = NUMBER.sub("#", old) == NUMBER.sub("#", new)
        pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=False)
        if not same_words or not all(_same_number(*pair) for pair in pairs):
            yield f"page:     {old}\nmeasured: {new}"


def _same_number(old: str, new: str) -> bool:
    a, b = (Decimal(text.replace(",", "")) for text in (old, new))
    return abs(a - b) <= min(_last_digit(old), _last_digit(new))


def _last_digit(text: str) -> Decimal:
    """Returns the value of one unit in the last printed digit. Trailing zeros of a whole number do not count."""
    number = Decimal(text.replace(",", ""))
    shown = number if "." in text else number.normalize()
    return Decimal(1).scaleb(int(shown.as_tuple().exponent))


def _short(measured: Measured) -> str:
    rows = {row.mistake.measure.__name__: row for row in measured.rows}
    lines = [
        "| scored by hand, on the demo | perplexity | difference |",
        "|---|---:|---:|",
        f"| **as defined** | **{_ppl(measured.right.ppl)}** | |",
        *(f"| {rows[name].mistake.name} | {_ppl(rows[name].figure.ppl)} | {_change(rows[name])} |" for name in SHORT),
    ]
    return "\n".join(lines)


def _loop(measured: Measured) -> str:
    functions = (scripts.delayed, scripts.read, scripts.realigned, scripts.nats)
    source = "\n\n\n".join(inspect.getsource(function).rstrip() for function in functions)
    return (
        f"```python\n{source}\n```\n\n"
        f"Over the demo's {measured.num_windows} windows, the perplexity is {measured.right_by_hand.ppl:.4f}. "
        f"The package gives {measured.right.ppl:.4f}."
    )


def _table(measured: Measured) -> str:
    lines = ["| mistake | ppl | ce | right ppl | difference |", "|---|---:|---:|---:|---:|"]
    for group, rows in groupby(measured.rows, key=lambda row: row.mistake.group):
        lines.append(f"| **{group}** | | | | |")
        lines += [
            f"| {row.mistake.name} | {_ppl(row.figure.ppl)} | {row.figure.ce:.4f} | {_ppl(row.right.ppl)} | {_change(row)} |"
            for row in rows
        ]
    better = [row.mistake.name for row in measured.rows if row.ratio < 1]
    lines += ["", f"{len(better)} of {len(measured.rows)} make the model look better than it is: {'; '.join(better)}."]
    return "\n".join(lines)


def _mistakes(measured: Measured) -> str:
    blocks = []
    for group, rows in groupby(measured.rows, key=lambda row: row.mistake.group):
        blocks.append(f"### {group}")
        for row in rows:
            code = "\n".join(
                [f"- {line}" for line in row.mistake.right_lines] + [f"+ {line}" for line in row.mistake.lines]
            )
            against = "" if row.mistake.with_text else ", without texts"
            blocks.append(
                f"**{row.mistake.name[0].upper()}{row.mistake.name[1:]}.** {row.mistake.why}\n\n"
                f"```diff\n{code}\n```\n\n"
                f"{_ppl(row.figure.ppl)} instead of {_ppl(row.right.ppl)}{against}: {_change(row)}."
            )
    return "\n\n".join(blocks)


def _leak(leak: Leak) -> str:
    names = ("last", "second to last", "third to last", "fourth to last", "fifth to last", "sixth to last")
    lines = [
        "| frame of the context | " + " | ".join(f"codebook {k}" for k in range(1, leak.moved.shape[1] + 1)) + " |",
        "|---|" + "---:|" * leak.moved.shape[1],
        *(
            f"| {name} | " + " | ".join(f"{100 * share:.0f}%" for share in shares.tolist()) + " |"
            for name, shares in zip(names, leak.moved, strict=False)
        ),
        "",
        f"Share of codes that change, over {leak.num_windows} windows with a context. No code changed more than "
        f"{leak.frames_reached} frames before the target. The perplexity of the targets is {_ppl(leak.together.ppl)} "
        f"(ce {leak.together.ce:.4f}) if context and target are encoded together, and {_ppl(leak.alone.ppl)} "
        f"(ce {leak.alone.ce:.4f}) if the context is encoded alone: {_percent(leak.alone.ppl / leak.together.ppl)}.",
    ]
    return "\n".join(lines)


def _noise(sounds: list[Sound]) -> str:
    lines = ["| sound | ppl | ce | ce of each codebook | different codes in each |", "|---|---:|---:|---:|---:|"]
    for sound in sounds:
        shares = ", ".join(f"{ce:.2f}" for ce in sound.ce_per_codebook)
        in_use = ", ".join(str(num_codes) for num_codes in sound.codes_in_use)
        lines.append(f"| {sound.name} | {_ppl(sound.figure.ppl)} | {sound.figure.ce:.4f} | {shares} | {in_use} |")
    return "\n".join(lines)


def _ppl(ppl: float) -> str:
    """Formats a perplexity with two decimals, or with four digits if it is large."""
    return f"{ppl:.2f}" if isinf(ppl) or ppl < 1000 else f"{float(f'{ppl:.3e}'):,.0f}"


def _change(row: Row) -> str:
    if isinf(row.ratio):
        return "infinite"
    if row.ratio >= 11:
        return f"{_rounded(row.ratio)} times"
    return _percent(row.ratio) + (", looks better" if row.ratio < 1 else "")


def _percent(ratio: float) -> str:
    percent = 100 * (ratio - 1)
    digits = 1 if abs(percent) >= 1 else 2
    return f"{MINUS if percent < 0 else '+'}{abs(percent):.{digits}f}%"


def _rounded(ratio: float) -> str:
    """Formats a factor with two digits."""
    return f"{float(f'{ratio:.1e}'):,.0f}"
