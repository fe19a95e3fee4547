"""Scores the plain reading of each window, and the other readings that metrics request.

A reading is one teacher-forced pass over a window:

window, codes, texts --reading--> codes and text to feed --score_windows--> scores, aligned with the window

no_context:  codes   c c c # # # #      fed    # # # #      nll   NaN NaN NaN x x x x
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.inference.batch_scoring import score_windows
from musicgen_eval.inference.scoring import Scores, Tail
from musicgen_eval.models.delay import tail_mask
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.records import CodecSpec, Reading, ScoredWindow, Window


@dataclass(frozen=True)
class CodedWindow:
    """A window together with its codes and texts.

    Attributes:
        window: The window.
        codes: (K, T) int64 codes of the window.
        text: Text of the track. None means the null condition (no text).
        other_text: Text of a different track, for the reading `other_text`.
    """

    window: Window
    codes: Tensor
    text: str | None
    other_text: str | None = None


def score_readings(
    model: MusicGen,
    windows: Sequence[CodedWindow],
    readings: Sequence[Reading],
    *,
    tail: Tail = "score",
    seed: int = 0,
    with_logits: frozenset[str] = frozenset(),
) -> list[dict[str, ScoredWindow | None]]:
    """Scores every reading of every window, one reading at a time.

    Args:
        model: Loaded model.
        windows: Windows of one batch, with their codes and texts.
        readings: Readings to score.
        tail: See `score_codes`. The option applies to the frames of each window.
        seed: Seed for readings that alter codes at random.
        with_logits: Names of the readings whose logits are returned.

    Returns:
        For each window, a dictionary that maps the name of each reading to its scores, or to None if the reading does not exist for
        the window. For example, `no_text` does not exist for a window without text, and `no_context` does not exist for a window
        without a context.

    Raises:
        MetricError: If there is no text of a different track for `other_text`, or if a reading returns codes with an invalid shape,
            dtype or value.
    """
    results: list[dict[str, ScoredWindow | None]] = [{reading.name: None for reading in readings} for _ in windows]
    for reading in readings:
        rows = [row for row, coded in enumerate(windows) if _exists(reading, coded)]
        if not rows:
            continue
        fed = [_fed_codes(reading, windows[row], seed, model.spec.codebook_size) for row in rows]
        starts = [_start(reading, windows[row].window) for row in rows]
        masks = [scored_mask(windows[row].window, model.spec, tail) for row in rows]
        scores = score_windows(
            model,
            [codes[:, start:] for codes, start in zip(fed, starts, strict=True)],
            scored=[mask[:, start:] for mask, start in zip(masks, starts, strict=True)],
            texts=[_text(reading, windows[row]) for row in rows],
            tail=tail,
            with_logits=reading.name in with_logits,
        )
        for row, codes, start, mask, score in zip(rows, fed, starts, masks, scores, strict=True):
            results[row][reading.name] = _aligned(windows[row].window, codes, mask, score, start)
    return results


def scored_mask(window: Window, spec: CodecSpec, tail: Tail) -> Tensor:
    """Returns the (K, T) bool mask of the target's codes, on the CPU. The mask excludes the window's tail if `tail` is `drop`."""
    mask = torch.ones((spec.num_codebooks, window.num_frames), dtype=torch.bool)
    mask[:, : window.context_frames] = False
    return mask & tail_mask(window.num_frames, delays=spec.delays) if tail == "drop" else mask


def reading_generator(seed: int, window: Window, reading: Reading) -> torch.Generator:
    """Returns a random number generator for one reading of a window.

    The generator's seed depends on `seed`, the track, the window and the reading, but not on the batch or the device.
    """
    key = f"{seed}\0{window.track}\0{window.index}\0{reading.name}".encode()
    return torch.Generator().manual_seed(int.from_bytes(sha256(key).digest()[:8], "big") >> 1)


def _exists(reading: Reading, coded: CodedWindow) -> bool:
    if reading.text == "none" and not coded.text:
        return False
    return not (reading.context == "none" and coded.window.context_frames == 0)


def _text(reading: Reading, coded: CodedWindow) -> str | None:
    if reading.text == "own":
        return coded.text
    if reading.text == "none":
        return None
    if not coded.other_text:
        raise MetricError(
            f"reading {reading.name!r} requires the text of another track, but there is none for track {coded.window.track}; "
            "provide different texts for at least two tracks"
        )
    return coded.other_text


def _start(reading: Reading, window: Window) -> int:
    return window.context_frames if reading.context == "none" else 0


def _fed_codes(reading: Reading, coded: CodedWindow, seed: int, num_entries: int) -> Tensor:
    if reading.change is None:
        return coded.codes
    # the codes are cloned, because a change in place would affect the other readings
    changed = reading.change(coded.codes.cpu().clone(), coded.window, reading_generator(seed, coded.window, reading))
    if changed.shape != coded.codes.shape or changed.dtype != coded.codes.dtype:
        raise MetricError(
            f"reading {reading.name!r} changed the codes from {tuple(coded.codes.shape)} {coded.codes.dtype} to "
            f"{tuple(changed.shape)} {changed.dtype}; return codes of the same shape and dtype"
        )
    if changed.numel() and not 0 <= int(changed.min()) <= int(changed.max()) < num_entries:
        raise MetricError(
            f"reading {reading.name!r} changed the codes to values between {int(changed.min())} and {int(changed.max())}; "
            f"return codes in [0, {num_entries})"
        )
    return changed.to(coded.codes.device)


def _aligned(window: Window, codes: Tensor, mask: Tensor, scores: Scores, start: int) -> ScoredWindow:
    """Pads scores on the left to the full length of the window. Before padding, the scores begin at frame `start`."""
    pad = torch.nn.functional.pad
    return ScoredWindow(
        window=window,
        codes=codes,
        scored=mask,
        nll=pad(scores.nll, (start, 0), value=float("nan")),
        rank=pad(scores.rank, (start, 0), value=-1),
        logits=None if scores.logits is None else pad(scores.logits, (0, 0, start, 0)),
    )
