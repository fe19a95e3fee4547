"""Runs sections one after the other, each within its time budget; a section that fails does not stop the next one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.gpu.findings import Findings, SectionResult, Status, described
from tools.gpu.sizes import Sizes

SHAPE_S = 15.0
"""Time that a section reserves for each shape to come."""
LEAST_S = 2.0
"""A section that would be given less time than this is skipped."""


@dataclass
class Check:
    """What the sections are given, and what one leaves for the next.

    Attributes:
        device: the device to check.
        sizes: what is measured, and how often.
        folder: folder of the report.
        peaks: figures of the `peaks` section, by name; empty until it has run.
        ends_at: when the running section should be complete, by `time.monotonic`.
    """

    device: torch.device
    sizes: Sizes
    folder: Path
    peaks: dict[str, float] = field(default_factory=dict)
    ends_at: float = float("inf")

    @property
    def left_s(self) -> float:
        """Seconds that the running section has left."""
        return self.ends_at - time.monotonic()

    def has_time(self, shapes_to_come: int) -> bool:
        """Whether a variant can be measured now, so that enough time is left for the shapes after this one."""
        return self.left_s > self.sizes.variant_s + SHAPE_S * shapes_to_come

    def share_of(self, peak: str, value: float) -> float | None:
        """A figure as a share of a measured peak; None if the peak was not measured."""
        found = self.peaks.get(peak)
        return value / found if found else None


@dataclass(frozen=True)
class Section:
    """One part of the check.

    Attributes:
        name: as in `--sections`.
        title: heading in the Markdown.
        budget_s: time that it may take.
        run: measures, and adds what it finds.
    """

    name: str
    title: str
    budget_s: float
    run: Callable[[Check, Findings], None]


class OutOfTime(BaseException):
    """Ends a section that has used up its budget. Not an `Exception`, so that no library catches it."""


def run_sections(
    check: Check, sections: Sequence[Section], *, budget_s: float, keep: Callable[[SectionResult], Any]
) -> list[SectionResult]:
    """Runs the sections.

    Args:
        check: what they are given.
        sections: in order.
        budget_s: time for all of them; those for which no time is left are skipped.
        keep: is called with each result as soon as it is there.

    Returns:
        The results, in order.
    """
    ends_at = time.monotonic() + budget_s
    results = []
    for section in sections:
        limit_s = min(section.budget_s, ends_at - time.monotonic())
        if limit_s < min(LEAST_S, section.budget_s):
            result = SectionResult(section.name, section.title, "skipped", 0.0, max(0.0, limit_s), Findings())
        else:
            result = _run_section(check, section, limit_s)
        results.append(result)
        keep(result)
    return results


def _run_section(check: Check, section: Section, limit_s: float) -> SectionResult:
    findings, error = Findings(), None
    start = time.monotonic()
    check.ends_at = start + limit_s
    status: Status
    try:
        with _alarm_after(limit_s):
            section.run(check, findings)
        status = "failed" if findings.failures else "passed"
    except OutOfTime as stop:
        status, error = "out of time", described(stop)
    except Exception as stop:
        status, error = "failed", described(stop)
    check.ends_at = float("inf")
    return SectionResult(
        section.name, section.title, status, time.monotonic() - start, limit_s, findings, error
    )  # fmt: skip


@contextmanager
def _alarm_after(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the block after so many seconds, where the system has timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise OutOfTime(f"after {seconds:.0f} s")

    found = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(
        signal.ITIMER_REAL, seconds, 5.0
    )  # again every 5 s: an error in a destructor or a callback is swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, found)
