"""Section `determinism`: byte-wise comparison of the results of two equal runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from musicgen_eval.api import generate, perplexity
from tools.gpu.findings import Findings
from tools.gpu.sections import Check

MAY_DIFFER = ("run.json", "journal", ".musicgen_eval.lock")
"""Files of a run folder that contain dates, versions or process ids."""


def run(check: Check, findings: Findings) -> None:
    """Scores and continues the demo's clips twice in each precision."""
    accelerator = "gpu" if check.device.type == "cuda" else "cpu"
    common: dict[str, Any] = {"accelerator": accelerator, "limit": check.sizes.demo_tracks, "batch_size": 4}
    tasks: dict[str, Callable[..., Any]] = {
        "test": lambda **settings: perplexity("demo", **common, **settings),
        "predict": lambda **settings: generate("demo", duration_s=2.0, context_s=3.0, **common, **settings),
    }
    findings.note(f"Compared: all files of the run folders but {', '.join(MAY_DIFFER)}.")
    for precision in check.sizes.precisions:
        for name, task in tasks.items():
            with findings.case("Two equal runs", task=name, precision=precision) as row:
                with tempfile.TemporaryDirectory() as scratch:
                    folders = [Path(scratch) / number for number in ("first", "second")]
                    for folder in folders:
                        task(precision=precision, run_dir=folder)
                    contents = [_contents(folder) for folder in folders]
                names = sorted({*contents[0], *contents[1]})
                differing = [name for name in names if contents[0].get(name) != contents[1].get(name)]
                row.update(files=len(names), differing=", ".join(differing) or "none")
                if differing or not names:
                    raise ValueError(f"files differ: {', '.join(differing)}" if names else "the runs left no files")


def _contents(folder: Path) -> dict[str, bytes]:
    """Returns name -> content of the files that must be equal."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in MAY_DIFFER
    }
