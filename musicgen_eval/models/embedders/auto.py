"""Embeds audio with any layer of any transformers audio model, such as MERT, wav2vec2 or HuBERT."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.dynamic_module_utils import get_relative_imports

from musicgen_eval.errors import CheckpointError, MetricError, near_matches
from musicgen_eval.models.checkpoint_files import CheckpointFiles, find_files, first_line, read_config, read_json
from musicgen_eval.models.embedders.embedder import WeightsSource
from musicgen_eval.models.embedders.pretrained import (
    EXTRACTOR_FILES,
    find_pretrained,
    load_extractor,
    load_pretrained,
)
from musicgen_eval.models.embedders.windowed import WindowedEmbedder

EXAMPLE = "facebook/hubert-base-ls960"
WINDOW_S = 5.0
"""Default length of a window, in seconds. MERT was trained on audio of this length."""


class AutoEmbedder(WindowedEmbedder):
    """Embeds audio as the mean over time of one layer's output in a transformers audio model.

    The layer is either a number, which selects one of the model's `hidden_states` (0 is the input of the first layer, and -1 is the
    model's output), or the name of a module, whose output must be (1, T, D) or (1, D). For a model with an encoder and a decoder,
    such as Whisper, only the encoder is used.

    Each window is converted by the published feature extractor with its own default settings. A clip that is shorter than a window
    is padded only if the feature extractor pads a single clip by default. Feature extractors of wav2vec2, HuBERT and MERT do not.

    Source: transformers 5.17, `AutoModel`, `AutoFeatureExtractor`.

    Args:
        source: Origin of the weights.
        extractor: Feature extractor of the checkpoint.
        model: Model in eval mode.
        layer: Number of a hidden state, or name of a module.
        window_s: Length of a window, in seconds.
        hop_s: Distance between the starts of consecutive windows, in seconds. None means the length of a window.
        remote_code: Whether the checkpoint's own code was used.
        ignored_keys: Prefixes of the names of weights that were not required to load.
        name: Name of the embedder.

    Attributes:
        layer: Number of the hidden state, counted from 0, or name of the module.

    Raises:
        CheckpointError: If the model has no such layer, or cannot process audio.
        MetricError: If `layer`, `window_s` or `hop_s` is invalid.
    """

    def __init__(
        self,
        source: WeightsSource,
        *,
        extractor: Any,
        model: Any,
        layer: int | str,
        window_s: float = WINDOW_S,
        hop_s: float | None = None,
        remote_code: bool = False,
        ignored_keys: Sequence[str] = (),
        name: str = "auto",
    ) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            raise MetricError(f"embedder {name}: layer must be a number or the name of a module, got {layer!r}")
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        super().__init__(
            name,
            source,
            extractor=extractor,
            model=model,
            dim=0,
            window_s=window_s,
            hop_s=hop_s if hop_s is not None else window_s,
        )
        self.layer = layer
        self._remote_code = remote_code
        self._ignored_keys = tuple(ignored_keys)
        self._output = threading.local()
        if isinstance(layer, str):
            self._module(layer).register_forward_hook(self._keep_output)
        self.dim = self._probe()

    def _embed_window(self, window: Tensor) -> Tensor:
        """Computes the (D,) embedding of one window of (N,) audio on the CPU."""
        try:
            states = self._states(window)
        except RuntimeError as error:
            if window.numel() >= self.window_samples or isinstance(error, torch.OutOfMemoryError):
                raise
            raise self.error(
                f"a clip of {window.numel()} samples cannot be processed, probably because it is shorter than the receptive "
                f"field of the model ({first_line(error)}); leave out such short clips"
            ) from error
        return states.mean(0)

    def _states(self, window: Tensor) -> Tensor:
        """Returns the (T, D) output of the layer for one window."""
        features = self.extract_features(window)
        if isinstance(self.layer, int):
            output = self.model(**features, output_hidden_states=True, return_dict=True)
            states = getattr(output, "hidden_states", None) or ()
            self.layer = self._number_in(states, self.layer)
            return self._checked(states[self.layer])
        self._output.value = None
        self.model(**features)
        return self._checked(self._output.value)

    def _keep_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Stores the output of the named module. Each thread processes one window at a time."""
        self._output.value = output if isinstance(output, Tensor) else output[0]

    def _checked(self, states: Any) -> Tensor:
        """Returns the (T, D) rows of a layer's output.

        Raises:
            CheckpointError: If the output has another shape.
        """
        if not isinstance(states, Tensor) or states.ndim not in (2, 3) or states.shape[0] != 1:
            got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: the output of layer {self.layer!r} must be (1, T, D) or (1, D), got {got}; choose "
                "another layer"
            )
        return states.flatten(0, -2)

    def _module(self, layer: str) -> nn.Module:
        modules = dict(self.model.named_modules())
        if layer not in modules or not layer:
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: the model has no layer {layer!r}; {near_matches(layer, filter(None, modules))}"
            )
        return modules[layer]

    def _probe(self) -> int:
        """Computes the embedding of silence, and returns its number of dimensions. Also replaces a negative number of a layer.

        Raises:
            CheckpointError: If the model cannot process the output of the feature extractor, or has no such layer.
        """
        silence = torch.zeros(self.window_samples)
        try:
            return self.run_alone(lambda: self._states(silence).mean(0)).numel()
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CheckpointError | torch.OutOfMemoryError):
                raise
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: {type(self.model).__name__} cannot process {self.window_s:g} s of audio "
                f"({first_line(error)}); choose a checkpoint of an audio model such as {EXAMPLE}, or a longer window_s"
            ) from error

    def _number_in(self, states: Sequence[Tensor], layer: int) -> int:
        """Returns the number of a hidden state, counted from 0.

        Raises:
            CheckpointError: If there is no such hidden state.
        """
        if not -len(states) <= layer < len(states):
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: layer must be from 0 to {len(states) - 1}, got {layer}"
                if states
                else f"checkpoint {self.checkpoint}: {type(self.model).__name__} has no hidden states; set layer to the name of "
                "a module"
            )
        return layer % len(states)

    def settings(self) -> dict[str, Any]:
        """Returns the class and layer of the model, the pooling, and whether the checkpoint's own code was used."""
        return {
            "model": type(self.model).__name__,
            "layer": self.layer,
            "pooling": "mean over time",
            "short_clips": f"as by {type(self.extractor).__name__}",
            "remote_code": self._remote_code,
            "ignored_keys": list(self._ignored_keys),
        }


def load_auto(
    checkpoint: str | Path,
    *,
    layer: int | str,
    revision: str | None = None,
    window_s: float = WINDOW_S,
    hop_s: float | None = None,
    ignored_keys: Sequence[str] = (),
    trust_remote_code: bool = False,
    licence: str | None = None,
    device: str = "cpu",
    name: str = "auto",
) -> AutoEmbedder:
    """Loads a transformers audio model for which `AutoModel` and `AutoFeatureExtractor` have classes.

    Args:
        checkpoint: Hub name or folder of the model, with safetensors weights and a feature extractor.
        layer: Number of a hidden state, or name of a module (see `AutoEmbedder`).
        revision: Hub branch, tag or commit. Allowed for hub names only.
        window_s: Length of a window, in seconds.
        hop_s: Distance between the starts of consecutive windows, in seconds. None means the length of a window.
        ignored_keys: Prefixes of the names of weights that may be missing from the checkpoint, or not used by the model, such as
            `lm_head.` for a fine-tuned checkpoint, or `masked_spec_embed`.
        trust_remote_code: Whether Python code from the checkpoint may be run. Such code can do anything that the user can do.
        licence: Licence of the weights. None means the licence on the model card.
        device: Device of the model.
        name: Name of the embedder.

    Raises:
        CheckpointError: If the checkpoint is not found, is not an audio model, has no such layer, or if a weight does not load. The
            message names every such weight.
        MetricError: If a setting is invalid.
    """
    if isinstance(ignored_keys, str):
        raise MetricError(f"embedder {name}: ignored_keys must be a list of prefixes, got {ignored_keys!r}")
    files = find_files(str(checkpoint), example=EXAMPLE, revision=revision)
    has_code = trust_remote_code and _find_remote_code(files)
    found = find_pretrained(files, example=EXAMPLE, revision=revision, licence=licence, trust_remote_code=has_code)
    extractor = load_extractor(found)
    if not hasattr(extractor, "sampling_rate"):
        raise CheckpointError(
            f"checkpoint {found.files.name}: {type(extractor).__name__} has no sampling_rate, so the checkpoint is not an audio "
            f"model; choose a checkpoint such as {EXAMPLE}"
        )
    auto_class: Any = AutoModel
    hint = ", or set ignored_keys to the prefixes of weights that are not needed"
    model: Any = load_pretrained(found, auto_class, ignored_keys=ignored_keys, hint=hint)
    return AutoEmbedder(
        found.source,
        extractor=extractor,
        model=model.to(device),
        layer=layer,
        window_s=window_s,
        hop_s=hop_s,
        remote_code=has_code,
        ignored_keys=ignored_keys,
        name=name,
    )


def _find_remote_code(files: CheckpointFiles) -> bool:
    """Downloads the Python modules that a checkpoint's configuration files name. Returns whether there are any.

    Raises:
        CheckpointError: If a module is in another hub repository, because the checkpoint's commit does not identify that code.
    """
    written = [read_config(files)]
    written += [read_json(files, path) for path in map(files.find_if_known, EXTRACTOR_FILES) if path is not None]
    references = [reference for config in written for reference in _references(config.get("auto_map"))]
    elsewhere = [reference for reference in references if "--" in reference]
    if elsewhere:
        raise CheckpointError(
            f"checkpoint {files.name} uses code of another repository ({elsewhere[0]}), whose version is not recorded; copy the "
            "Python files into the checkpoint's folder, and remove the prefix up to -- in auto_map"
        )
    pending = [f"{reference.partition('.')[0]}.py" for reference in references]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        path = files.find_if_known(name) if name not in seen else None
        seen.add(name)
        if path is not None:
            pending += [f"{module}.py" for module in get_relative_imports(path)]
    return bool(seen)


def _references(auto_map: Any) -> list[str]:
    """Returns the references to classes, `module.Class`, in the `auto_map` of a configuration file."""
    values = auto_map.values() if isinstance(auto_map, dict) else []
    nested = [value if isinstance(value, list | tuple) else [value] for value in values]
    return [reference for group in nested for reference in group if isinstance(reference, str)]
