"""Estimates the tempo of a clip with the beat tracker beat-this, which is an optional package."""

from __future__ import annotations

from functools import cache
from hashlib import file_digest
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.clip_audio import check_audio, check_sample_rate, to_mono
from musicgen_eval.metrics.tempo_estimate import DIFFERENT, TempoEstimate

INSTALL = "pip install 'musicgen-eval[tempo]'"
SMALL0_URL = "https://cloud.cp.jku.at/public.php/dav/files/7ik4RrBKTS273gp/small0.ckpt"
SMALL0_SHA256 = "6074be2c4d490c5f6101fcc374a1ec72ae93456e23bb6019783b849f5dc7d47b"
MIN_BEATS = 5
MIN_REGULARITY = 0.75


class BeatTracker:
    """The beat tracker beat-this on the CPU. It is loaded when it is used for the first time.

    Args:
        checkpoint: `small0` (8 MB), which is downloaded once into the cache of torch.hub, or the path of a checkpoint file of
            beat-this. The package loads files with `weights_only=True`, so they cannot execute code.

    Raises:
        MetricError: The package beat-this is not installed, or the checkpoint is missing or is not the published one.

    Source: Foscarin et al., Beat this! (ISMIR 2024, arXiv 2407.21658); beat-this 1.1.0.
    """

    def __init__(self, checkpoint: str = "small0") -> None:
        if find_spec("beat_this") is None:
            raise MetricError(
                f"estimator 'beat_this' needs the package beat-this, which is not installed; install it with {INSTALL}, "
                "or set estimator to 'autocorrelation'"
            )
        self.checkpoint = checkpoint

    def estimate(self, audio: Tensor, *, sample_rate_hz: int) -> TempoEstimate | None:
        """Estimates the tempo of (C, N) audio from the median interval between its beats.

        There is one tempo, with a weight of 1. The clarity is the share of intervals that differ by at most 8% from the median. The
        estimate is confident if the clarity is at least 0.75 and there are at least 5 beats.

        Args:
            audio: (C, N) floating-point audio, mixed to mono.
            sample_rate_hz: Sample rate of the audio.

        Returns:
            The estimate. None if the audio is shorter than 1 s, or if the tracker found fewer than two beats.
        """
        check_audio("BeatTracker", audio=audio)
        check_sample_rate("BeatTracker", sample_rate_hz)
        if audio.shape[1] < sample_rate_hz:
            return None
        track = _load(self.checkpoint)
        beats, _ = track(to_mono(audio).float().cpu().numpy(), sample_rate_hz)
        return tempo_of_beats([float(beat) for beat in beats])


def tempo_of_beats(beats_s: list[float]) -> TempoEstimate | None:
    """Returns the tempo of beats at ascending times in seconds, as `BeatTracker.estimate` defines it.

    >>> tempo_of_beats([0.0, 0.5, 1.0, 1.5, 2.0])
    TempoEstimate(tempi_bpm=(120.0,), weight=1.0, clarity=1.0, is_confident=True)
    """
    intervals = [after - before for before, after in pairwise(beats_s)]
    if not intervals:
        return None
    middle = median(intervals)
    regularity = sum(abs(interval / middle - 1) <= DIFFERENT for interval in intervals) / len(intervals)
    return TempoEstimate(
        tempi_bpm=(60 / middle,),
        weight=1.0,
        clarity=regularity,
        is_confident=regularity >= MIN_REGULARITY and len(beats_s) >= MIN_BEATS,
    )


@cache
def _load(checkpoint: str) -> Any:
    """Returns a function from (N,) float32 samples and a sample rate to the times of beats and downbeats in seconds.

    The function is loaded once per process, for all metrics and their copies.
    """
    from beat_this.inference import Audio2Beats

    path = _small0() if checkpoint == "small0" else Path(checkpoint)
    if not path.is_file():
        raise MetricError(
            f"beat_this: the checkpoint {path} does not exist; pass 'small0' or the path of a checkpoint file"
        )
    return Audio2Beats(checkpoint_path=str(path), device="cpu")


def _small0() -> Path:
    """Returns the path of the checkpoint small0, which is downloaded if necessary, and checks its content."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / "beat_this-small0.ckpt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(SMALL0_URL, str(path), progress=False)
        except OSError as error:
            raise MetricError(
                f"beat_this: cannot download {SMALL0_URL} ({error}); download it elsewhere and save it as {path}"
            ) from error
    with path.open("rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    if found != SMALL0_SHA256:
        raise MetricError(
            f"beat_this: {path} has the SHA-256 {found}, expected {SMALL0_SHA256}; delete the file, so that it is downloaded again"
        )
    return path
