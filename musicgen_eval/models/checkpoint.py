"""Finds a checkpoint and reads its specification from its configuration files, without weights.

Knows names (`demo`, a hub name, a folder) and transformers' configurations; loads nothing large.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from math import log2, prod
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, EncodecConfig, GenerationConfig, MusicgenConfig

from musicgen_eval.delay import default_delays
from musicgen_eval.errors import CheckpointError, near_matches
from musicgen_eval.records import CodecSpec

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo"
DEFAULT_WINDOW_S = 30
DEFAULT_REVISION = "main"  # the hub's own default; a folder has no revisions


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found, and what its configuration says.

    Attributes:
        name: as the user named it; a local folder by its absolute path.
        location: what transformers is given: a folder or a hub name.
        revision: hub revision as asked for, or None.
        commit: hub commit that it resolved to, or None for a folder.
        spec: its codes.
        max_frames_from: where `spec.max_frames` was found: `generation_config`, `given`, or `default` (30 s).
    """

    name: str
    location: str
    revision: str | None
    commit: str | None
    spec: CodecSpec
    max_frames_from: Literal["generation_config", "given", "default"]


def find_checkpoint(
    checkpoint: str | Path, *, revision: str | None = None, max_frames: int | None = None
) -> Checkpoint:
    """Finds a checkpoint and reads its `CodecSpec` from its configuration alone.

    Args:
        checkpoint: `demo`, a hub name such as `facebook/musicgen-small`, or a local folder in transformers' format.
        revision: hub branch, tag or commit; only for hub names.
        max_frames: overrides the longest window that the checkpoint states.

    Returns:
        The checkpoint's description.

    Raises:
        CheckpointError: not found, not MusicGen, or a configuration that does not fit together.
    """
    name = str(checkpoint)
    folder = DEMO_FOLDER / "model" if name == DEMO else Path(checkpoint).expanduser()
    local = folder.is_dir()
    if local and revision is not None:
        raise CheckpointError(f"checkpoint {name}: a revision ({revision}) goes with a hub name, not with a folder")
    if not local and not _is_hub_name(name):
        raise CheckpointError(
            f"checkpoint {name!r} is neither 'demo', nor a folder, nor a hub name such as 'facebook/musicgen-small'; "
            f"{near_matches(name, [DEMO])}"
        )
    location = str(folder) if local else name
    try:
        config = AutoConfig.from_pretrained(
            location, revision=revision or DEFAULT_REVISION, trust_remote_code=False
        )  # a checkpoint's own code is not even asked about
    except (OSError, ValueError) as error:
        raise CheckpointError(_not_found(name, folder, local, error)) from error
    if not isinstance(config, MusicgenConfig):
        raise CheckpointError(
            f"checkpoint {name} is of type {config.model_type!r}; expected 'musicgen' (text, mono or stereo). "
            "Melody checkpoints feed the decoder differently and are not supported"
        )
    try:
        stated = GenerationConfig.from_pretrained(location, revision=revision or DEFAULT_REVISION).max_length
    except OSError:
        stated = None
    spec, source = _spec(config, name, stated=stated, given=max_frames)
    commit = getattr(config, "_commit_hash", None)
    name = lasting_name(name)
    return Checkpoint(name=name, location=location, revision=revision, commit=commit, spec=spec, max_frames_from=source)


def lasting_name(checkpoint: str) -> str:
    """A name that means the same from another folder: the path of a local checkpoint is made absolute."""
    folder = Path(checkpoint).expanduser()
    if checkpoint == DEMO or not folder.is_dir():
        return checkpoint
    return os.path.abspath(folder)  # noqa: PTH100 - without `..`, which pathlib keeps


def _spec(
    config: MusicgenConfig, name: str, *, stated: int | None, given: int | None
) -> tuple[CodecSpec, Literal["generation_config", "given", "default"]]:
    codec: Any = config.audio_encoder
    decoder: Any = config.decoder
    if not isinstance(codec, EncodecConfig):
        raise CheckpointError(
            f"checkpoint {name}: its audio encoder is of type {codec.model_type!r}; expected 'encodec'"
        )
    hop = prod(codec.upsampling_ratios)
    rate, remainder = divmod(codec.sampling_rate, hop)
    if remainder:
        raise CheckpointError(
            f"checkpoint {name}: {codec.sampling_rate} Hz is no whole number of frames of {hop} samples"
        )
    if codec.codebook_size != decoder.vocab_size:
        raise CheckpointError(
            f"checkpoint {name}: its codec has {codec.codebook_size} entries a codebook, its decoder {decoder.vocab_size}"
        )
    channels = decoder.audio_channels
    if channels not in (1, 2) or decoder.num_codebooks % channels:
        raise CheckpointError(f"checkpoint {name}: {decoder.num_codebooks} codebooks for {channels} channels")
    num_quantizers = max(1, int(codec.target_bandwidths[0] * 1000 // (log2(codec.codebook_size) * rate)))
    if num_quantizers * channels != decoder.num_codebooks * codec.audio_channels:
        raise CheckpointError(
            f"checkpoint {name}: its codec gives {num_quantizers} codebooks for {codec.audio_channels} channel(s), its decoder "
            f"reads {decoder.num_codebooks} for {channels}"
        )
    source: Literal["generation_config", "given", "default"]
    if given is not None:
        if given < 1:
            raise CheckpointError(f"max_frames must be at least 1, got {given}")
        max_frames, source = given, "given"
    elif stated is not None:
        max_frames, source = stated, "generation_config"
    else:
        max_frames, source = DEFAULT_WINDOW_S * rate, "default"
    return CodecSpec(
        sample_rate_hz=codec.sampling_rate,
        frame_rate_hz=rate,
        hop_samples=hop,
        num_codebooks=decoder.num_codebooks,
        codebook_size=decoder.vocab_size,
        channels=channels,
        delays=default_delays(decoder.num_codebooks, channels=channels),
        max_frames=max_frames,
    ), source


def _is_hub_name(name: str) -> bool:
    """Whether a name reads `owner/model`; MusicGen checkpoints have no shorter ones."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def _not_found(name: str, folder: Path, local: bool, error: Exception) -> str:
    if local:
        missing = (
            "has no config.json" if not (folder / "config.json").is_file() else f"cannot be read ({_first_line(error)})"
        )
        return f"checkpoint folder {name} {missing}; expected a MusicGen checkpoint in transformers' format"
    return f"checkpoint {name!r} was found neither on the hub nor in its local cache ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
