"""The records that travel between the floors, and the one legend of dimension letters.

    B batch   K codebooks   T frames   S delayed steps   V codebook size   C channels   N samples   D features

Records are frozen and hold no behaviour beyond what follows from their own fields. Columns of a million rows are numpy arrays
(`windows.py`); these are the views of one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Literal

import torch


@dataclass(frozen=True)
class CodecSpec:
    """What a checkpoint's configuration says of its codes; no weights are needed to know it.

    Attributes:
        sample_rate_hz: rate of the audio that the codec hears.
        frame_rate_hz: codes per second and codebook.
        hop_samples: samples a frame, `sample_rate_hz / frame_rate_hz`.
        num_codebooks: K; for stereo, left and right interleaved.
        codebook_size: V; its number is also the special token's id.
        channels: audio channels, 1 or 2.
        delays: (K,) steps by which the delay pattern moves each codebook.
        max_frames: longest window that the decoder was trained on.
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
        """Decoder steps that score `max_frames` frames of every codebook."""
        return self.max_frames + max(self.delays)

    @property
    def special_token(self) -> int:
        """The id fed where no code is known: before the first frame, and where the delay leaves a hole."""
        return self.codebook_size

    @property
    def ceiling_bits_per_second(self) -> float:
        """What a uniform guess costs: K * frame rate * log2(V)."""
        return self.num_codebooks * self.frame_rate_hz * log2(self.codebook_size)


@dataclass(frozen=True)
class Track:
    """A piece of audio with a name: a file, or a part of one.

    Attributes:
        id: unique in its source.
        path: the file.
        start_s: where the track begins in the file, in seconds.
        duration_s: how long it is, in seconds; None: to the end of the file.
        text: what the music is said to be; None or "": the null condition.
    """

    id: str
    path: Path
    start_s: float = 0.0
    duration_s: float | None = None
    text: str | None = None


@dataclass(frozen=True)
class Window:
    """A run of frames of one track: what the model reads, and which part of it is scored, or continued.

    Attributes:
        track: id of the track.
        index: number of the window in its track, from 0; in predict, of the continuation.
        start_frame: first frame, counted from the track's start.
        context_frames: frames that are read and not scored.
        target_frames: frames that are scored; in predict, that are generated.
    """

    track: str
    index: int
    start_frame: int
    context_frames: int
    target_frames: int

    @property
    def num_frames(self) -> int:
        """Frames that the model reads."""
        return self.context_frames + self.target_frames

    @property
    def scored_from_frame(self) -> int:
        """First scored frame, counted from the track's start."""
        return self.start_frame + self.context_frames


@dataclass(frozen=True)
class Failure:
    """A track that could not be measured, and why."""

    track: str
    reason: str


@dataclass(frozen=True)
class ScoredWindow:
    """What one teacher-forced reading of a window left.

    Attributes:
        window: the window.
        codes: (K, T) int64, what was fed and scored.
        scored: (K, T) bool on the CPU, which codes are counted.
        nll: (K, T) float32 nats, NaN where not scored.
        rank: (K, T) int64, logits above the true one; -1 where not scored.
        logits: (K, T, V), only where a metric names them; 0 where not scored.
    """

    window: Window
    codes: torch.Tensor
    scored: torch.Tensor
    nll: torch.Tensor
    rank: torch.Tensor
    logits: torch.Tensor | None = None


StepKernels = Literal["graph", "compiled", "eager"]
"""How decode steps run on CUDA."""

Task = Literal["score", "continue"]
"""What is done with windows: `score` in test and validate, `continue` in predict."""

CodesChange = Callable[[torch.Tensor, Window, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Reading:
    """One teacher-forced pass over a window, named as a suffix by the metrics that want it (`nll__no_text`).

    Attributes:
        name: the suffix; "" is the plain reading.
        text: `own`; `none`, the null condition; `other`, the next track's other text.
        context: `own`, or `none`: the target alone, at positions from 0.
        target: `own`; in predict also `reference`: the true continuation in place of the generated one.
        change: (codes (K, T), window, generator) -> codes (K, T) to feed and score; None: as they are.
    """

    name: str
    text: Literal["own", "none", "other"] = "own"
    context: Literal["own", "none"] = "own"
    target: Literal["own", "reference"] = "own"
    change: CodesChange | None = None


@dataclass(frozen=True)
class Continuation:
    """A song continued once.

    Attributes:
        window: context_frames were heard from start_frame on; target_frames were generated after them.
        codes: (K, context_frames + target_frames) int64: what was heard, as it was, and what was drawn.
        sample_rate_hz: of the audio.
        text: the prompt, or None.
        seed: of the run; together with track and window.index it gives the numbers that the codes were drawn with.
        generated: (C, N) float32, or None where it went to a file.
        context: (C, N) float32, the track before the joint, or None where it went to a file.
        reference: (C, N) float32, how the track went on, up to the length of the continuation; None where it does not, or where it
            went to a file.
        path: file of the continuation, or None where it was not written; `context_path` and `reference_path` likewise.
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


@dataclass(frozen=True)
class ContinuationSettings:
    """How songs are continued.

    Attributes:
        stride_s: by how much the window slides where context and continuation are longer than the checkpoint's limit; None: 3/5 of
            the limit.
        guidance_scale: of classifier-free guidance; 1 is none.
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: draws from so many of the likeliest codes; None: all.
        top_p: draws from the likeliest codes that reach this probability together; None: all.
        num_continuations: how many times each track is continued, each with numbers of its own.
        threads: of a CPU, for drawing codes and decoding them; None: as many as the trainer gives. Last bits depend on it, and so
            now and then does a code. Small steps take one, whatever is given.
        kernels: how decode steps run on CUDA. `graph` replays a CUDA graph, `compiled` replays a graph of kernels that
            `torch.compile` has fused, and `eager` launches every kernel. Ignored on a CPU, which has kernels of its own.
    """

    stride_s: float | None = None
    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int | None = 250
    top_p: float | None = None
    num_continuations: int = 1
    threads: int | None = None
    kernels: StepKernels = "graph"
