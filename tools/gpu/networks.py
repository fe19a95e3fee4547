"""A network of one shape in float32 and bfloat16, for transformers and for this package, and its random inputs."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import load, require_causal
from musicgen_eval.models.decoder.fused_decoder import FusedDecoder
from tools.gpu.costs import DecoderShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Networks:
    """The same weights in two dtypes.

    Attributes:
        shape: Name of the shape.
        sizes: Sizes of the decoder.
        num_parameters: Number of parameters of the decoder.
        composites: Dtype name -> `MusicgenForConditionalGeneration` of transformers with the codec on the CPU.
        fused: Dtype name -> decoder of the package, which shares its memory with the composite.
        max_frames: Length of the longest window in frames.
    """

    shape: str
    sizes: DecoderShape
    num_parameters: int
    composites: Mapping[str, Any]
    fused: Mapping[str, FusedDecoder]
    max_frames: int

    @classmethod
    def load(cls, shape: str, device: torch.device) -> Networks:
        """Loads the demo, or creates random weights on the device."""
        composites = {}
        for name, dtype in DTYPES.items():
            model = load(shape, device=device)
            if name == "float32":
                require_causal(model)
            composites[name] = model.to(dtype)
        decoder = composites["float32"].decoder
        return cls(
            shape=shape,
            sizes=DecoderShape.of(decoder.config),
            num_parameters=sum(parameter.numel() for parameter in decoder.parameters()),
            composites=composites,
            fused={
                name: FusedDecoder(composites[name].decoder, dtype, in_place=True) for name, dtype in DTYPES.items()
            },
            max_frames=500 if shape == "demo" else 1500,
        )

    def codes(self, batch: int, num_frames: int) -> Tensor:
        """Returns (batch, K, num_frames) random codes, which are the same in each call."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, self.sizes.num_codebooks, num_frames)
        return torch.randint(0, self.sizes.codebook_size, shape, generator=generator).to(self.fused["float32"].device)

    def texts(self, batch: int, num_tokens: int) -> Tensor:
        """Returns (batch, num_tokens, D) random text states, which are the same in each call."""
        generator = torch.Generator().manual_seed(1)
        states = torch.randn(batch, num_tokens, self.sizes.width, generator=generator)
        return states.to(self.fused["float32"].device)


def release_memory(*fused: FusedDecoder) -> None:
    """Frees the cached steps of decoders, and returns unused memory to the device."""
    for decoder in fused:
        decoder.last_steps = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
