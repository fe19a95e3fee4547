"""The goals of the check, and the figures that were measured for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tools.gpu.findings import Row, SectionResult

CONTINUATION = "Decode steps"
SCORING = "Scored windows"
OURS = "this package, bfloat16"


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Attributes:
        goal: Description.
        table: Table with the figure.
        shape: Shape of the row.
        batch: Batch size of the row. None means any.
        variant: Variant of the row.
        column: Column with the figure.
        at_least: Smallest figure that reaches the goal.
    """

    goal: str
    table: str
    shape: str
    batch: int | None
    variant: str
    column: str
    at_least: float


GOALS = (
    Goal(
        "medium, batch 1: steps/s of fast-musicgen on an RTX 4090", CONTINUATION, "medium", 1, OURS, "steps_per_s", 130
    ),
    Goal("large, batch 1: share of the bandwidth", CONTINUATION, "large", 1, OURS, "share_of_bandwidth", 0.6),
    Goal("small, batch 1: share of the bandwidth", CONTINUATION, "small", 1, OURS, "share_of_bandwidth", 0.3),
    Goal("small, batch 32: share of the bandwidth", CONTINUATION, "small", 32, OURS, "share_of_bandwidth", 0.6),
    Goal("large, any batch: share of the bfloat16 peak in scoring", SCORING, "large", None, OURS, "share_of_peak", 0.5),
)


def reached_goals(results: Sequence[SectionResult]) -> list[Row]:
    """Returns a row per goal with the goal, the measured figure and the outcome."""
    rows = []
    for goal in GOALS:
        figures = [
            row[goal.column]
            for result in results
            for row in result.findings.tables.get(goal.table, [])
            if row.get("shape") == goal.shape
            and row.get("variant") == goal.variant
            and goal.batch in (None, row.get("batch"))
            and row.get(goal.column) is not None
        ]
        found = max(figures, default=None)
        share = "share_" if "share" in goal.column else ""
        rows.append(
            {
                "goal": goal.goal,
                "at_least": f"{goal.at_least:.0%}" if share else f"{goal.at_least:g}",
                "found": None if found is None else (f"{found:.0%}" if share else f"{found:.4g}"),
                "reached": "not measured" if found is None else ("yes" if found >= goal.at_least else "no"),
            }
        )
    return rows
