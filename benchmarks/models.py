"""The networks of the benchmarks: the demo checkpoint, and random networks with the shapes of other checkpoints."""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import EncodecConfig, EncodecModel, MusicgenConfig, MusicgenForConditionalGeneration, T5Config
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

Shape = str
DEMO = Path(__file__).parent.parent / "musicgen_eval" / "models" / "demo"

DECODERS: dict[Shape, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "medium": {"hidden_size": 1536, "ffn_dim": 6144, "num_hidden_layers": 48, "num_attention_heads": 24},
    "large": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 48, "num_attention_heads": 32},
}
"""Decoder configuration per shape. All shapes except `tiny` are those of Meta's checkpoints."""


def load(shape: Shape, *, device: str | torch.device = "cpu") -> Any:
    """Loads the demo checkpoint, or creates a random network of a given shape, with a causal decoder.

    Args:
        shape: `demo` or a key of `DECODERS`.
        device: Device of the decoder and the text encoder. The codec is always on the CPU.
    """
    if shape == "demo":
        demo = MusicgenForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
        for name, part in demo.named_children():
            if name != "audio_encoder":
                part.to(device)
        return demo
    # The configurations are dictionaries, because sub-models that share configuration objects lose their causal mask
    # (transformers 5.17).
    parts: dict[str, Any] = {
        "text_encoder": T5Config(num_layers=1),
        "audio_encoder": _codec_config(shape),
        "decoder": MusicgenDecoderConfig(**DECODERS[shape]),
    }
    settings: dict[str, Any] = {name: part.to_dict() for name, part in parts.items()}
    config = MusicgenConfig(**settings)
    codec = copy.deepcopy(_codec("tiny" if shape == "tiny" else "small"))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return MusicgenForConditionalGeneration(config, audio_encoder=codec).eval()


@functools.cache
def _codec(shape: Shape) -> EncodecModel:
    """Returns a codec with random weights, and with codebooks that produce varied codes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = EncodecModel(_codec_config(shape)).eval()
    draw_codebooks(codec)
    return codec


def _codec_config(shape: Shape) -> EncodecConfig:
    is_tiny = shape == "tiny"
    return EncodecConfig(
        target_bandwidths=[1.2] if is_tiny else [2.2],
        sampling_rate=32_000,
        num_filters=8 if is_tiny else 64,
        hidden_size=16 if is_tiny else 128,
        upsampling_ratios=[8, 5, 4, 4],
        use_causal_conv=False,
        use_conv_shortcut=False,
        codebook_size=64 if is_tiny else 2048,
    )


@torch.inference_mode()
def draw_codebooks(codec: Any) -> None:
    """Sets the codebooks to latents of the codec. Those of a new codec are zero, so that every code is 0."""
    generator = torch.Generator().manual_seed(0)
    residual = codec.encoder(noise(10.0, generator)[None])[0].t()
    for layer in codec.quantizer.layers:
        rows = torch.randint(len(residual), (codec.config.codebook_size,), generator=generator)
        scatter = torch.randn(len(rows), residual.shape[1], generator=generator) * residual.std() * 0.1
        layer.codebook.embed.copy_(residual[rows] + scatter)
        residual = residual - layer.codebook.decode(layer.codebook.encode(residual))


def noise(seconds: float, generator: torch.Generator) -> Tensor:
    return torch.randn(1, int(seconds * 50) * 640, generator=generator) * 0.1


@torch.inference_mode()
def require_causal(model: Any) -> None:
    """Raises RuntimeError if the decoder is not causal, since the figures would not be comparable."""
    steps = torch.randint(0, 8, (model.decoder.config.num_codebooks, 8), generator=torch.Generator().manual_seed(0))
    steps = steps.to(model.device)
    before = model.decoder(input_ids=steps).logits
    steps[:, -1] += 1
    after = model.decoder(input_ids=steps).logits
    if not torch.equal(before[:, :-1], after[:, :-1]) or torch.equal(before, after):
        raise RuntimeError("the decoder is not causal: its configuration lost the attention implementation")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def heading(title: str, options: argparse.Namespace, *, module: str) -> str:
    """Returns the first lines of a report: title, date, device, versions and command."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    return (
        f"# {title}\n\n{datetime.date.today()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}, medians of {options.repeats}. "
        f"Written by `python -m {module} --markdown`.\n\n"
    )
