"""Measures the time and memory of planning a run, for manifests with few and with very many tracks and their durations.

    python -m benchmarks.start_up --rows 1000 1000000 --format csv jsonl parquet

Each size runs in its own process. The audio files of the manifest need not exist, because planning does not open files whose
`duration_s` is given.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MEASURE = """
import pickle, resource, sys, time
from pathlib import Path
import musicgen_eval.runs.datamodule, musicgen_eval.runs.module
from musicgen_eval.data.scoring_plan import plan_evaluation
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.records import CodecSpec
from musicgen_eval.data.index_builder import ProbeOptions

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

spec = CodecSpec(32000, 50, 640, 4, 2048, 1, (0, 1, 2, 3), 1500)
imported_mb = peak_mb()
start = time.perf_counter()
plan = plan_evaluation(DataSettings(source=sys.argv[1]), spec, ProbeOptions(index_path=Path(sys.argv[1] + ".npz")))
plan.source_digest
seconds = time.perf_counter() - start
planned_mb = peak_mb()
start = time.perf_counter()
num_bytes = len(pickle.dumps(plan, protocol=pickle.HIGHEST_PROTOCOL))
print(imported_mb, planned_mb, seconds, len(plan.windows), num_bytes / 1e6, time.perf_counter() - start)
"""


def main() -> None:
    """Measures the requested sizes and formats, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--format", choices=["csv", "jsonl", "parquet"], nargs="+", default=["csv"])
    parser.add_argument("--minutes", type=float, default=0.5, help="length of the longest track in minutes")
    arguments = parser.parse_args()
    print("format     rows  windows  imports MB  peak MB  plan s  second plan s  pickle MB  pickle s")
    with tempfile.TemporaryDirectory() as folder:
        for format in arguments.format:
            for num_rows in arguments.rows:
                path = Path(folder) / f"{num_rows}.{format}"
                write_manifest(path, num_rows, longest_s=60 * arguments.minutes)
                first, second = measure(path), measure(path)
                imported, peak, seconds, windows, sent, pickled = first
                print(
                    f"{format:7} {num_rows:7} {windows:8.0f}  {imported:10.0f}  {max(peak, second[1]):7.0f}  {seconds:6.2f}  "
                    f"{second[2]:13.2f}  {sent:9.1f}  {pickled:8.2f}",
                    flush=True,
                )
                path.unlink()


def measure(path: Path) -> list[float]:
    """Returns the figures of one start, measured in its own process."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()[-6:]]


def write_manifest(path: Path, num_rows: int, *, longest_s: float) -> None:
    """Writes a manifest with 1,000 tracks per folder, and a text and a duration in microseconds for each."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        columns = list(zip(*rows(num_rows, longest_s), strict=True))
        names = ["path", "text", "duration_s"]
        parquet.write_table(
            pyarrow.table({name: list(column) for name, column in zip(names, columns, strict=True)}), path
        )
        return
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.writer(file)
            writer.writerow(["path", "text", "duration_s"])
            writer.writerows(rows(num_rows, longest_s))
        else:
            for name, text, duration_s in rows(num_rows, longest_s):
                file.write(json.dumps({"path": name, "text": text, "duration_s": duration_s}) + "\n")


def rows(num_rows: int, longest_s: float) -> Iterator[tuple[str, str, float]]:
    """Yields (path, text, duration_s) of each row."""
    generator = random.Random(0)
    for row in range(num_rows):
        yield (
            f"{row // 1000:04}/{row:07}.flac",
            f"a calm piano piece, take {row}",
            round(generator.uniform(5, longest_s), 6),
        )


if __name__ == "__main__":
    main()
