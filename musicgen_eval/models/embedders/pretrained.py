"""Finds and loads the transformers checkpoint of an embedder.

    files of a checkpoint --find_pretrained--> files and source --load_pretrained--> model in float32

Weights are read from safetensors files only. A weight that was not loaded is an error, because transformers would use a random
weight instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import AutoFeatureExtractor, PreTrainedModel

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import Checkpoint, load_config
from musicgen_eval.models.checkpoint_files import CheckpointFiles, first_line, read_config
from musicgen_eval.models.embedders.embedder import WeightsSource
from musicgen_eval.models.embedders.licences import UNKNOWN, find_licence, licence_named
from musicgen_eval.models.folder_digest import folder_digest
from musicgen_eval.models.weights import create_model, refuse_pickles, weight_files

Model = TypeVar("Model", bound=PreTrainedModel)
EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")
COMPUTED_BUFFERS = ("position_ids", "token_type_ids", "relative_position_index", "num_batches_tracked")
"""Last parts of the names of buffers that transformers computes, and that may therefore be missing or unused."""


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that has been found and checked.

    Attributes:
        files: The checkpoint's files.
        source: Origin of the weights.
        trust_remote_code: Whether the checkpoint's own code may be run.
    """

    files: CheckpointFiles
    source: WeightsSource
    trust_remote_code: bool = False


def find_pretrained(
    files: CheckpointFiles,
    *,
    example: str,
    revision: str | None = None,
    licence: str | None = None,
    model_types: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Pretrained:
    """Checks a checkpoint and describes the origin of its weights.

    Args:
        files: The checkpoint's files.
        example: Hub name of a suitable checkpoint, for error messages.
        revision: Hub branch, tag or commit with which the files were found, for the recipe.
        licence: Licence of the weights. None means the licence on the model card.
        model_types: Allowed values of `model_type` in the configuration. Empty means that any type is allowed.
        trust_remote_code: Whether the checkpoint's own code may be run.

    Raises:
        CheckpointError: If the checkpoint has another type, an invalid configuration, or no safetensors weights.
    """
    written = read_config(files)
    if model_types and written.get("model_type") not in model_types:
        raise CheckpointError(
            f"checkpoint {files.name} has type {written.get('model_type')!r} and class {written.get('architectures')}, but the "
            f"type must be {' or '.join(map(repr, model_types))}; choose a checkpoint such as {example}"
        )
    refuse_pickles(files)
    weight_files(files)
    load_config(files, trust_remote_code=trust_remote_code)  # names an invalid value before any weights are read
    return Pretrained(files, _source(files, revision, licence, trust_remote_code), trust_remote_code)


def source_of(checkpoint: Checkpoint, *, licence: str | None = None) -> WeightsSource:
    """Returns the origin of the weights of a MusicGen checkpoint.

    Args:
        checkpoint: The checkpoint. The weights of a model in memory have an unknown licence, unless `licence` is given.
        licence: Licence of the weights. None means the licence on the model card.
    """
    if checkpoint.digest is not None:
        return WeightsSource(checkpoint.name, None, None, checkpoint.digest, licence_named(licence or UNKNOWN))
    return _source(checkpoint.files, checkpoint.revision, licence)


def load_pretrained(
    found: Pretrained, model_class: type[Model], *, ignored_keys: Sequence[str] = (), hint: str = ""
) -> Model:
    """Loads a model in float32, on the CPU, in eval mode.

    Args:
        found: The checkpoint.
        model_class: Class of the model, or an auto class of transformers.
        ignored_keys: Prefixes of the names of weights that may be missing or unused.
        hint: Further advice, added to the error about weights that were not loaded.

    Raises:
        CheckpointError: If the weights cannot be loaded, or if a weight is missing, unused, or has another shape. The message names
            every such weight.
    """
    given = {"trust_remote_code": True} if found.trust_remote_code else {}
    # Otherwise, transformers would raise an error that does not name the weights whose shapes differ.
    given["ignore_mismatched_sizes"] = True
    model, info = create_model(found.files.name, model_class, str(found.files.folder), **given)
    _refuse_keys_not_loaded(found.files.name, info, ignored_keys, hint)
    return model.requires_grad_(False)


def load_extractor(found: Pretrained, extractor_class: type | None = None) -> Any:
    """Loads the feature extractor, which converts audio to the input of the model.

    Args:
        found: The checkpoint.
        extractor_class: Required class of the feature extractor. None means that any class is accepted.

    Raises:
        CheckpointError: If the checkpoint has no feature extractor, or one of another class, or if it cannot be loaded.
    """
    present = [found.files.find_if_known(name) for name in EXTRACTOR_FILES]
    if not any(present):
        raise CheckpointError(
            f"checkpoint {found.files.name} has no {EXTRACTOR_FILES[0]}, so the conversion of audio to the model's input is "
            "unknown; save the feature extractor in the folder that contains the weights"
        )
    try:
        extractor = AutoFeatureExtractor.from_pretrained(
            str(found.files.folder), trust_remote_code=found.trust_remote_code
        )
    except Exception as error:  # transformers raises many types of errors for invalid values
        raise CheckpointError(
            f"checkpoint {found.files.name}: its feature extractor cannot be loaded ({first_line(error)}); choose a checkpoint "
            "of an audio model"
        ) from error
    if extractor_class is not None and not isinstance(extractor, extractor_class):
        raise CheckpointError(
            f"checkpoint {found.files.name}: the feature extractor must be of class {extractor_class.__name__}, got "
            f"{type(extractor).__name__}; restore the original preprocessor_config.json"
        )
    return extractor


def _source(files: CheckpointFiles, revision: str | None, licence: str | None, has_code: bool = False) -> WeightsSource:
    patterns = ("*.safetensors", "*.json", "*.txt", *(["*.py"] if has_code else []))
    digest = folder_digest(files.folder, patterns=patterns) if files.commit is None else None
    return WeightsSource(files.name, revision, files.commit, digest, find_licence(files, given=licence))


def _refuse_keys_not_loaded(name: str, info: Mapping[str, Any], ignored: Sequence[str], hint: str) -> None:
    """Raises an error that names every weight that was not loaded, except for ignored weights and computed buffers."""

    def relevant(keys: Iterable[str]) -> list[str]:
        return [key for key in keys if not key.endswith(COMPUTED_BUFFERS) and not key.startswith(tuple(ignored))]

    groups = {
        "missing": relevant(info["missing_keys"]),
        "not used": relevant(info["unexpected_keys"]),
        "of another shape": [key for key, *_ in info["mismatched_keys"]],
    }
    parts = [f"{len(keys)} {state} ({', '.join(sorted(keys))})" for state, keys in groups.items() if keys]
    if parts:
        raise CheckpointError(
            f"checkpoint {name}: some weights were not loaded: {'; '.join(parts)}. Choose a checkpoint of the expected class, or "
            f"save the complete model again with save_pretrained{hint}"
        )
