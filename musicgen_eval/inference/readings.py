"""Scores the readings of windows: the plain one, and those that some metric named.

    window, codes, texts --feed(reading)--> what the decoder hears --score_windows--> aligned to the window again

    no_context:  codes   c c c # # # #      fed    # # # #        given back   NaN NaN NaN x x x x

Knows readings and the model; nothing of files, metrics or Lightning.
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
    """A window whose audio has become codes.

    Attributes:
        window: the window.
        codes: (K, T) int64.
        text: its track's text; None: the null condition.
        other_text: another track's text, for `other_text`.
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
    """Scores every reading of every window, one pass a reading.

    Args:
        model: the model.
        windows: a batch.
        readings: which to score.
        tail: see `score_codes`, relative to each window's own length.
        seed: of the generators that change codes.
        with_logits: names of the readings whose logits are wanted.

    Returns:
        For each window, reading name -> what it left, or None where it does not exist: `no_text` of a window without a
        text, `no_context` of one without a context.
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
    """(K, T) bool on the CPU: the target's codes, less what `tail="drop"` leaves out of the window's own T."""
    mask = torch.ones((spec.num_codebooks, window.num_frames), dtype=torch.bool)
    mask[:, : window.context_frames] = False
    return mask & tail_mask(window.num_frames, delays=spec.delays) if tail == "drop" else mask


def reading_generator(seed: int, window: Window, reading: Reading) -> torch.Generator:
    """A generator that depends on seed, track, window and reading alone, so not on batch or device."""
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
            f"reading {reading.name!r} wants another track's text, and track {coded.window.track} finds none; "
            "give at least two tracks different texts"
        )
    return coded.other_text


def _start(reading: Reading, window: Window) -> int:
    return window.context_frames if reading.context == "none" else 0


def _fed_codes(reading: Reading, coded: CodedWindow, seed: int, num_entries: int) -> Tensor:
    if reading.change is None:
        return coded.codes
    # a copy, since a change that works in place would alter the codes of every other reading
    changed = reading.change(coded.codes.cpu().clone(), coded.window, reading_generator(seed, coded.window, reading))
    if changed.shape != coded.codes.shape or changed.dtype != coded.codes.dtype:
        raise MetricError(
            f"reading {reading.name!r} changed codes {tuple(coded.codes.shape)} {coded.codes.dtype} into "
            f"{tuple(changed.shape)} {changed.dtype}; shape and dtype must stay"
        )
    if changed.numel() and not 0 <= int(changed.min()) <= int(changed.max()) < num_entries:
        raise MetricError(
            f"reading {reading.name!r} changed codes into {int(changed.min())} to {int(changed.max())}; "
            f"they must stay in [0, {num_entries})"
        )
    return changed.to(coded.codes.device)


def _aligned(window: Window, codes: Tensor, mask: Tensor, scores: Scores, start: int) -> ScoredWindow:
    """Puts what was scored from frame `start` on back into its place in the window."""
    pad = torch.nn.functional.pad
    return ScoredWindow(
        window=window,
        codes=codes,
        scored=mask,
        nll=pad(scores.nll, (start, 0), value=float("nan")),
        rank=pad(scores.rank, (start, 0), value=-1),
        logits=None if scores.logits is None else pad(scores.logits, (0, 0, start, 0)),
    )
