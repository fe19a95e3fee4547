"""Continuations as files: audio in a folder a track, and a table of all that was written.

    runs/<name>/ audio/<track>/ continuation_0.flac ...  context.flac  reference.flac
                 continuations.csv

Every file appears whole or not at all, and the table names only what is there; it grows with every continuation, so that a run
which ends early leaves a true one. Knows folders and audio; nothing of models.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from musicgen_eval.audio.writer import AudioWriter
from musicgen_eval.errors import AudioError, RunError
from musicgen_eval.files.redaction import redact, redact_tree
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.records import Continuation
from musicgen_eval.results.files import cells
from musicgen_eval.runs.continuation_audio import Sound
from musicgen_eval.runs.settings import AudioSettings

CROSSFADE_S = 0.04
NUM_DIGITS = 16  # of a digest: of 100,000 ids two meet with a chance of 3e-10; with 8 digits it would be 0.69
DEVICE_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
COLUMNS = (
    "track", "continuation", "context_s", "heard_s", "generated_s", "reference_s", "text", "seed", "temperature", "top_k",
    "top_p", "guidance_scale", "stride_s", "path", "context_path", "reference_path",
)  # fmt: skip


class ContinuationFolder:
    """Writes continuations below a run folder.

    Args:
        path: the run folder; it exists.
        settings: format, and what a file holds.
        continuation: how songs were continued, for the table.
        stride_s: as it was settled.
        start: which start of the run this is.
        rank: of this process; each start of each but the first keeps a table of its own until `finish`.

    Attributes:
        table: where rows go.
        num_written: continuations so far.
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
        self._common = {**asdict(continuation), "stride_s": stride_s}
        self.table = path / table_name(start, rank)

    def write(self, continuation: Continuation, sound: Sound) -> Continuation:
        """Writes the files of a continuation, then its row.

        Raises:
            AudioError: the track cannot be read.
            RunError: the folder cannot be written to; nothing half-written is left.
        """
        window = continuation.window
        ending = self.settings.format
        path = self.path / continuation_path(window.track, window.index, ending)
        folder = path.parent
        context_path, reference_path = folder / f"context.{ending}", folder / f"reference.{ending}"
        pieces = joined_pieces(sound) if self.settings.layout == "joined" else sound.generated
        written: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.settings.originals:
                for original, read in ((context_path, sound.context), (reference_path, sound.reference)):
                    if not original.exists() and self._store(original, _readable(read()), sound):
                        written.append(original)
            self._store(path, pieces, sound)
            written.append(path)
            continuation = replace(
                continuation,
                path=path,
                context_path=context_path if context_path.exists() else None,
                reference_path=reference_path if reference_path.exists() else None,
            )
            self._append(continuation, sound)
        except BaseException as error:
            _remove_written(written, folder)
            if isinstance(error, _Unreadable):
                raise AudioError(str(error)) from error
            if isinstance(error, OSError | AudioError):
                stay = f", which stay and are listed in {self.table.name}" if self.num_written else ""
                raise RunError(
                    f"run_dir {self.path}: {error}; this process wrote {self.num_written} continuations{stay}"
                ) from error
            raise
        self.num_written += 1
        return continuation

    def finish(self, track_ids: Sequence[str]) -> list[dict[str, str]]:
        """Brings the tables of all starts and processes together, in the order of tracks; for rank 0, when all have written.

        Args:
            track_ids: of the plan.

        Returns:
            The rows, by column; of a continuation that was written more than once, the last.

        Raises:
            RunError: the table cannot be written; those of the processes stay.
        """
        order = {f"audio/{track_folder(track)}": number for number, track in enumerate(track_ids)}
        parts = sorted(self.path.glob("continuations*.csv"), key=_start_and_rank)
        last = {row["path"]: row for part in parts for row in read_table(part)}
        rows = sorted(last.values(), key=lambda row: (order[row["path"].rpartition("/")[0]], int(row["continuation"])))
        whole = self.path / ".continuations.csv.part"
        try:
            with whole.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
                file.flush()
                os.fsync(file.fileno())
            whole.replace(self.path / table_name(0, 0))
            for part in parts:
                if part.name != table_name(0, 0):
                    part.unlink()
        except OSError as error:
            whole.unlink(missing_ok=True)
            raise RunError(f"run_dir {self.path}: continuations.csv could not be written ({error})") from error
        return rows

    def _store(self, path: Path, pieces: Iterator[Tensor], sound: Sound) -> bool:
        """Writes pieces to a file; False, and no file, where there are none."""
        first = next(pieces, None)
        if first is None:
            return False
        with AudioWriter(path, sample_rate_hz=sound.sample_rate_hz, channels=sound.num_channels) as writer:
            writer.write(first)
            for piece in pieces:
                writer.write(piece)
        return True

    def _append(self, continuation: Continuation, sound: Sound) -> None:
        """Adds a row in one write, so that a table never ends in half of one."""
        window, rate = continuation.window, sound.sample_rate_hz
        row = {
            "track": window.track,
            "continuation": window.index,
            "context_s": sound.num_context_samples / rate,
            "heard_s": sound.context_decoded.shape[1] / rate,
            "generated_s": sound.num_generated_samples / rate,
            "reference_s": sound.num_reference_samples / rate,
            "text": continuation.text or "",
            "seed": continuation.seed,
            **{name: self._common[name] for name in ("temperature", "top_k", "top_p", "guidance_scale", "stride_s")},
            **{
                name: "" if file is None else file.relative_to(self.path).as_posix()
                for name, file in (
                    ("path", continuation.path),
                    ("context_path", continuation.context_path),
                    ("reference_path", continuation.reference_path),
                )
            },
        }
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        with self.table.open("ab", buffering=0) as file:
            before = file.tell()
            if before == 0:
                table.writeheader()
            table.writerow(dict(zip(row, cells(redact_tree(row).values()), strict=True)))
            line = text.getvalue().encode("utf-8", "backslashreplace")
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise


def continuation_path(track: str, index: int, ending: str) -> str:
    """Of a continuation's file, below the run folder; there is one for each."""
    return f"audio/{track_folder(track)}/continuation_{index}.{ending}"


def written_continuations(path: Path) -> set[str]:
    """The paths of all continuations that stand in a table below a run folder, and whose files are there."""
    return {
        row["path"]
        for part in path.glob("continuations*.csv")
        for row in read_table(part)
        if all((path / row[name]).is_file() for name in ("path", "context_path", "reference_path") if row[name])
    }


def remove_partial_files(path: Path) -> None:
    """Removes what a process that was killed had not finished writing below a run folder; before any process writes."""
    for unfinished in (path / "audio").glob("*/.*.tmp"):
        unfinished.unlink(missing_ok=True)


def table_name(start: int, rank: int) -> str:
    """Of the table that a process writes; the first start's first is the run's."""
    return f"continuations.{start}.{rank}.csv" if start or rank else "continuations.csv"


def _start_and_rank(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.name.split(".")[1:-1])


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a continuations.csv, by column; without one that a killed process left unfinished."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


def track_folder(track: str) -> str:
    """A folder name for a track id: readable, without anything that leads elsewhere, and different for different ids.

    >>> track_folder("my songs/a.mp3")
    'my_songs_a.mp3-c0d5c51c59cddcf7'
    """
    readable = re.sub(r"[^\w.-]+", "_", redact(track), flags=re.ASCII).strip("._-")[-80:]
    if not readable or readable.partition(".")[0].upper() in DEVICE_NAMES:
        readable = f"track_{readable}".rstrip("_")
    return f"{readable}-{sha256(track.encode('utf-8', 'surrogatepass')).hexdigest()[:NUM_DIGITS]}"


def joined_pieces(sound: Sound) -> Iterator[Tensor]:
    """The track up to the joint, fading within its last two frames into what the codec made of it, then what was generated.

    What was generated continues the codec's waveform, not the track's: without the fade there would be a step at the joint.
    """
    num_faded = min(int(CROSSFADE_S * sound.sample_rate_hz), sound.context_decoded.shape[1])
    held = torch.zeros(sound.num_channels, 0, dtype=torch.float32)
    for piece in _readable(sound.context()):
        held = torch.cat([held, piece], dim=1)
        if held.shape[1] > num_faded:
            yield held[:, : held.shape[1] - num_faded]
            held = held[:, held.shape[1] - num_faded :]
    rise = torch.arange(1, num_faded + 1, dtype=torch.float32) / (num_faded + 1)
    yield held * (1 - rise) + sound.context_decoded[:, sound.context_decoded.shape[1] - num_faded :] * rise
    yield from sound.generated


def _remove_written(written: Sequence[Path], folder: Path) -> None:
    """Removes files that no row will name, and folders that are empty then."""
    with suppress(OSError):
        for path in written:
            path.unlink(missing_ok=True)
        folder.rmdir()
        folder.parent.rmdir()


class _Unreadable(Exception):
    """A track could not be read; not to be mistaken for a folder that cannot be written to."""


def _readable(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    try:
        yield from pieces
    except AudioError as error:
        raise _Unreadable(str(error)) from error
