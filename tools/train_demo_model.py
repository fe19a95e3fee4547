"""Reproduces the demo model from its seed: songs, codec, codes, decoder, checkpoint, clips, checks.

    python tools/train_demo_model.py --work /some/folder            # everything, under 90 minutes on 2 CPU cores
    python tools/train_demo_model.py --work /some/folder --stages export clips

Each stage writes its result to the work folder, so that later stages can run separately. `--quick` runs the same stages
in a few minutes, for a checkpoint that has the right shape and is hardly trained.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

STAGES = ("codec", "codes", "decoder", "export", "clips", "checks")
# `halves.py` runs in threads instead of OpenMP, and the allocator keeps freed memory. Both are read when a process starts.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def main() -> None:
    """Runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the intermediate results")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the package (default: this package; with --quick: a folder in the work folder)",
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to run (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="number of threads and processes (default: 2)")
    parser.add_argument("--quick", action="store_true", help="train for a few steps only")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    sys.path.insert(0, str(Path(__file__).parents[1]))
    arguments.work.mkdir(parents=True, exist_ok=True)
    out = arguments.out or (arguments.work if arguments.quick else Path(__file__).parents[1]) / "musicgen_eval"
    for stage in arguments.stages:
        start = time.monotonic()
        run_stage(stage, work=arguments.work, out=out, threads=arguments.threads, quick=arguments.quick)
        spent = round(time.monotonic() - start)
        print(f"{stage}: took {spent} s", flush=True)
        note = arguments.work / "seconds.json"
        seconds = json.loads(note.read_text()) if note.exists() else {}
        note.write_text(json.dumps({**seconds, stage: spent}))


def run_stage(stage: str, *, work: Path, out: Path, threads: int, quick: bool) -> None:
    """Runs one stage. Intermediate results are in the work folder, the checkpoint and the clips in `out`."""
    import torch
    from demo_model import card, checks, clips, codec, codes, decoder, export
    from demo_model.places import CLIPS, MODEL
    from safetensors.torch import load_file, save_file
    from transformers import MusicgenForConditionalGeneration

    torch.set_num_threads(threads if stage == "checks" else 1)
    codec_plan, decoder_plan = codec.CodecPlan(), decoder.DecoderPlan()
    if quick:
        codec_plan = codec.CodecPlan(
            num_songs=300, wave_steps=150, spectrum_steps=100, codebook_steps=200, decoder_steps=50
        )
        decoder_plan = decoder.DecoderPlan(num_songs=600, short_steps=200, long_steps=150)
    if stage == "codec":
        codec.train_codec(codec_plan).save_pretrained(work / "codec")
    elif stage == "codes":
        for name, first, count in (("train", 0, decoder_plan.num_songs), ("held_out", 900_000, 32)):
            numbers = range(first, first + count)
            found, texts = codes.encode_songs(
                work / "codec", numbers, num_frames=decoder_plan.song_frames, num_processes=threads
            )
            save_file({"codes": found}, work / f"codes_{name}.safetensors")
            (work / f"texts_{name}.txt").write_text("\n".join(texts))
    elif stage == "decoder":
        sets = [
            (
                load_file(work / f"codes_{name}.safetensors")["codes"],
                (work / f"texts_{name}.txt").read_text().split("\n"),
            )
            for name in ("train", "held_out")
        ]
        trained_codec = codes.load_codec(work / "codec")
        model = decoder.train_decoder(
            trained_codec, *sets[0], decoder_plan, held_out=sets[1], snapshot=work / "snapshot"
        )
        model.save_pretrained(work / "model")
    elif stage == "export":
        model = MusicgenForConditionalGeneration.from_pretrained(work / "model", dtype=torch.float32)
        export.export(model, out / MODEL)
    elif stage == "clips":
        clips.write_clips(out / CLIPS)
    elif stage == "checks":
        figures, costs = checks.run_checks(out / MODEL), checks.clip_costs(out)
        print(checks.table(figures), *costs, sep="\n", flush=True)
        card.write_card(out, figures, costs, json.loads((work / "seconds.json").read_text()))


if __name__ == "__main__":
    main()
