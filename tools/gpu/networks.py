"""A network of one shape in float32 and bfloat16, for transformers and for this package, and random work for it."""

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
        shape: name of the shape.
        sizes: sizes of the decoder.
        num_parameters: of the decoder.
        composites: dtype name -> transformers' `MusicgenForConditionalGeneration`; its codec is on the CPU.
        fused: dtype name -> the package's decoder, whose memory the composite of that dtype shares.
        max_frames: longest window.
    """

    shape: str
    sizes: DecoderShape
    num_parameters: int
    composites: Mapping[str, Any]
    fused: Mapping[str, FusedDecoder]
    max_frames: int

    @classmethod
    def load(cls, shape: str, device: torch.device) -> Networks:
        """Loads the demo, or draws random weights on the device."""
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
        """(batch, K, num_frames) random codes, the same each time."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, self.sizes.num_codebooks, num_frames)
        return torch.randint(0, self.sizes.codebook_size, shape, generator=generator).to(self.fused["float32"].device)

    def texts(self, batch: int, num_tokens: int) -> Tensor:
        """(batch, num_tokens, D) random text states, the same each time."""
        generator = torch.Generator().manual_seed(1)
        states = torch.randn(batch, num_tokens, self.sizes.width, generator=generator)
        return states.to(self.fused["float32"].device)


def release_memory(*fused: FusedDecoder) -> None:
    """Frees the steps that decoders keep, and returns unused memory to the device."""
    for decoder in fused:
        decoder.last_steps = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
