"""Reads the audio of a plan's windows, in the worker processes of a DataLoader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from musicgen_eval.data.plan import Plan
from musicgen_eval.errors import AudioError
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import CodecSpec, Window


@dataclass(frozen=True)
class WindowAudio:
    """The audio and the texts of a window.

    Attributes:
        row: Row of the window in the plan.
        track_row: Row of the window's track in the plan.
        window: Position of the window in its track.
        audio: (C, N) float32 audio at the codec's sample rate, where N is the number of frames times the hop. In predict, the
            audio of the prompt. None means that the audio could not be read.
        text: Text of the track. None means that the track has no text.
        other_text: Different text, taken from another track. None means that there is no such text.
        failure: Reason why the audio could not be read. None means that the audio was read.
    """

    row: int
    track_row: int
    window: Window
    audio: Tensor | None
    text: str | None
    other_text: str | None
    failure: str | None = None


class Batch:
    """The windows of one step. If a rank has fewer batches than other ranks, its last step has a batch without windows.

    This class is not a dataclass, because the precision `bf16-true` would convert the fields of a dataclass and so round the audio.
    """

    def __init__(self, windows: list[WindowAudio]) -> None:
        self.windows = windows

    def pin_memory(self) -> Batch:
        """Returns the batch in pinned memory, from which it can be copied to a GPU asynchronously. DataLoader calls this method."""
        return self._with_audio(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device, without waiting for the audio to be copied."""
        return self._with_audio(lambda audio: upload(audio, device))

    def _with_audio(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            [window if window.audio is None else replace(window, audio=change(window.audio)) for window in self.windows]
        )


class WindowDataset(Dataset[WindowAudio]):
    """A dataset of the windows of a plan. If a file cannot be read, the window's `failure` is set, and no exception is raised."""

    def __init__(self, plan: Plan, spec: CodecSpec) -> None:
        self.plan = plan
        self.spec = spec

    def __len__(self) -> int:
        return len(self.plan.windows)

    def __getitem__(self, row: int) -> WindowAudio:
        plan, spec = self.plan, self.spec
        track_row = int(plan.windows.track[row])
        window = plan.windows.window(row, plan.tracks.ids)
        audio, failure = None, None
        try:
            audio = plan.open_track(track_row).read(
                window.start_frame * spec.hop_samples,
                (window.num_frames if plan.task == "score" else window.context_frames) * spec.hop_samples,
                sample_rate_hz=spec.sample_rate_hz,
                channels=spec.channels,
            )
        except AudioError as error:
            failure = str(error)
        return WindowAudio(
            row=row,
            track_row=track_row,
            window=window,
            audio=audio,
            text=plan.tracks.texts[track_row],
            other_text=plan.other_texts[track_row],
            failure=failure,
        )
