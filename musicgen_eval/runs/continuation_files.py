"""Writes continuations as audio files, in one folder per track.

    runs/<name>/ audio/<track>/ continuation_0.flac ...  context.flac  reference.flac
                 continuations.csv

An audio file appears in the folder only when it is complete, and continuations.csv lists only files that exist (see
`continuation_table.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from musicgen_eval.audio.writer import AudioWriter
from musicgen_eval.errors import AudioError, RunError
from musicgen_eval.files.atomic import remove_leftovers
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.records import Continuation
from musicgen_eval.runs.audio_paths import continuation_path
from musicgen_eval.runs.continuation_audio import AudioPieces
from musicgen_eval.runs.continuation_table import ContinuationTable, merge_tables
from musicgen_eval.runs.settings import AudioSettings

CROSSFADE_S = 0.04


class ContinuationFolder:
    """Writes continuations to a run folder.

    Args:
        path: Path of the run folder, which must exist.
        settings: Format and content of the audio files.
        continuation: Settings of the continuations, to be recorded in the table.
        stride_s: Stride of the generation windows, in seconds, to be recorded in the table.
        start: Index of this session within the run, counted from 0.
        rank: Rank of this process.

    Attributes:
        table: Table of the continuations that this process writes.
        num_written: Number of continuations that this process has written.
    """

    def __init__(
        self,
        path: Path,
        settings: AudioSettings,
        *,
        continuation: ContinuationSettings,
        stride_s: float,
        start: int = 0,
        rank: int = 0,
    ) -> None:
        self.path = path
        self.settings = settings
        self.num_written = 0
        self.table = ContinuationTable(path, continuation, stride_s=stride_s, start=start, rank=rank)

    def write(self, continuation: Continuation, audio: AudioPieces) -> Continuation:
        """Writes the audio files of a continuation, then adds a row to the table.

        Returns:
            A copy of the continuation, with the paths of its files.

        Raises:
            AudioError: The track cannot be read.
            RunError: The folder cannot be written to. No incomplete file is left behind.
        """
        window = continuation.window
        path = self.path / continuation_path(window.track, window.index, self.settings.format)
        written: list[Path] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            continuation = self._write_files(continuation, path, audio, written)
            self.table.append(continuation, audio)
        except BaseException as error:
            _remove_files(written, path.parent)
            if isinstance(error, _TrackUnreadable):
                raise AudioError(str(error)) from error
            if isinstance(error, OSError | AudioError):
                raise RunError(self._failure(error)) from error
            raise
        self.num_written += 1
        return continuation

    def finish(self, track_ids: Sequence[str]) -> list[dict[str, str]]:
        """Merges the tables of all sessions and processes, and returns the rows. See `merge_tables`."""
        return merge_tables(self.path, track_ids)

    def _write_files(
        self, continuation: Continuation, path: Path, audio: AudioPieces, written: list[Path]
    ) -> Continuation:
        """Writes the audio files of a continuation, and adds the path of each new file to `written`.

        The context and the reference are written if the settings require them and their files do not exist yet.
        """
        context_path, reference_path = (path.with_name(f"{name}{path.suffix}") for name in ("context", "reference"))
        if self.settings.originals:
            for original, read in ((context_path, audio.context), (reference_path, audio.reference)):
                if not original.exists() and _write_pieces(original, _from_track(read()), audio):
                    written.append(original)
        pieces = joined_pieces(audio) if self.settings.layout == "joined" else audio.generated
        _write_pieces(path, pieces, audio)
        written.append(path)
        return replace(
            continuation,
            path=path,
            context_path=context_path if context_path.exists() else None,
            reference_path=reference_path if reference_path.exists() else None,
        )

    def _failure(self, error: Exception) -> str:
        kept = f", which are kept and listed in {self.table.path.name}" if self.num_written else ""
        return (
            f"run_dir {self.path}: {error}; this process has written {self.num_written} continuations{kept}; fix the cause and "
            "resume the run"
        )


def remove_partial_files(path: Path) -> None:
    """Removes incomplete audio files that a killed process left behind in a run folder.

    This function must be called before any process writes audio files.
    """
    for folder in (path / "audio").glob("*"):
        remove_leftovers(folder)


def joined_pieces(audio: AudioPieces) -> Iterator[Tensor]:
    """Yields the audio of the track up to the boundary, then the audio of the continuation.

    In the last two frames before the boundary, the track is faded into the decoded prompt. Without this fade, there would be a
    discontinuity at the boundary, because the continuation extends the waveform of the decoded prompt, not that of the track.
    """
    num_faded = min(int(CROSSFADE_S * audio.sample_rate_hz), audio.context_decoded.shape[1])
    end = torch.zeros(audio.num_channels, 0, dtype=torch.float32)
    for piece in _from_track(audio.context()):
        end = torch.cat([end, piece], dim=1)
        if end.shape[1] > num_faded:
            yield end[:, : end.shape[1] - num_faded]
            end = end[:, end.shape[1] - num_faded :]
    rise = torch.arange(1, num_faded + 1, dtype=torch.float32) / (num_faded + 1)
    yield end * (1 - rise) + audio.context_decoded[:, audio.context_decoded.shape[1] - num_faded :] * rise
    yield from audio.generated


def _write_pieces(path: Path, pieces: Iterator[Tensor], audio: AudioPieces) -> bool:
    """Writes pieces of audio to a file. If there are no pieces, writes no file and returns False."""
    first = next(pieces, None)
    if first is None:
        return False
    with AudioWriter(path, sample_rate_hz=audio.sample_rate_hz, channels=audio.num_channels) as writer:
        writer.write(first)
        for piece in pieces:
            writer.write(piece)
    return True


def _remove_files(paths: Sequence[Path], folder: Path) -> None:
    """Removes the given files, and then `folder` and its parent folder if these folders are empty."""
    with suppress(OSError):
        for path in paths:
            path.unlink(missing_ok=True)
        folder.rmdir()
        folder.parent.rmdir()


class _TrackUnreadable(Exception):
    """Raised if the track cannot be read. This class distinguishes read errors from write errors."""


def _from_track(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    try:
        yield from pieces
    except AudioError as error:
        raise _TrackUnreadable(str(error)) from error
