"""Audio files: what one holds, and any slice of it at any rate. `writing.py` writes them.

A slice read here equals the whole track decoded, mixed and resampled, and cut there. How each format gets there is told
in `decoders.py` and `resampling.py`. Nothing here knows about models, frames of codes, or sources of many files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from musicgen_eval.audio.decoding import AudioInfo, probe, read_native
from musicgen_eval.audio.resampling import RatePair, resample, resample_slice, resampler_name
from musicgen_eval.errors import AudioError
from musicgen_eval.files.printable import with_printable_errors

END_TOLERANCE_S = 0.001  # manifests round to milliseconds: an end this far behind the file's is the file's

__all__ = [
    "AudioInfo",
    "TrackAudio",
    "open_track",
    "probe",
    "resample",
    "resampler_name",
]

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
"""Rates of music; a damaged header can say any, and resampling from 1 Hz would take gigabytes."""


@dataclass(frozen=True)
class TrackAudio:
    """A part of a file, as if the file held nothing else.

    Attributes:
        info: the file.
        first_sample: where the part begins, in native samples.
        num_samples: how long it is, in native samples.
    """

    info: AudioInfo
    first_sample: int
    num_samples: int

    def num_frames(self, frame_rate_hz: int) -> int:
        """Whole frames in the track: floor(native samples * frame rate / native rate)."""
        return self.num_samples * frame_rate_hz // self.info.sample_rate_hz

    def num_samples_at(self, sample_rate_hz: int) -> int:
        """Samples of the track resampled to a rate: rounded up."""
        return RatePair(self.info.sample_rate_hz, sample_rate_hz).num_resampled(self.num_samples)

    @with_printable_errors
    def read(self, start_sample: int, num_samples: int, *, sample_rate_hz: int, channels: int) -> torch.Tensor:
        """A slice of the track: cut from the file, mixed, resampled whole, [start, start + num) cut from the result.

        Only the native samples that the slice depends on are read.

        Args:
            start_sample: first sample wanted, counted at `sample_rate_hz` from the track's start.
            num_samples: how many, at `sample_rate_hz`.
            sample_rate_hz: rate of the result.
            channels: 1 (the mean of the file's) or 2 (a mono file's twice).

        Returns:
            (channels, num_samples) float32.

        Raises:
            AudioError: outside the track, more than two channels, NaN or infinite samples, or a file that holds less
                than it declares.
        """
        _check_channels(self.info, channels)
        rates = RatePair(self.info.sample_rate_hz, sample_rate_hz)
        total = rates.num_resampled(self.num_samples)
        if start_sample < 0 or num_samples < 0 or start_sample + num_samples > total:
            raise AudioError(
                f"{self.info.path}: samples {start_sample} to {start_sample + num_samples} at {sample_rate_hz} Hz "
                f"are asked of a track that has {total}"
            )

        def read_mixed(start: int, num: int) -> torch.Tensor:
            # (N, C) -> (1 or C, N). The mean comes before the resampler: the same to 1e-7, and half the work.
            native = torch.from_numpy(read_native(self.info, self.first_sample + start, num)).T
            return native.mean(dim=0, keepdim=True) if channels == 1 else native.contiguous()

        audio = resample_slice(
            read_mixed, num_native=self.num_samples, start=start_sample, num_samples=num_samples, rates=rates
        )
        return audio.expand(channels, -1).contiguous()


@with_printable_errors
def open_track(
    path: str | Path, *, start_s: float = 0.0, duration_s: float | None = None, info: AudioInfo | None = None
) -> TrackAudio:
    """A file, or a part of it.

    Start and end are rounded to the nearest native sample, so that parts that touch share no sample. An end up to 1 ms
    (or one sample) behind the file's is taken for the file's: manifests round.

    Args:
        path: the file.
        start_s: where the track begins, in seconds.
        duration_s: how long it is, in seconds; None: to the end of the file.
        info: what `probe` gave for this file, where it is at hand.

    Raises:
        AudioError: as `probe`; more than two channels; a start or an end outside the file.
    """
    info = probe(path) if info is None else info
    _check_channels(info, 2)
    if not MIN_RATE_HZ <= info.sample_rate_hz <= MAX_RATE_HZ:
        raise AudioError(
            f"{info.path}: a sample rate of {info.sample_rate_hz} Hz; expected {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz"
        )
    rate_hz, seconds = info.sample_rate_hz, info.num_samples / info.sample_rate_hz
    end_s = seconds if duration_s is None else start_s + duration_s
    if not (0 <= start_s < min(end_s, seconds) and end_s < float("inf")):
        asked = "the end" if duration_s is None else f"{end_s:g} s"
        raise AudioError(f"{info.path}: {start_s:g} s to {asked} is no part of a file of {seconds:.3f} s")
    first, end = int(start_s * rate_hz + 0.5), int(end_s * rate_hz + 0.5)
    if duration_s is None:
        end = info.num_samples
    if end > info.num_samples + max(1, int(END_TOLERANCE_S * rate_hz)):
        raise AudioError(f"{info.path}: the track ends at {end_s:g} s and the file at {seconds:.3f} s")
    end = min(end, info.num_samples)
    if first >= end:
        raise AudioError(f"{info.path}: no sample between {start_s:g} s and {end_s:g} s")
    return TrackAudio(info, first, end - first)


def _check_channels(info: AudioInfo, channels: int) -> None:
    if channels not in (1, 2):
        raise AudioError(f"{info.path}: {channels} channels are asked for; the models take 1 or 2")
    if info.num_channels > 2:
        raise AudioError(
            f"{info.path}: {info.num_channels} channels; expected 1 or 2: mix it down, which no general rule can do"
        )
