"""The demo's clips, and continuations of them."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import musicgen_eval
from musicgen_eval.audio.reader import open_track
from musicgen_eval.data.plan_builder import DEMO_SOURCE
from musicgen_eval.inference.batch_continuation import continue_windows
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.records import Continuation
from song_similarity.distances import SAMPLE_RATE_HZ

STRIDE_FRAMES = 300  # 3/5 of the demo's max_frames, 500


@dataclass(frozen=True)
class Clip:
    """A clip of the demo.

    Attributes:
        id: Name of the clip.
        path: Audio file.
        text: Description.
        audio: (1, N) at 32 kHz.
    """

    id: str
    path: Path
    text: str
    audio: Tensor


def demo_clips() -> list[Clip]:
    """Reads the held-out clips of the package."""
    with DEMO_SOURCE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    clips = []
    for row in rows:
        track = open_track(DEMO_SOURCE.parent / row["path"])
        audio = track.read(0, track.num_frames(50) * 640, sample_rate_hz=SAMPLE_RATE_HZ, channels=1)
        clips.append(Clip(row["id"], DEMO_SOURCE.parent / row["path"], row["text"], audio))
    return clips


def continue_clips(
    model: MusicGen,
    clips: Sequence[Clip],
    *,
    texts: Sequence[str] | None = None,
    duration_s: float | None = 4.0,
    context_s: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[Continuation]:
    """Continues clips with `generate`. The random numbers of a clip do not depend on its text.

    Args:
        model: Loaded model.
        clips: Clips to continue.
        texts: Text of each clip; "" means no text. None means the clips' own texts.
        duration_s: Length of the continuations in seconds. None means to the end of the clip.
        context_s: Boundary in seconds. None means the middle of the clip.
        seed: Seed of the random numbers.
        **settings: Other arguments of `generate`.

    Returns:
        The continuations in the order of the clips.
    """
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.csv"
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "id", "text"])
            for clip, text in zip(clips, texts or [clip.text for clip in clips], strict=True):
                writer.writerow([clip.path, clip.id, text])
        result = musicgen_eval.generate(
            manifest,
            checkpoint=model,
            context_s=context_s,
            duration_s=duration_s,
            seed=seed,
            threads=1,
            accelerator="cpu",
            batch_size=16,
            **settings,
        )
    return list(result.continuations)


def continued_in_one_window(model: MusicGen, continuations: Sequence[Continuation], *, num_frames: int) -> list[Tensor]:
    """Generates continuations once more in a single window, with the same prompts, texts and random numbers.

    Args:
        model: Model loaded with max_frames = num_frames.
        continuations: Continuations whose prompts, texts and seeds are used.
        num_frames: Length of the window.

    Returns:
        (K, T) codes of each prompt and continuation.
    """
    assert model.spec.max_frames == num_frames
    return continue_windows(
        model,
        [one.codes[:, : one.window.context_frames] for one in continuations],
        [one.window for one in continuations],
        texts=[one.text for one in continuations],
        settings=ContinuationSettings(threads=1),
        stride_frames=STRIDE_FRAMES,
        seed=continuations[0].seed,
    )
