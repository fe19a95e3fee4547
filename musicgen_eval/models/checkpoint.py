"""Finds a checkpoint and reads its specification from its configuration files, without loading weights.

The user specifies a checkpoint as `demo`, a hub name, or a local folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import log2, prod
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, EncodecConfig, MusicgenConfig, PreTrainedConfig

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint_files import (
    CONFIG,
    CheckpointFiles,
    find_files,
    first_line,
    read_config,
    read_json,
)
from musicgen_eval.models.checkpoint_names import DEMO, EXAMPLE, expanded_path, is_folder
from musicgen_eval.models.delay import default_delays
from musicgen_eval.records import CodecSpec

DEMO_MODEL = Path(__file__).parent / "demo"
DEFAULT_WINDOW_S = 30
GENERATION_CONFIG = "generation_config.json"
IN_MEMORY = "model in memory"
PARTS = ("text_encoder", "audio_encoder", "decoder")
TRANSFORMERS_DEFAULT_LENGTH = 20
"""Default value of `max_length` in older versions of transformers. This value is not the actual limit of any model."""

Source = Literal["generation_config", "given", "default"]


@dataclass(frozen=True)
class Checkpoint:
    """The location and the specification of a checkpoint.

    Attributes:
        name: Name that the user specified, or the absolute path of a local folder.
        location: Folder of the checkpoint's files, or "" for a model in memory.
        revision: Requested hub revision, or None.
        commit: Hub commit that the revision refers to, or None if the checkpoint is not from the hub.
        spec: Specification of the checkpoint's codec.
        max_frames_from: Origin of `spec.max_frames`: `generation_config`, `given` (specified by the user), or `default` (30 s, or
            less if the decoder has fewer positions).
        is_reachable: Whether files that are not cached can be downloaded from the hub.
        digest: Digest of everything that affects the results of a model in memory. None for a checkpoint loaded from files.
        notes: Notes for the user about the checkpoint, one line each.
    """

    name: str
    location: str
    revision: str | None
    commit: str | None
    spec: CodecSpec
    max_frames_from: Source
    is_reachable: bool = False
    digest: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> CheckpointFiles:
        """Location of the checkpoint's files."""
        return CheckpointFiles(self.name, Path(self.location), commit=self.commit, is_reachable=self.is_reachable)


def find_checkpoint(
    checkpoint: str | Path, *, revision: str | None = None, max_frames: int | None = None
) -> Checkpoint:
    """Finds a checkpoint and reads its `CodecSpec` from its configuration files, without loading weights.

    Args:
        checkpoint: `demo`, a hub name such as `facebook/musicgen-small`, or a local folder in transformers' format.
        revision: Hub branch, tag or commit. Allowed for hub names only.
        max_frames: Length of the longest window, in frames. None means the length stated by the checkpoint.

    Returns:
        The location and the specification of the checkpoint.

    Raises:
        CheckpointError: If the checkpoint is not found, is not a MusicGen checkpoint, or has an inconsistent configuration.
    """
    refuse_other_types(checkpoint)
    files = _files(str(checkpoint), revision)
    config = _config(files)
    stated = None if max_frames is not None else _stated_max_length(files)
    spec, source, notes = _spec(config, files.name, stated=stated, given=max_frames)
    return Checkpoint(
        name=files.name,
        location=str(files.folder),
        revision=revision,
        commit=files.commit,
        spec=spec,
        max_frames_from=source,
        is_reachable=files.is_reachable,
        notes=notes,
    )


def describe_in_memory(config: MusicgenConfig, *, stated: int | None, given: int | None, digest: str) -> Checkpoint:
    """Returns a `Checkpoint` that describes a model in memory.

    Args:
        config: The model's configuration.
        stated: `max_length` of the model's generation config.
        given: Length of the longest window, in frames. It overrides `stated` unless it is None.
        digest: Digest of everything that affects the model's results. The checkpoint's name includes the digest, so that different
            models have different names.

    Raises:
        CheckpointError: If the configuration is inconsistent.
    """
    stated = None if given is not None else _checked_length(stated, IN_MEMORY)
    spec, source, notes = _spec(config, IN_MEMORY, stated=stated, given=given)
    return Checkpoint(f"{IN_MEMORY} ({digest})", "", None, None, spec, source, digest=digest, notes=notes)


def refuse_other_types(checkpoint: object) -> None:
    """Raises an error if `checkpoint` is neither a name nor a path.

    Raises:
        CheckpointError: If the type of `checkpoint` is not supported.
    """
    if not isinstance(checkpoint, str | Path):
        raise CheckpointError(
            f"checkpoint must be 'demo', a hub name, a folder, a MusicgenForConditionalGeneration or a model from load_model, "
            f"got {type(checkpoint).__name__}; to use another model, save it with save_pretrained and pass the folder"
        )


def absolute_name(checkpoint: str) -> str:
    """Returns a checkpoint name that does not depend on the working directory, by making the path of a local folder absolute."""
    folder = expanded_path(checkpoint)
    if checkpoint == DEMO or not is_folder(folder):
        return checkpoint
    return os.path.abspath(folder)  # noqa: PTH100 - removes `..`, which pathlib keeps


def _files(name: str, revision: str | None) -> CheckpointFiles:
    """Finds the local folder or the hub commit that a checkpoint name refers to."""
    if name.startswith(IN_MEMORY) and not is_folder(expanded_path(name)):
        raise CheckpointError(
            f"checkpoint {name!r} was a model in memory, which cannot be loaded by name; pass the model in Python, "
            "with the same run_dir"
        )
    return find_files(name, example=EXAMPLE, revision=revision, bundled={DEMO: DEMO_MODEL})


def _config(files: CheckpointFiles) -> MusicgenConfig:
    written = read_config(files)
    if written.get("model_type") == "musicgen":
        missing = [part for part in PARTS if not isinstance(written.get(part), dict)]
        if missing:
            raise CheckpointError(
                f"checkpoint {files.name}: {CONFIG} does not describe {', '.join(missing)}; save the complete model again with "
                "save_pretrained"
            )
    config = load_config(files)
    if not isinstance(config, MusicgenConfig):
        raise CheckpointError(
            f"checkpoint {files.name} has type {config.model_type!r}, but only 'musicgen' is supported (mono or stereo, without "
            "melody); choose a checkpoint of that type"
        )
    return config


def load_config(files: CheckpointFiles, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Loads a checkpoint's configuration with transformers.

    Args:
        files: The checkpoint's files.
        trust_remote_code: Whether the checkpoint's own code may be run.

    Raises:
        CheckpointError: If transformers cannot load the configuration.
    """
    try:
        # Without `trust_remote_code`, transformers would ask the user whether to run the checkpoint's own code.
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(files.folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types of errors for invalid values
        raise CheckpointError(f"checkpoint {files.name}: {CONFIG} cannot be read ({first_line(error)})") from error
    return config


def _stated_max_length(files: CheckpointFiles) -> int | None:
    """Returns `max_length` from the checkpoint's generation config, or None if it is not set.

    Raises:
        CheckpointError: If the file is damaged or not available, or if the value is not a positive whole number.
    """
    path = files.find(GENERATION_CONFIG)
    return None if path is None else _checked_length(read_json(files, path).get("max_length"), files.name)


def _checked_length(stated: object, name: str) -> int | None:
    if stated is None:
        return None
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        raise CheckpointError(
            f"checkpoint {name}: max_length in {GENERATION_CONFIG} must be a positive whole number of frames, got {stated!r}; "
            "correct max_length, or set max_frames"
        )
    return stated


def _spec(
    config: MusicgenConfig, name: str, *, stated: int | None, given: int | None
) -> tuple[CodecSpec, Source, tuple[str, ...]]:
    codec: Any = config.audio_encoder
    decoder: Any = config.decoder
    _check_codec(codec, decoder, name)
    hop = prod(codec.upsampling_ratios)
    rate = codec.sampling_rate // hop
    delays = default_delays(decoder.num_codebooks, channels=decoder.audio_channels)
    positions = decoder.max_position_embeddings
    default = max(1, min(DEFAULT_WINDOW_S * rate, positions - max(delays)))
    max_frames, source = _limit(stated, given, default=default)
    spec = CodecSpec(
        sample_rate_hz=codec.sampling_rate,
        frame_rate_hz=rate,
        hop_samples=hop,
        num_codebooks=decoder.num_codebooks,
        codebook_size=decoder.vocab_size,
        channels=decoder.audio_channels,
        delays=delays,
        max_frames=max_frames,
    )
    return spec, source, _notes(spec, source, name, stated=stated, positions=positions)


def _check_codec(codec: Any, decoder: Any, name: str) -> None:
    """Raises `CheckpointError` if the audio encoder is not EnCodec, or if its configuration does not match the decoder's."""
    if not isinstance(codec, EncodecConfig):
        raise CheckpointError(
            f"checkpoint {name}: the type of the audio encoder must be 'encodec', got {codec.model_type!r}"
        )
    hop = prod(codec.upsampling_ratios)
    rate, remainder = divmod(codec.sampling_rate, hop)
    if remainder:
        raise CheckpointError(
            f"checkpoint {name}: the sample rate must be a multiple of the hop of {hop} samples, got {codec.sampling_rate} Hz"
        )
    if codec.codebook_size != decoder.vocab_size:
        raise CheckpointError(
            f"checkpoint {name}: codec and decoder must have the same codebook size, got {codec.codebook_size} and "
            f"{decoder.vocab_size}"
        )
    channels = decoder.audio_channels
    if channels not in (1, 2) or decoder.num_codebooks % channels:
        raise CheckpointError(
            f"checkpoint {name}: the decoder must have 1 channel, or 2 channels with the same number of codebooks each; got "
            f"{channels} channels and {decoder.num_codebooks} codebooks"
        )
    num_quantizers = max(1, int(codec.target_bandwidths[0] * 1000 // (log2(codec.codebook_size) * rate)))
    if num_quantizers * channels != decoder.num_codebooks * codec.audio_channels:
        raise CheckpointError(
            f"checkpoint {name}: codec and decoder must have the same number of codebooks per channel, got {num_quantizers} for "
            f"{codec.audio_channels} channel(s) and {decoder.num_codebooks} for {channels} channel(s)"
        )


def _limit(stated: int | None, given: int | None, *, default: int) -> tuple[int, Source]:
    """Returns the length of the longest window, in frames, and the origin of this length."""
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise CheckpointError(f"max_frames must be a positive whole number, got {given!r}")
        return given, "given"
    if stated is None or stated == TRANSFORMERS_DEFAULT_LENGTH:
        return default, "default"
    return stated, "generation_config"


def _notes(spec: CodecSpec, source: Source, name: str, *, stated: int | None, positions: int) -> tuple[str, ...]:
    """Returns a note if the maximum window length may differ from the length that the model was trained on.

    Users often set `max_length` to the length of the audio that they generate, and `save_pretrained` saves that value.
    No note is needed if the length is 30 s, as in MusicGen, or if the decoder has exactly one position per step of the longest
    window, as in the demo model.
    """
    trained = DEFAULT_WINDOW_S * spec.frame_rate_hz
    window_s = spec.max_frames / spec.frame_rate_hz
    if source == "default" and stated is not None:
        return (
            f"checkpoint {name}: max_length {stated} in {GENERATION_CONFIG} is an old default of transformers and was ignored; "
            f"windows hold up to {window_s:g} s (set max_frames to change this)",
        )
    if source != "generation_config" or spec.max_frames == trained or spec.max_steps == positions:
        return ()
    return (
        f"checkpoint {name}: windows hold up to {window_s:g} s, because {GENERATION_CONFIG} has "
        f"max_length {spec.max_frames}; MusicGen was trained on {DEFAULT_WINDOW_S} s (set max_frames={trained} to use this length)",
    )
