"""The settings of the model, the run, the audio files, and the length of continuations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from musicgen_eval.errors import RunError
from musicgen_eval.records import CodecSpec
from musicgen_eval.records.settings import NOT_IN_RECIPE, SCORING_ONLY, Settings

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Settings of the model.

    Attributes:
        checkpoint: `demo` for the bundled model, a name on the Hugging Face Hub such as `facebook/musicgen-small`, or a folder in
            the format of the transformers library.
        revision: Branch, tag or commit of the checkpoint on the Hugging Face Hub.
        max_frames: Length of the longest window, in frames. Defaults to the checkpoint's own limit.
        tail: Treatment of the last frames of a window. `score` scores every frame of every codebook. `drop` leaves out the last
            delays[k] frames of codebook k, as audiocraft does.
        save_nll: Whether to write the negative log-likelihood of every code to nll.safetensors.
        seed: Seed for sampling codes, and for metric inputs that alter codes at random. The same seed gives the same codes.
    """

    checkpoint: str | Path = field(default="demo", metadata=NOT_IN_RECIPE)  # the recipe records the resolved checkpoint
    revision: str | None = field(default=None, metadata=NOT_IN_RECIPE)
    max_frames: int | None = field(default=None, metadata=NOT_IN_RECIPE)
    tail: Literal["score", "drop"] = field(default="score", metadata=SCORING_ONLY)
    save_nll: bool = field(default=False, metadata={**SCORING_ONLY, **NOT_IN_RECIPE})
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, str | Path):
            from musicgen_eval.models.checkpoint import refuse_other_types

            refuse_other_types(self.checkpoint)
        super().__post_init__()
        self.require_at_least(1, "max_frames")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Settings of a run: the device, the run folder, and resuming.

    Attributes:
        precision: Precision of the decoder.
        accelerator: Type of device. `auto` selects a GPU if there is one.
        run_dir: Folder for the results. If the folder already contains this run, the run is resumed. On the
            command line, the folder defaults to runs/<date>-<command>. The Python functions write no files by default.
        resume: Folder of the run to resume. The run continues with the settings in the folder's config.yaml. Can be combined only
            with max_failures, retry_failures and allow_other_machine.
        retry_failures: Whether a resumed run retries its failed tracks.
        allow_other_machine: Whether to resume a run that was started on a different machine. The results may then differ in the
            last bits. Both machines are recorded in the results.
    """

    precision: Precision = "32-true"
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto"
    run_dir: str | Path | None = None
    resume: str | Path | None = None
    retry_failures: bool = False
    allow_other_machine: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run_dir == "":
            raise RunError("run_dir is an empty string; specify a folder, or remove run_dir")


@dataclass(frozen=True, kw_only=True)
class AudioSettings(Settings):
    """Settings of the audio files that `predict` writes.

    Attributes:
        format: Format of the audio files.
        layout: Content of each continuation file. `continuation` is the generated audio alone. `joined`, intended for listening,
            is the track up to the boundary followed by the generated audio, with a crossfade of 40 ms.
        originals: Whether to write the context and the reference of each track as well.
    """

    format: Literal["flac", "wav", "mp3"] = "flac"
    layout: Literal["continuation", "joined"] = "continuation"
    originals: bool = True


@dataclass(frozen=True, kw_only=True)
class LengthSettings(Settings):
    """The two ways to set the length of continuations.

    Attributes:
        duration_s: Length of the continuation, in seconds. Defaults to the rest of the track.
        max_new_frames: Length of the continuation, in frames. Cannot be combined with duration_s.
    """

    duration_s: float | None = None
    max_new_frames: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.duration_s is not None and self.max_new_frames is not None:
            raise RunError(
                f"duration_s={self.duration_s:g} and max_new_frames={self.max_new_frames} both set the length of the "
                "continuation; remove one of them"
            )
        self.require_above_0("duration_s")
        self.require_at_least(1, "max_new_frames")

    def seconds(self, spec: CodecSpec) -> float | None:
        """Returns the length of the continuation in seconds, or None for the rest of the track.

        Raises:
            RunError: The length is shorter than one frame.
            WindowError: The length is not a whole number of frames.
        """
        if self.max_new_frames is not None:
            return self.max_new_frames / spec.frame_rate_hz
        if self.duration_s is not None:
            if not self.duration_s * spec.frame_rate_hz >= 1 - 1e-6:
                raise RunError(
                    f"duration_s={self.duration_s:g} is shorter than one frame ({1 / spec.frame_rate_hz:g} s)"
                )
            spec.whole_frames(self.duration_s, setting="duration_s")
        return self.duration_s
