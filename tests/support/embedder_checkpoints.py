"""Tiny random checkpoints of the classes that embedders load, saved by transformers with safetensors weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    EncodecConfig,
    EncodecModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    RobertaTokenizer,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.support.codecs import TINY_CODEC

NUM_LABELS = 7
WAV2VEC2: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8],
    "conv_stride": [10, 8],
    "conv_kernel": [20, 8],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
    "mask_time_prob": 0.0,
}


def noise(num_samples: int, *, seed: int = 0) -> Tensor:
    """Returns (N,) float32 noise in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_samples, generator=generator) * 0.2).clamp(-1, 1)


def create(fn: Callable[[], Any]) -> Any:
    """Creates a model, with the same random weights each time, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fn().eval()


def randomise(model: nn.Module, *, scale: float = 1.0) -> None:
    """Draws large weights, so that different inputs have different outputs. New models have nearly constant outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "original0" not in name:
                fan_in = parameter[0].numel() if "embedding" not in name else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale * fan_in**-0.5)
            elif parameter.ndim == 1 and "norm" not in name.lower():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def save_codec(folder: Path, **changes: Any) -> EncodecModel:
    """Saves an `EncodecModel` with 20 frames per second at 800 Hz and 8 latent dimensions."""
    model = create(lambda: EncodecModel(EncodecConfig(**{**TINY_CODEC, **changes})))
    randomise(model, scale=1.5)
    model.save_pretrained(folder)
    return model


def save_clap(folder: Path, *, distinct_texts: bool = True, fused: bool = False) -> ClapModel:
    """Saves a `ClapModel` with windows of 1 s at 1600 Hz and 12 dimensions.

    Args:
        folder: Folder of the checkpoint.
        distinct_texts: Whether texts have different embeddings. Otherwise, the text encoder is broken.
        fused: Whether the model has feature fusion.
    """
    text = {
        "vocab_size": 261, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 130, "projection_dim": 12,
    }  # fmt: skip
    audio = {
        "num_mel_bins": 16, "spec_size": 32, "window_size": 2, "patch_embeds_hidden_size": 8, "depths": [1, 1],
        "num_attention_heads": [2, 2], "hidden_size": 16, "projection_dim": 12, "num_hidden_layers": 2, "enable_fusion": fused,
        "fusion_type": "aff_2d" if fused else None, "patch_size": 4, "patch_stride": [4, 4], "aff_block_r": 2,
    }  # fmt: skip
    model = create(lambda: ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=12)))
    randomise(model, scale=2.0)
    _centre_texts(model, save_tokenizer(folder))
    if not distinct_texts:
        with torch.no_grad():
            model.text_projection.linear2.bias.add_(10)
    model.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16, sampling_rate=1600, hop_length=27, fft_window_size=64, max_length_s=1, frequency_min=20,
        frequency_max=800, truncation="fusion" if fused else "rand_trunc", padding="repeatpad",
    ).save_pretrained(folder)  # fmt: skip
    return model


def _centre_texts(model: ClapModel, tokenizer: RobertaTokenizer) -> None:
    """Shifts the embeddings of texts, so that their mean is zero. Otherwise, random weights make all texts similar."""
    texts = [
        word for seed in range(20) for word in (f"{seed * 7919} music", chr(97 + seed) * 20, f"{chr(97 + seed)} song")
    ]
    with torch.no_grad():
        states = [model.text_model(**tokenizer(text, return_tensors="pt")).pooler_output for text in texts]
        model.text_projection.linear2.bias.sub_(model.text_projection(torch.cat(states)).mean(0))


def save_tokenizer(folder: Path) -> RobertaTokenizer:
    """Saves a RoBERTa tokenizer whose words are single bytes."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "<mask>"]
    tokenizer = RobertaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_ast(folder: Path, **changes: Any) -> ASTForAudioClassification:
    """Saves an `ASTForAudioClassification` with 7 labels and 16 dimensions, whose input has 110 frames of 10 ms at 16 kHz."""
    config = ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_mel_bins=16, max_length=110,
        frequency_stride=8, time_stride=8, patch_size=8, num_labels=NUM_LABELS, **changes,
    )  # fmt: skip
    model = create(lambda: ASTForAudioClassification(config))
    randomise(model)
    model.save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=16, max_length=110).save_pretrained(folder)
    return model


def save_wav2vec2(folder: Path, **changes: Any) -> Wav2Vec2Model:
    """Saves a `Wav2Vec2Model` with 3 layers and 16 dimensions at 1600 Hz."""
    model = create(lambda: Wav2Vec2Model(Wav2Vec2Config(**{**WAV2VEC2, **changes})))
    return _save_speech_model(folder, model)


def save_hubert(folder: Path, *, with_head: bool = False) -> HubertModel:
    """Saves a `HubertModel`, or a `HubertForCTC`, whose head `HubertModel` does not use."""
    config = HubertConfig(**WAV2VEC2)
    model = create(lambda: HubertForCTC(config) if with_head else HubertModel(config))
    return _save_speech_model(folder, model)


def save_whisper(folder: Path) -> WhisperModel:
    """Saves a `WhisperModel`, whose encoder has 2 layers, 16 dimensions and inputs of 1 s at 16 kHz."""
    config = WhisperConfig(
        vocab_size=20, num_mel_bins=16, encoder_layers=2, encoder_attention_heads=2, decoder_layers=1, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, d_model=16, max_source_positions=50, max_target_positions=20, pad_token_id=1,
        bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = create(lambda: WhisperModel(config))
    randomise(model)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    return model


def _save_speech_model(folder: Path, model: Any) -> Any:
    randomise(model)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=1600, do_normalize=True, return_attention_mask=False).save_pretrained(folder)
    return model


def edit_json(path: Path, **values: Any) -> None:
    """Changes values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
