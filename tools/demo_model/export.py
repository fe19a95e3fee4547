"""Writes a checkpoint in the format of transformers: configurations, fp16 safetensors, tokenizer and processor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import EncodecFeatureExtractor, GenerationConfig, MusicgenProcessor

from demo_model import text
from demo_model.decoder import MAX_FRAMES, SPECIAL_TOKEN
from demo_model.places import CARD


def export(model: Any, folder: Path) -> None:
    """Writes all files that `from_pretrained` reads to a temporary folder, which then replaces the folder.

    Args:
        model: Trained `MusicgenForConditionalGeneration`, which is converted to float16.
        folder: Folder of the checkpoint. All files except the card are replaced.
    """
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model.generation_config = GenerationConfig(
        bos_token_id=SPECIAL_TOKEN,
        decoder_start_token_id=SPECIAL_TOKEN,
        pad_token_id=SPECIAL_TOKEN,
        do_sample=True,
        guidance_scale=3.0,
        max_length=MAX_FRAMES,
    )
    model.config.audio_encoder._name_or_path = ""  # otherwise the folder of the codec's training
    model.to(torch.float16).save_pretrained(beside)
    extractor = EncodecFeatureExtractor(
        feature_size=1, sampling_rate=model.config.audio_encoder.sampling_rate, padding_side="left"
    )
    MusicgenProcessor(extractor, text.build_tokenizer()).save_pretrained(beside)
    for file in beside.iterdir():
        file.chmod(0o644)  # save_pretrained writes weights that only the owner can read
    beside.chmod(0o755)
    if (folder / CARD).exists():
        shutil.copyfile(folder / CARD, beside / CARD)  # updated by the stage `checks`
    former = folder.with_name(folder.name + ".former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    beside.rename(folder)
    shutil.rmtree(former, ignore_errors=True)
