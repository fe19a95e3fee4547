"""The songs that continuations are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.records import Continuation
from song_similarity.clips import Clip
from song_similarity.distances import SAMPLE_RATE_HZ, Portrait, portraits


@dataclass(frozen=True)
class Songs:
    """The 4 s before the middle of each clip and the 4 s after it, encoded and decoded by the codec.

    Attributes:
        contexts: Portraits of the audio before the middle.
        ends: Portraits of the audio after the middle, which are the references.
        originals: (1, N) audio after the middle, before the codec.
        decoded: (1, N) audio after the middle, after the codec.
    """

    contexts: list[Portrait]
    ends: list[Portrait]
    originals: list[Tensor]
    decoded: list[Tensor]


def songs_of(model: MusicGen, clips: Sequence[Clip]) -> Songs:
    """Encodes and decodes the clips around their middles. Both sides are encoded together."""
    originals, contexts, ends = [], [], []
    for clip in clips:
        middle, span = clip.audio.shape[1] // 640 // 2 * 640, 4 * SAMPLE_RATE_HZ
        decoded = model.decode(model.encode([clip.audio[:, middle - span : middle + span]])[0])
        originals.append(clip.audio[:, middle : middle + span])
        contexts.append(decoded[:, :span])
        ends.append(decoded[:, span:])
    return Songs(portraits(model, contexts), portraits(model, ends), originals, ends)


def generated_portraits(
    model: MusicGen, found: Sequence[Continuation], clips: Sequence[Clip]
) -> list[tuple[int, Portrait]]:
    """Returns (row of the clip, portrait of the generated audio) of each continuation."""
    order = {clip.id: row for row, clip in enumerate(clips)}
    sounds = [one.generated for one in found if one.generated is not None]
    return list(zip([order[one.window.track] for one in found], portraits(model, sounds), strict=True))
