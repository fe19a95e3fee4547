"""Section `tests`: the tests that require a GPU, in a separate process."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tools.gpu.findings import Findings
from tools.gpu.machine import ROOT
from tools.gpu.sections import Check

MARGIN_S = 2.0


def run(check: Check, findings: Findings) -> None:
    """Runs pytest, and records its counts and the end of its output."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfEs", "--tb=short", *check.sizes.tests]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    limit_s = max(1.0, check.left_s - MARGIN_S)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=limit_s)
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as stop:
        output, status = stop.stdout or b"", None
    text = output.decode(errors="replace")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    findings.add(
        "Tests",
        files=" ".join(check.sizes.tests),
        **{key: counts.get(key, 0) for key in ("passed", "failed", "skipped")},
    )
    for line in text.splitlines():
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            findings.add("Not passed", test=line[:200])
    if status != 0 or not counts.get("passed"):
        headline = (
            f"pytest was stopped after {limit_s:.0f} s"
            if status is None
            else f"pytest ended with status {status}, and {counts.get('passed', 0)} tests passed"
        )
        findings.failures.append(f"{headline}\n\n{text[-8000:]}")
