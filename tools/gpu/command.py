"""The list of all sections, and the function that runs them on a device."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from tools.gpu import (
    continuation_speed,
    cuda_tests,
    determinism,
    oracle,
    peaks,
    scoring_speed,
    step_options,
    step_profile,
)
from tools.gpu.findings import SectionResult
from tools.gpu.machine import machine
from tools.gpu.report import Report
from tools.gpu.sections import Check, Section, run_sections
from tools.gpu.sizes import Sizes

SECTIONS = (
    Section("peaks", "Peaks of the device", 20, peaks.run),
    Section("oracle", "Differences from audiocraft", 30, oracle.run),
    Section("continuation", "Continuation", 130, continuation_speed.run),
    Section("scoring", "Scoring", 90, scoring_speed.run),
    Section("determinism", "Two equal runs", 45, determinism.run),
    Section("profile", "Profile of decode steps", 25, step_profile.run),
    Section("tests", "Tests on this device", 90, cuda_tests.run),
    Section("options", "Options", 90, step_options.run),
)


def check_device(
    device: str,
    *,
    folder: Path,
    sizes: Sizes,
    names: Sequence[str],
    budget_s: float,
    sections: Sequence[Section] = SECTIONS,
) -> int:
    """Runs sections and writes the report.

    Args:
        device: Torch device.
        folder: Folder of the report.
        sizes: Sizes of the measurements.
        names: Names of the sections to run.
        budget_s: Time for all sections in seconds.
        sections: All sections, in order.

    Returns:
        Exit status: 0 if all sections passed or were skipped, 1 if a section failed or ran out of time, 2 without the device.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print(f"device {device}: torch {torch.__version__} finds no GPU; use --device cpu to try the tool without one")
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = [section for section in sections if section.name in names]
    check = Check(torch.device(device), sizes, folder)
    report = Report(
        folder, machine(check.device), {"sizes": asdict(sizes), "sections": list(names), "budget_s": budget_s}
    )
    report.write()
    start = time.monotonic()

    def keep(result: SectionResult) -> None:
        report.add(result)
        print(f"{result.name:13} {result.status:12} {result.seconds:6.1f} s", flush=True)
        for failure in [*result.findings.failures, *([result.error] if result.error else [])]:
            print(f"    {failure.splitlines()[0]}", flush=True)

    results = run_sections(check, chosen, budget_s=budget_s, keep=keep)
    print(f"{time.monotonic() - start:.0f} s; report: {folder / 'gpu_check.md'} and gpu_check.json", flush=True)
    return 1 if any(result.status in ("failed", "out of time") for result in results) else 0
