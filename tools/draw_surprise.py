"""Draws the nll of a demo clip per frame, above the mel spectrogram of the clip.

    python tools/draw_surprise.py                                    writes docs/images/surprise.png
    python tools/draw_surprise.py --track happy_04 --out figure.png

Requires matplotlib, which is part of the extra `dev`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchaudio

import musicgen_eval
from musicgen_eval.audio.reader import open_track
from musicgen_eval.data.plan_builder import DEMO_CLIPS

ROOT = Path(__file__).parents[1]
SMOOTHED_FRAMES = 25  # half a second
RATE_HZ = 32_000


def smoothed(values: np.ndarray, num_frames: int) -> np.ndarray:
    """Returns the mean over `num_frames` neighbouring values, or over fewer values at both ends."""
    kernel = np.ones(num_frames)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def draw(track: str, out: Path) -> None:
    """Scores the demo's clips and draws one of them.

    Args:
        track: Id of a clip in the demo's manifest.
        out: PNG file to write.
    """
    result = musicgen_eval.perplexity("demo", context_s=5, target_s=5, accelerator="cpu")
    nll = result.nll[track].numpy()
    frame_rate_hz = 50
    seconds = np.arange(nll.shape[1]) / frame_rate_hz
    surprise = nll.sum(0)

    path = next(DEMO_CLIPS.glob(f"{track}.*"))
    audio = open_track(path).read(0, nll.shape[1] * RATE_HZ // frame_rate_hz, sample_rate_hz=RATE_HZ, channels=1)
    mel = torchaudio.transforms.MelSpectrogram(RATE_HZ, n_fft=2048, hop_length=512, n_mels=96)(audio)[0]
    decibels = 10 * torch.log10(mel + 1e-6)

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 4.2), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    above.plot(seconds, surprise, color="#9db7d5", linewidth=0.6, label="each frame (20 ms)")
    above.plot(seconds, smoothed(surprise, SMOOTHED_FRAMES), color="#1f4e79", linewidth=1.6, label="mean over 0.5 s")
    above.set_ylabel("surprise (nats per frame)")
    above.set_ylim(bottom=0)
    above.legend(frameon=False, loc="upper right")
    above.set_title(f"Demo model on {track}: perplexity {result.ppl_per_track[track]:.2f}", loc="left")
    below.imshow(
        decibels, origin="lower", aspect="auto", extent=(0, seconds[-1], 0, decibels.shape[0]), cmap="magma", vmin=-40
    )
    below.set_ylabel("mel band")
    below.set_xlabel("time (s)")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", default="sad_09", help="id of a demo clip (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "surprise.png", help="file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    draw(options.track, options.out)


if __name__ == "__main__":
    main()
