"""Checks and measures this package on one GPU, within eight minutes, and writes a JSON file and a Markdown table.

    python tools/gpu_check.py --out gpu-check                    everything
    python tools/gpu_check.py --sections peaks oracle tests      only these
    python tools/gpu_check.py --quick                            one shape, two batches, few repetitions

It runs from a checkout and needs no internet: the networks have the sizes of Meta's checkpoints and random weights. Sections:

    peaks          bandwidth and rates of matrix products that the device reaches; all shares refer to them
    oracle         differences from audiocraft's figures in every precision
    continuation   decode steps per second of demo, small, medium and large, compared with transformers and a plain loop
    scoring        windows per second of the same models, and of the encoder
    determinism    byte-wise comparison of two equal runs
    profile        kernels, launches and idle time of 50 decode steps
    tests          the tests that need a GPU
    options        eager, captured and compiled steps; cuDNN attention

Each section has a time budget. The report is written after each section. A section that fails or runs out of time keeps its
completed measurements, and the next section runs. The exit status is 1 if a section failed or ran out of time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "torch", "torchaudio", "transformers", "lightning", "torchmetrics", "jsonargparse", "numpy", "safetensors", "soundfile", "soxr",
    "tqdm", "rich", "pytest",
)  # fmt: skip
SECTIONS = ("peaks", "oracle", "continuation", "scoring", "determinism", "profile", "tests", "options")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="folder of the report (default: gpu-check)"
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        metavar="NAME",
        help="sections to run (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="measure one shape, two batches and few repetitions")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument(
        "--budget-s", type=float, default=480.0, metavar="S", help="seconds for all sections (default: 480)"
    )
    options = parser.parse_args(arguments)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        command = f"python -m pip install -c constraints.txt {' '.join(missing)}"
        print(f"gpu_check needs {', '.join(missing)}; install: {command}")
        return 2
    sys.path.insert(0, str(ROOT))
    from tools.gpu.command import check_device
    from tools.gpu.sizes import FULL, QUICK

    return check_device(
        options.device,
        folder=options.out,
        sizes=QUICK if options.quick else FULL,
        names=options.sections,
        budget_s=options.budget_s,
    )


if __name__ == "__main__":
    sys.exit(main())
