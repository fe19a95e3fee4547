"""The demo in the form that a script uses: model and processor of transformers, windows of audio, and their codes.

Audio is read, cut and encoded by the package, which also computes the right figures. So a script differs from the package only by
its mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import AutoProcessor, MusicgenForConditionalGeneration

from musicgen_eval.audio.reader import TrackAudio
from musicgen_eval.data.scoring_plan import plan_evaluation
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.data.windows import plan_windows
from musicgen_eval.inference.readings import CodedWindow, score_readings
from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.records import Reading, Window

CONTEXT_S = TARGET_S = 5.0  # as in configs/demo.yaml


@dataclass(frozen=True)
class Figure:
    """The result of a script.

    Attributes:
        ce: Cross entropy in nats per code.
        ppl: Perplexity. The perplexity of an incorrect script may differ from exp(ce).
    """

    ce: float
    ppl: float


@dataclass(frozen=True)
class Piece:
    """A window as a script uses it.

    Attributes:
        window: Frames of context and target.
        audio: (C, N) float32 at the codec's rate.
        codes: (K, T) int64.
        text: Text of the track. None means the null condition.
    """

    window: Window
    audio: Tensor
    codes: Tensor
    text: str | None

    @property
    def context_frames(self) -> int:
        """Number of frames that are fed before the target and not scored."""
        return self.window.context_frames


class Demo:
    """The demo's model and music.

    Args:
        source: Source of the tracks, as `data.source`.

    Attributes:
        musicgen: Model, loaded by the package.
        model: The same checkpoint, loaded by transformers.
        processor: Processor of transformers for texts.
        spec: Properties of the codes, from the checkpoint.
        pieces: Windows of `configs/demo.yaml`, encoded once, in the order of the tracks.
    """

    def __init__(self, source: str = "demo") -> None:
        self.musicgen = load_model("demo")
        self.musicgen.prepare("32-true", decoding=False)
        self.spec = self.musicgen.spec
        location = self.musicgen.checkpoint.location
        self.model = MusicgenForConditionalGeneration.from_pretrained(location, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(location)
        plan = plan_evaluation(DataSettings(source, context_s=CONTEXT_S, target_s=TARGET_S), self.spec)
        self.tracks: list[TrackAudio] = [plan.open_track(row) for row in plan.status.rows("ok").tolist()]
        self.ids = list(plan.tracks.ids)
        self.texts = list(plan.tracks.texts)
        self.pieces = self.cut(self.read(self.spec.sample_rate_hz), texts=self.texts)

    @property
    def special_token(self) -> int:
        """Id that is fed at positions without a code."""
        return self.spec.special_token

    def read(self, sample_rate_hz: int | None) -> list[Tensor]:
        """Reads each track as (C, N) float32 at a sample rate. None means the sample rate of its file."""
        waves = []
        for track in self.tracks:
            rate = sample_rate_hz or track.info.sample_rate_hz
            num_samples = track.num_samples_at(rate)
            waves.append(track.read(0, num_samples, sample_rate_hz=rate, channels=self.spec.channels))
        return waves

    def cut(
        self,
        waves: Sequence[Tensor],
        *,
        texts: Sequence[str | None],
        context_frames: int | None = None,
        target_frames: int | None = None,
    ) -> list[Piece]:
        """Cuts (C, N) tracks into windows, assuming the codec's sample rate, and encodes each window alone."""
        hop, rate = self.spec.hop_samples, self.spec.frame_rate_hz
        context_frames = int(CONTEXT_S * rate) if context_frames is None else context_frames
        target_frames = int(TARGET_S * rate) if target_frames is None else target_frames
        plan = plan_windows([wave.shape[1] // hop for wave in waves], context_frames, target_frames)
        windows = [plan.window(row, self.ids) for row in range(len(plan))]
        audio = [
            waves[track][:, window.start_frame * hop : (window.start_frame + window.num_frames) * hop]
            for track, window in zip(plan.track.tolist(), windows, strict=True)
        ]
        pieces = zip(plan.track.tolist(), windows, audio, self.musicgen.encode(audio), strict=True)
        return [Piece(window, wave, codes, texts[track]) for track, window, wave, codes in pieces]

    def right_nll(self, pieces: Sequence[Piece], *, with_text: bool = True) -> list[Tensor]:
        """Returns (K, target) nats of each window, scored by the package."""
        coded = [CodedWindow(piece.window, piece.codes, piece.text if with_text else None) for piece in pieces]
        nll = []
        for piece, read in zip(pieces, score_readings(self.musicgen, coded, [Reading("")]), strict=True):
            plain = read[""]
            assert plain is not None  # the reading without changes always exists
            nll.append(plain.nll[:, piece.context_frames :])
        return nll

    @cached_property
    def nll(self) -> list[Tensor]:
        """Correct (K, target) nats of each window of the demo."""
        return self.right_nll(self.pieces)

    @cached_property
    def nll_without_text(self) -> list[Tensor]:
        """Correct (K, target) nats of each window of the demo without a text."""
        return self.right_nll(self.pieces, with_text=False)

    def right(self, *, with_text: bool = True) -> Figure:
        """Returns the figure of the package."""
        return figure(self.nll if with_text else self.nll_without_text)

    @torch.inference_mode()
    def over_windows(self, nll_of: Callable[[Piece], Tensor]) -> list[Tensor]:
        """Returns (K, target) nats of each window of the demo, from a function that returns (K, T)."""
        return [nll_of(piece)[:, piece.context_frames :] for piece in self.pieces]


def figure(nll: Sequence[Tensor]) -> Figure:
    """Computes the correct figure from (K, target) nll of each window: one exponential of the mean over all codes."""
    metric = CodebookPerplexity(num_codebooks=nll[0].shape[0])
    for window in nll:
        metric.update(window)
    values = metric.compute()
    return Figure(ce=values["ce"].item(), ppl=values["ppl"].item())
