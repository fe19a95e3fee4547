"""Reads slices of audio files at any sample rate.

A slice is identical to the same part of the track when the whole track is decoded, mixed and resampled in one piece. `decoding.py`
and `resampling.py` describe how this is achieved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from musicgen_eval.audio.decoding import AudioInfo, probe, read_native
from musicgen_eval.audio.resampling import RatePair, resample, resample_slice, resampler_name
from musicgen_eval.errors import AudioError
from musicgen_eval.files.printable import with_printable_errors

END_TOLERANCE_S = (
    0.001  # manifests round times to milliseconds, so a declared end may lie this far past the end of the file
)

__all__ = [
    "AudioInfo",
    "TrackAudio",
    "open_track",
    "probe",
    "resample",
    "resampler_name",
]

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
"""Accepted sample rates. A damaged header can declare any rate, and resampling from 1 Hz would need gigabytes."""


@dataclass(frozen=True)
class TrackAudio:
    """Audio of a track. A track is an audio file or a part of an audio file.

    Attributes:
        info: Properties of the audio file.
        first_sample: Position in the file at which the track starts, in native samples.
        num_samples: Length of the track, in native samples.
    """

    info: AudioInfo
    first_sample: int
    num_samples: int

    def num_frames(self, frame_rate_hz: int) -> int:
        """Returns the number of whole frames in the track: floor(num_samples * frame_rate_hz / info.sample_rate_hz)."""
        return self.num_samples * frame_rate_hz // self.info.sample_rate_hz

    def num_samples_at(self, sample_rate_hz: int) -> int:
        """Returns the length of the track in samples at the given sample rate, rounded up."""
        return RatePair(self.info.sample_rate_hz, sample_rate_hz).num_resampled(self.num_samples)

    @with_printable_errors
    def read(self, start_sample: int, num_samples: int, *, sample_rate_hz: int, channels: int) -> torch.Tensor:
        """Returns a slice of the track, mixed to the given number of channels and resampled to the given rate.

        The result is identical to the same part of the track when the whole track is mixed and resampled in one piece. Only the
        native samples that the slice depends on are read.

        Args:
            start_sample: First sample of the slice, counted from the start of the track at `sample_rate_hz`.
            num_samples: Length of the slice, in samples at `sample_rate_hz`.
            sample_rate_hz: Sample rate of the result.
            channels: Number of channels of the result, 1 or 2. For 1, the channels of the file are averaged. For 2, the channel of
                a mono file is duplicated.

        Returns:
            (channels, num_samples) float32.

        Raises:
            AudioError: If the slice is not within the track, if the file has more than two channels or contains fewer samples
                than its header declares, or if a sample is NaN or infinite.
        """
        _check_channels(self.info, channels)
        rates = RatePair(self.info.sample_rate_hz, sample_rate_hz)
        total = rates.num_resampled(self.num_samples)
        if start_sample < 0 or num_samples < 0 or start_sample + num_samples > total:
            raise AudioError(
                f"{self.info.path}: samples {start_sample} to {start_sample + num_samples} at {sample_rate_hz} Hz "
                f"are outside the track, which has {total} samples"
            )

        def read_mixed(start: int, num: int) -> torch.Tensor:
            # (N, C) -> (1 or C, N). Averaging before resampling takes half the time, and changes the result by only 1e-7.
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
    """Opens an audio file, or a part of one, as a track.

    The start and the end are rounded to the nearest native sample, so adjacent parts of a file do not overlap. Because manifests
    contain rounded times, a track may end up to 1 ms (or one sample) after the end of the file. Such a track is shortened.

    Args:
        path: Path of the audio file.
        start_s: Time in the file at which the track starts, in seconds.
        duration_s: Length of the track, in seconds. None means up to the end of the file.
        info: Result of `probe` for this file. If None, `open_track` calls `probe`.

    Raises:
        AudioError: If `probe` fails, if the file has more than two channels or an unsupported sample rate, or if the track is not
            within the file.
    """
    info = probe(path) if info is None else info
    _check_channels(info, 2)
    if not MIN_RATE_HZ <= info.sample_rate_hz <= MAX_RATE_HZ:
        raise AudioError(
            f"{info.path}: the sample rate must be between {MIN_RATE_HZ} and {MAX_RATE_HZ} Hz, got {info.sample_rate_hz} Hz"
        )
    rate_hz, seconds = info.sample_rate_hz, info.num_samples / info.sample_rate_hz
    end_s = seconds if duration_s is None else start_s + duration_s
    if not (0 <= start_s < min(end_s, seconds) and end_s < float("inf")):
        asked_end = "the end" if duration_s is None else f"{end_s:g} s"
        raise AudioError(
            f"{info.path}: the track from {start_s:g} s to {asked_end} is outside the file, which lasts {seconds:.3f} s"
        )
    first, end = int(start_s * rate_hz + 0.5), int(end_s * rate_hz + 0.5)
    if duration_s is None:
        end = info.num_samples
    if end > info.num_samples + max(1, int(END_TOLERANCE_S * rate_hz)):
        raise AudioError(f"{info.path}: the track ends at {end_s:g} s, after the end of the file at {seconds:.3f} s")
    end = min(end, info.num_samples)
    if first >= end:
        raise AudioError(f"{info.path}: there are no samples between {start_s:g} s and {end_s:g} s")
    return TrackAudio(info, first, end - first)


def _check_channels(info: AudioInfo, channels: int) -> None:
    if channels not in (1, 2):
        raise AudioError(f"{info.path}: channels must be 1 or 2, got {channels}")
    if info.num_channels > 2:
        raise AudioError(
            f"{info.path}: the file has {info.num_channels} channels, expected 1 or 2; mix it down to mono or stereo"
        )
