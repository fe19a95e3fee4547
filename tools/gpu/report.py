"""The report of a check: a JSON file and a Markdown file, which are rewritten after each section."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from musicgen_eval.files.atomic import atomic_file
from tools.gpu.findings import Row, SectionResult
from tools.gpu.goals import reached_goals


@dataclass
class Report:
    """A report that grows section by section.

    Attributes:
        folder: Folder of the files.
        machine: Hardware and software versions.
        settings: Settings of the check.
        results: Results of the completed sections.
    """

    folder: Path
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: list[SectionResult] = field(default_factory=list)

    def add(self, result: SectionResult) -> None:
        """Adds a section and writes both files."""
        self.results.append(result)
        self.write()

    def write(self) -> None:
        """Writes both files. Each file is replaced as a whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "machine": self.machine,
            "settings": self.settings,
            "goals": reached_goals(self.results),
            "sections": [asdict(result) for result in self.results],
        }
        _write(self.folder / "gpu_check.json", json.dumps(content, indent=1, default=str) + "\n")
        _write(self.folder / "gpu_check.md", self.markdown())

    def markdown(self) -> str:
        """Returns the report in Markdown."""
        about = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in self.machine.items() if value is not None
        )
        sections = [
            {"section": result.name, "status": result.status, "s": result.seconds, "budget_s": result.budget_s}
            for result in self.results
        ]
        parts = ["# GPU check", about + ".", "## Goals", markdown_table(reached_goals(self.results))]
        parts += ["## Sections", markdown_table(sections)]
        for result in self.results:
            parts += [f"## {result.title}", *_section(result)]
        return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Row]) -> str:
    """Formats rows as a Markdown table, with columns in the order of their first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return "Nothing was measured."
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    lines += [[_cell(column, row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _section(result: SectionResult) -> list[str]:
    parts = [f"Status: {result.status}."] if result.status != "passed" else []
    parts += result.findings.notes
    for title, rows in result.findings.tables.items():
        parts += [f"### {title}", markdown_table(rows)]
    errors = [*result.findings.failures, *([result.error] if result.error else [])]
    return parts + [f"```\n{error.strip()}\n```" for error in errors]


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):  # a timing
        return f"{_number(value['median'])} ({_number(value['min'])} to {_number(value['max'])})"
    if isinstance(value, float):
        return f"{value:.0%}" if "share" in column else _number(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _write(path: Path, content: str) -> None:
    with atomic_file(path) as file:
        file.write(content)
