"""Measures common mistakes of scoring MusicGen by hand on the demo, for docs/by_hand.md.

    python tools/make_by_hand.py            # prints the tables
    python tools/make_by_hand.py --write    # writes the figures into the page
    python tools/make_by_hand.py --check    # exits with status 1 if the page differs

This takes about a minute on 2 CPU cores, offline. The mistakes are in `by_hand/mistakes.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from by_hand import page
from by_hand.asides import measure_leak, measure_noise
from by_hand.demo import Demo
from by_hand.mistakes import MISTAKES, right_by_hand

PAGE = Path(__file__).parents[1] / "docs" / "by_hand.md"


def main() -> int:
    """Prints the figures, and writes them into the page or compares them with it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--write", action="store_true", help="write the figures into docs/by_hand.md")
    doing.add_argument("--check", action="store_true", help="compare the figures with docs/by_hand.md")
    arguments = parser.parse_args()
    made = page.parts(measure(Demo()))
    print("\n\n".join(made[name] for name in ("table", "leak", "noise")))
    committed = PAGE.read_text()
    measured = page.fill(committed, made)
    if arguments.write:
        PAGE.write_text(measured)
    elif arguments.check:
        found = list(page.differences(committed, measured))
        print("\n".join(["", *found, f"{PAGE.name}: {len(found)} differences"]))
        return 1 if found else 0
    return 0


def measure(demo: Demo) -> page.Measured:
    """Measures all figures of the page."""
    right, without_text = demo.right(), demo.right(with_text=False)
    return page.Measured(
        right=right,
        right_by_hand=right_by_hand(demo),
        right_without_text=without_text,
        rows=[page.Row(each, each.measure(demo), right if each.with_text else without_text) for each in MISTAKES],
        leak=measure_leak(demo),
        sounds=measure_noise(demo),
        num_windows=len(demo.pieces),
    )


if __name__ == "__main__":
    sys.exit(main())
