"""Defines the records that the packages exchange, and the letters that denote tensor dimensions.

    B batch   K codebooks   T frames   S delayed steps   V codebook size   C channels   N samples   D features

Records are frozen dataclasses. Large tables, such as the table of all windows of a run, are stored as numpy columns, and a record
represents one row. `settings.py` defines the base class of the settings classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from musicgen_eval.errors import WindowError

if TYPE_CHECKING:  # importing torch would delay the display of help texts
    import torch

MAX_FRAMES = 1 << 40  # seven centuries at 50 Hz


@dataclass(frozen=True)
class CodecSpec:
    """Properties of a checkpoint's codec, read from its configuration files without loading weights.

    Attributes:
        sample_rate_hz: Sample rate of the codec's input.
        frame_rate_hz: Number of frames per second.
        hop_samples: Number of samples per frame, `sample_rate_hz / frame_rate_hz`.
        num_codebooks: Number of codebooks, K. For a stereo checkpoint, the codebooks of the left and right channels are
            interleaved.
        codebook_size: Number of codes in each codebook, V. This number is also the id of the special token.
        channels: Number of audio channels, 1 or 2.
        delays: (K,) number of steps by which the delay pattern shifts each codebook.
        max_frames: Length of the longest window that the decoder was trained on, in frames.
    """

    sample_rate_hz: int
    frame_rate_hz: int
    hop_samples: int
    num_codebooks: int
    codebook_size: int
    channels: int
    delays: tuple[int, ...]
    max_frames: int

    @property
    def max_steps(self) -> int:
        """Number of decoder steps needed to score `max_frames` frames of every codebook."""
        return self.max_frames + max(self.delays)

    @property
    def special_token(self) -> int:
        """Id of the special token, which is fed to the decoder at positions without a code.

        Positions without a code occur before the first frame and in the gaps of the delay pattern.
        """
        return self.codebook_size

    @property
    def ceiling_bits_per_second(self) -> float:
        """Bit rate if all codes are equally likely, in bits per second: K * frame rate * log2(V)."""
        return self.num_codebooks * self.frame_rate_hz * log2(self.codebook_size)

    def whole_frames(self, seconds: float, *, setting: str) -> int:
        """Converts a length in seconds to a whole number of frames.

        Args:
            seconds: Length in seconds.
            setting: Name of the setting, for error messages.

        Raises:
            WindowError: The length is not finite or not a whole number of frames. The message gives the nearest valid lengths.
        """
        frames = seconds * self.frame_rate_hz
        if not abs(frames) < MAX_FRAMES:
            longest = MAX_FRAMES / self.frame_rate_hz
            raise WindowError(f"{setting} must be a finite number of seconds below {longest:.2g}, got {seconds:g}")
        nearest = round(frames)
        if abs(frames - nearest) > 1e-6:
            below = int(frames) / self.frame_rate_hz
            raise WindowError(
                f"{setting}={seconds:g} s is {frames:g} frames at {self.frame_rate_hz} Hz, which is not a whole number; "
                f"set {setting} to {below:g} or {below + 1 / self.frame_rate_hz:g}"
            )
        return nearest


@dataclass(frozen=True)
class Track:
    """An audio file, or a part of an audio file.

    Attributes:
        id: Identifier, unique within the source.
        path: Path of the audio file.
        start_s: Start of the track in the file, in seconds.
        duration_s: Length of the track, in seconds. None means that the track extends to the end of the file.
        text: Text description of the music. None or "" selects the null condition (no text).
    """

    id: str
    path: Path
    start_s: float = 0.0
    duration_s: float | None = None
    text: str | None = None


@dataclass(frozen=True)
class Window:
    """Consecutive frames of a track that are fed to the model at once.

    Attributes:
        track: Id of the track.
        index: Index of the window within its track, counted from 0. In predict, the index of the continuation.
        start_frame: First frame of the window, counted from the start of the track.
        context_frames: Number of frames at the start of the window that are fed to the model but not scored. In predict, the length
            of the prompt.
        target_frames: Number of frames after the context that are scored. In predict, the number of generated frames.
    """

    track: str
    index: int
    start_frame: int
    context_frames: int
    target_frames: int

    @property
    def num_frames(self) -> int:
        """Number of frames in the window, including the context and the target."""
        return self.context_frames + self.target_frames

    @property
    def scored_from_frame(self) -> int:
        """First scored frame, counted from the start of the track."""
        return self.start_frame + self.context_frames


@dataclass(frozen=True)
class Failure:
    """A track that could not be measured, and the reason for the failure."""

    track: str
    reason: str


@dataclass(frozen=True)
class ScoredWindow:
    """Scores of a window in one reading.

    Attributes:
        window: The window.
        codes: (K, T) int64 codes that were fed to the model.
        scored: (K, T) bool mask on the CPU, True for scored codes.
        nll: (K, T) float32 negative log-likelihoods in nats, NaN for codes that were not scored.
        rank: (K, T) int64 number of logits that exceed the logit of the true code, or -1 for codes that were not scored.
        logits: (K, T, V) logits, 0 for codes that were not scored. None unless a metric requests logits.
    """

    window: Window
    codes: torch.Tensor
    scored: torch.Tensor
    nll: torch.Tensor
    rank: torch.Tensor
    logits: torch.Tensor | None = None


StepKernels = Literal["graph", "compiled", "eager"]
"""Implementation of the decoding steps on CUDA (see `ContinuationSettings`)."""

Task = Literal["score", "continue"]
"""Task of a run: `score` in test and validate, `continue` in predict."""

CodesChange = Callable[["torch.Tensor", Window, "torch.Generator"], "torch.Tensor"]


@dataclass(frozen=True)
class Reading:
    """A teacher-forced pass over a window.

    To request a reading, a metric adds the name of the reading to a parameter name. For example, the parameter `nll__no_text`
    requests the reading `no_text`.

    Attributes:
        name: Name of the reading. The plain reading has the name "".
        text: Text to feed to the model. `own` means the window's text, `none` means the null condition (no text), and `other` means
            a different text, taken from another track.
        context: Context to feed to the model. `own` means the window's context. `none` means no context, so the target starts at
            position 0.
        target: Codes to score. `own` means the window's target. `reference` means the reference instead of the generated codes, and
            is available in predict only.
        change: Function that receives the (K, T) codes, the window and a random number generator, and returns the (K, T) codes to
            feed to the model and score. None leaves the codes unchanged.
    """

    name: str
    text: Literal["own", "none", "other"] = "own"
    context: Literal["own", "none"] = "own"
    target: Literal["own", "reference"] = "own"
    change: CodesChange | None = None


@dataclass(frozen=True)
class Continuation:
    """One continuation of a track.

    Attributes:
        window: Window of the continuation. The prompt starts at `start_frame` and has `context_frames` frames, which are followed
            by `target_frames` generated frames.
        codes: (K, context_frames + target_frames) int64 codes of the prompt, followed by the generated codes.
        sample_rate_hz: Sample rate of the audio.
        text: Text that conditions the model. None means the null condition (no text).
        seed: Seed of the run. The seed, the track id and `window.index` determine the continuation's random numbers.
        generated: (C, N) float32 audio of the continuation. None if the audio was written to a file.
        context: (C, N) float32 audio of the track before the boundary. None if the audio was written to a file.
        reference: (C, N) float32 audio of the track after the boundary, at most as long as the continuation. None if the track ends
            at the boundary or if the audio was written to a file.
        path: Path of the continuation file. None if the file was not written.
        context_path: Path of the context file. None if the file was not written.
        reference_path: Path of the reference file. None if the file was not written.
    """

    window: Window
    codes: torch.Tensor
    sample_rate_hz: int
    text: str | None
    seed: int
    generated: torch.Tensor | None = None
    context: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    path: Path | None = None
    context_path: Path | None = None
    reference_path: Path | None = None
