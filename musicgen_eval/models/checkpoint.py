"""Finds a checkpoint and reads its specification from its configuration files, without weights.

Knows names (`demo`, a hub name, a folder) and transformers' configurations; loads nothing large.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from math import log2, prod
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, EncodecConfig, MusicgenConfig

from musicgen_eval.errors import CheckpointError, near_matches
from musicgen_eval.models.checkpoint_files import CONFIG, CheckpointFiles, first_line, locate_files
from musicgen_eval.models.delay import default_delays
from musicgen_eval.records import CodecSpec

DEMO = "demo"
DEMO_MODEL = Path(__file__).parent / "demo"
DEFAULT_WINDOW_S = 30
GENERATION_CONFIG = "generation_config.json"
IN_MEMORY = "model in memory"
PARTS = ("text_encoder", "audio_encoder", "decoder")
TRANSFORMERS_DEFAULT_LENGTH = 20
"""What transformers once wrote as `max_length` where nobody had set one; it is no model's limit."""

Source = Literal["generation_config", "given", "default"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found, and what its configuration says.

    Attributes:
        name: as the user named it; a local folder by its absolute path.
        location: the folder of its files; "" for a model in memory.
        revision: hub revision as asked for, or None.
        commit: hub commit that it resolved to, or None for a folder.
        spec: its codes.
        max_frames_from: where `spec.max_frames` was found: `generation_config`, `given`, or `default` (30 s, or what the decoder's
            positions allow if that is less).
        is_reachable: whether files that are not cached can be downloaded from the hub.
        digest: of a model in memory, of everything that determines its numbers.
        notes: what the user should know about how the checkpoint is used, one line each.
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
        """Where its files are."""
        return CheckpointFiles(self.name, Path(self.location), commit=self.commit, is_reachable=self.is_reachable)


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
    """Describes a model that is no file.

    Args:
        config: of the model.
        stated: `max_length` of its generation config.
        given: overrides it.
        digest: of everything that determines its numbers; part of the name, so that two models are told apart.

    Raises:
        CheckpointError: a configuration that does not fit together.
    """
    stated = None if given is not None else _checked_length(stated, IN_MEMORY)
    spec, source, notes = _spec(config, IN_MEMORY, stated=stated, given=given)
    return Checkpoint(f"{IN_MEMORY} ({digest})", "", None, None, spec, source, digest=digest, notes=notes)


def refuse_other_types(checkpoint: object) -> None:
    """Refuses what is neither a name nor a path.

    Raises:
        CheckpointError: says what can be given.
    """
    if not isinstance(checkpoint, str | Path):
        raise CheckpointError(
            f"checkpoint must be 'demo', a hub name, a folder, a MusicgenForConditionalGeneration or a model from load_model, "
            f"got {type(checkpoint).__name__}; another kind of model can be saved with save_pretrained and given as a folder"
        )


def lasting_name(checkpoint: str) -> str:
    """A name that means the same from another folder: the path of a local checkpoint is made absolute."""
    folder = _expanded(checkpoint)
    if checkpoint == DEMO or not _is_folder(folder):
        return checkpoint
    return os.path.abspath(folder)  # noqa: PTH100 - without `..`, which pathlib keeps


def _files(name: str, revision: str | None) -> CheckpointFiles:
    """Finds the folder, or the commit on the hub, that a name stands for."""
    folder = DEMO_MODEL if name == DEMO else _expanded(name)
    if _is_folder(folder):
        if revision is not None:
            raise CheckpointError(f"checkpoint {name}: a revision ({revision}) goes with a hub name, not with a folder")
        return CheckpointFiles(lasting_name(name), folder)
    if name.startswith(IN_MEMORY):
        raise CheckpointError(
            f"checkpoint {name!r} was a model in memory, which no run can load again; pass the model itself, from Python, "
            "with the same run_dir"
        )
    if not _is_hub_name(name):
        raise CheckpointError(
            f"checkpoint {name!r} is neither 'demo', nor a folder, nor a hub name such as 'facebook/musicgen-small'; "
            f"{near_matches(name, [DEMO])}"
        )
    return locate_files(name, revision=revision)


def _config(files: CheckpointFiles) -> MusicgenConfig:
    path = files.folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint folder {files.name} has no {CONFIG}; expected a MusicGen checkpoint in transformers' format"
        )
    written = _read_json(files, path)
    if written.get("transformers_weights") is not None:  # transformers would open that file instead, whatever it is
        raise CheckpointError(
            f"checkpoint {files.name}: {CONFIG} names another weights file ({written['transformers_weights']!r}); remove "
            "`transformers_weights` from it, or save the model again with save_pretrained"
        )
    if written.get("model_type") == "musicgen":
        missing = [part for part in PARTS if not isinstance(written.get(part), dict)]
        if missing:
            raise CheckpointError(
                f"checkpoint {files.name}: {CONFIG} does not describe {', '.join(missing)}; save the whole model again with "
                "save_pretrained"
            )
    try:
        config = AutoConfig.from_pretrained(
            str(files.folder), trust_remote_code=False
        )  # its own code is not asked about
    except Exception as error:  # a configuration may hold anything, and transformers raises many types
        raise CheckpointError(f"checkpoint {files.name}: {CONFIG} cannot be read ({first_line(error)})") from error
    if not isinstance(config, MusicgenConfig):
        raise CheckpointError(
            f"checkpoint {files.name} is of type {config.model_type!r}; expected 'musicgen' (text, mono or stereo). "
            "Melody checkpoints feed the decoder differently and are not supported"
        )
    return config


def _stated_max_length(files: CheckpointFiles) -> int | None:
    """Returns `max_length` of the generation config; None if there is none.

    Raises:
        CheckpointError: a damaged file, a number that is no length, or a file that exists where it cannot be reached.
    """
    path = files.find(GENERATION_CONFIG)
    return None if path is None else _checked_length(_read_json(files, path).get("max_length"), files.name)


def _checked_length(stated: object, name: str) -> int | None:
    if stated is None:
        return None
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        raise CheckpointError(
            f"checkpoint {name}: {GENERATION_CONFIG} gives max_length {stated!r}; expected a number of frames, at least 1. "
            "Correct it, or set max_frames"
        )
    return stated


def _read_json(files: CheckpointFiles, path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {files.name}: {path.name} cannot be read ({first_line(error)})") from error
    if not isinstance(written, dict):
        raise CheckpointError(f"checkpoint {files.name}: {path.name} holds {type(written).__name__}; expected settings")
    return written


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a zero byte
        return False


def _expanded(name: str) -> Path:
    """A path whose `~` stands for the home directory; a name that only begins with a tilde stays as it is."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises where there is no such home


def _spec(
    config: MusicgenConfig, name: str, *, stated: int | None, given: int | None
) -> tuple[CodecSpec, Source, tuple[str, ...]]:
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
    delays = default_delays(decoder.num_codebooks, channels=channels)
    positions = decoder.max_position_embeddings
    default = max(1, min(DEFAULT_WINDOW_S * rate, positions - max(delays)))
    max_frames, source = _limit(stated, given, default=default)
    spec = CodecSpec(
        sample_rate_hz=codec.sampling_rate,
        frame_rate_hz=rate,
        hop_samples=hop,
        num_codebooks=decoder.num_codebooks,
        codebook_size=decoder.vocab_size,
        channels=channels,
        delays=delays,
        max_frames=max_frames,
    )
    return spec, source, _notes(spec, source, name, stated=stated, positions=positions)


def _limit(stated: int | None, given: int | None, *, default: int) -> tuple[int, Source]:
    """The longest window in frames, and where it was found."""
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise CheckpointError(f"max_frames must be a whole number of at least 1, got {given!r}")
        return given, "given"
    if stated is None or stated == TRANSFORMERS_DEFAULT_LENGTH:
        return default, "default"
    return stated, "generation_config"


def _notes(spec: CodecSpec, source: Source, name: str, *, stated: int | None, positions: int) -> tuple[str, ...]:
    """Reports a window length that may be no property of the model.

    `max_length` is often set to the length of a sample, and `save_pretrained` keeps it. It is trusted without a note if it is
    MusicGen's 30 s, or if the decoder was built for exactly that many positions, as the demo's was.
    """
    trained = DEFAULT_WINDOW_S * spec.frame_rate_hz
    window_s = spec.max_frames / spec.frame_rate_hz
    if source == "default" and stated is not None:
        return (
            f"checkpoint {name}: max_length {stated} in {GENERATION_CONFIG} is an old default of transformers and no limit of a "
            f"model; windows hold up to {window_s:g} s (max_frames sets another length)",
        )
    if source != "generation_config" or spec.max_frames == trained or spec.max_steps == positions:
        return ()
    return (
        f"checkpoint {name}: windows hold up to {window_s:g} s, because {GENERATION_CONFIG} has "
        f"max_length {spec.max_frames}; MusicGen was trained on {DEFAULT_WINDOW_S} s (max_frames={trained})",
    )


def _is_hub_name(name: str) -> bool:
    """Whether a name reads `owner/model`; MusicGen checkpoints have no shorter ones."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
