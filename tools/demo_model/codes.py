"""Encodes songs to codes in parallel processes with one thread each."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EncodecModel

from demo_model import music


def encode_songs(
    codec_folder: Path, numbers: range, *, num_frames: int, num_processes: int
) -> tuple[torch.Tensor, list[str]]:
    """Encodes songs, each in one piece and alone.

    Args:
        codec_folder: Folder written by `EncodecModel.save_pretrained`.
        numbers: Numbers of the songs.
        num_frames: Length of each song in frames.
        num_processes: Number of processes.

    Returns:
        (songs, K, T) int16 codes, and the texts of the songs.
    """
    chunks = [list(numbers)[at : at + 50] for at in range(0, len(numbers), 50)]
    work = partial(_encode_chunk, codec_folder, num_frames)
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        codes = torch.cat([torch.from_numpy(part) for part in pool.map(work, chunks)])
    return codes, [music.draw_song(number).text for number in numbers]


def load_codec(folder: Path) -> EncodecModel:
    """Loads the codec in float32 with weights rounded to float16, so that codes equal those of the exported checkpoint."""
    return EncodecModel.from_pretrained(folder, dtype=torch.float16).float().eval()


def encode(codec: Any, audio: torch.Tensor) -> torch.Tensor:
    """Encodes (B, N) audio at 32 kHz to (B, K, T) codes with an `EncodecModel`."""
    with torch.no_grad():
        return codec.encode(audio[:, None]).audio_codes[0]


_loaded: dict[Path, EncodecModel] = {}


def _encode_chunk(codec_folder: Path, num_frames: int, numbers: list[int]) -> np.ndarray:
    if codec_folder not in _loaded:
        torch.set_num_threads(1)
        _loaded[codec_folder] = load_codec(codec_folder)
    songs = [music.render(music.draw_song(n), num_samples=num_frames * music.HOP_SAMPLES) for n in numbers]
    codes = [encode(_loaded[codec_folder], torch.from_numpy(song)) for song in songs]
    return torch.cat(codes).to(torch.int16).numpy()
