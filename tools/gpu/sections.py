"""Runs sections one after the other, each within its time budget. A failed section does not stop the next one."""

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
"""Seconds that a section reserves for each later shape."""
LEAST_S = 2.0
"""Sections with less remaining time than this are skipped, in seconds."""


@dataclass
class Check:
    """The settings of all sections, and the figures that later sections use.

    Attributes:
        device: Device to check.
        sizes: Sizes and numbers of the measurements.
        folder: Folder of the report.
        peaks: Name -> figure of the section `peaks`; empty before this section.
        ends_at: Time of `time.monotonic` at which the current section must end.
    """

    device: torch.device
    sizes: Sizes
    folder: Path
    peaks: dict[str, float] = field(default_factory=dict)
    ends_at: float = float("inf")

    @property
    def left_s(self) -> float:
        """Remaining seconds of the current section."""
        return self.ends_at - time.monotonic()

    def has_time(self, shapes_to_come: int) -> bool:
        """Returns True if a variant can be measured now and enough time remains for the later shapes."""
        return self.left_s > self.sizes.variant_s + SHAPE_S * shapes_to_come

    def share_of(self, peak: str, value: float) -> float | None:
        """Returns a figure as a share of a measured peak, or None if the peak was not measured."""
        found = self.peaks.get(peak)
        return value / found if found else None


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: Name of the section in `--sections`.
        title: Heading in the Markdown file.
        budget_s: Time limit in seconds.
        run: Function that measures and adds its findings.
    """

    name: str
    title: str
    budget_s: float
    run: Callable[[Check, Findings], None]


class OutOfTime(BaseException):
    """A section exceeded its time limit. This is not an `Exception`, so that no library catches it."""


def run_sections(
    check: Check, sections: Sequence[Section], *, budget_s: float, keep: Callable[[SectionResult], Any]
) -> list[SectionResult]:
    """Runs the sections.

    Args:
        check: Settings of the sections.
        sections: Sections, in order.
        budget_s: Time for all sections in seconds. Sections without remaining time are skipped.
        keep: Function that is called with each result as soon as it is available.

    Returns:
        Results in the order of the sections.
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
    """Raises `OutOfTime` in the block after some seconds, if the operating system has timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise OutOfTime(f"after {seconds:.0f} s")

    found = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(
        signal.ITIMER_REAL, seconds, 5.0
    )  # repeated every 5 s, since errors in destructors and callbacks are ignored
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, found)
