"""Tests that continuations by the demo model resemble the song that they continue.

They are measured on the held-out clips, against audio decoded by the codec (`tools/continued_music.py`, docs/continuation.md), with
three distances. `latents` is the distance of the codec's frames to the nearest frames of the other excerpt, `chroma` is 1 - cosine
similarity of the shares of pitch classes, and `mel` compares mean and deviation of the mel bands in dB. The distances ignore the
order of frames, so a loop with a different phase has the same distance. The margins of the bounds are about the variation between
seeds.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from musicgen_eval.metrics.seam_discontinuity import seam_discontinuity
from musicgen_eval.models.musicgen import MusicGen, load_model
from musicgen_eval.records import Continuation

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from song_similarity.clips import Clip, continue_clips, continued_in_one_window, demo_clips
from song_similarity.distances import MEASURES, SAMPLE_RATE_HZ, Portrait, distances, mean, portraits, rank_of_own
from song_similarity.likelihood import nats, perplexity
from song_similarity.songs import Songs, generated_portraits, songs_of
from song_similarity.sounds import joined, level_db, random_codes, sounds_around, white_noise

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> MusicGen:
    loaded = load_model("demo")
    loaded.prepare("32-true")
    return loaded


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return demo_clips()


@pytest.fixture(scope="module")
def songs(model: MusicGen, clips: list[Clip]) -> Songs:
    return songs_of(model, clips)


@pytest.fixture(scope="module")
def continued(model: MusicGen, clips: list[Clip]) -> list[Continuation]:
    """Two continuations of 4 s from the middle of each clip."""
    return continue_clips(model, clips, num_continuations=2)


@pytest.fixture(scope="module")
def found(model: MusicGen, clips: list[Clip], continued: list[Continuation]) -> list[tuple[int, Portrait]]:
    return generated_portraits(model, continued, clips)


@pytest.fixture(scope="module")
def firsts(continued: list[Continuation]) -> list[Continuation]:
    """One continuation of each clip."""
    return [one for one in continued if one.window.index == 0]


@pytest.fixture(scope="module")
def sounds(model: MusicGen, firsts: list[Continuation]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompt and continuation of each clip, decoded together by the codec."""
    return [sounds_around(model, one) for one in firsts]


@pytest.fixture(scope="module")
def others(model: MusicGen, songs: Songs) -> dict[str, list[Portrait]]:
    """Portraits, one per clip, of audio that must be less similar to the song than its continuation."""
    noise = [white_noise(end, seed) for seed, end in enumerate(songs.decoded)]
    return {
        "random codes": portraits(model, [model.decode(random_codes(model, 200, seed)) for seed in range(2)]) * 4,
        "white noise": portraits(model, noise),
        "silence": portraits(model, [torch.zeros(1, 4 * SAMPLE_RATE_HZ)]) * 8,
        "another song": songs.ends[1:] + songs.ends[:1],
    }


def test_the_distances_identify_a_song_by_its_other_half(songs: Songs) -> None:
    ranks = [rank_of_own(portrait, songs.ends, own) for own, portrait in enumerate(songs.contexts)]
    for name in ("latents", "chroma"):
        assert [rank[name] for rank in ranks] == [1] * 8
    assert sum(rank["mel"] == 1 for rank in ranks) >= 6


@pytest.mark.parametrize(("measure", "least_share"), [("latents", 0.8), ("chroma", 0.8), ("mel", 0.5)])
@pytest.mark.parametrize("side", ["contexts", "ends"])
def test_a_continuation_is_closer_to_its_own_song_than_to_seven_others(
    measure: str, least_share: float, side: str, found: list[tuple[int, Portrait]], songs: Songs
) -> None:
    ranks = [rank_of_own(portrait, getattr(songs, side), own)[measure] for own, portrait in found]
    assert mean(rank == 1 for rank in ranks) >= least_share  # by chance 1/8
    assert mean(ranks) < 2.5  # by chance 4.5


@pytest.mark.parametrize("measure", MEASURES)
def test_a_continuation_is_closer_than_noise_random_codes_silence_and_other_songs(
    measure: str, others: dict[str, list[Portrait]], found: list[tuple[int, Portrait]], songs: Songs
) -> None:
    mine = mean(distances(portrait, songs.ends[own])[measure] for own, portrait in found)
    for name, sounds in others.items():
        theirs = mean(distances(portrait, songs.ends[own])[measure] for own, portrait in enumerate(sounds))
        assert mine < 0.8 * theirs, name


def test_without_a_text_a_longer_prompt_gives_a_closer_continuation(
    model: MusicGen, clips: list[Clip], songs: Songs
) -> None:
    def distance(context_s: float | None) -> float:
        found = continue_clips(model, clips, texts=[""] * 8, context_s=context_s, temperature=0.5)
        pairs = generated_portraits(model, found, clips)
        return mean(distances(portrait, songs.ends[own])["chroma"] for own, portrait in pairs)

    assert distance(None) < 0.6 * distance(0.1)  # prompts of 4 s and 0.1 s


@pytest.mark.parametrize("measure", MEASURES)
def test_the_reference_is_closer_to_the_context_than_the_continuation(
    measure: str, found: list[tuple[int, Portrait]], songs: Songs
) -> None:
    generated = mean(distances(portrait, songs.contexts[own])[measure] for own, portrait in found)
    true = mean(distances(e, c)[measure] for e, c in zip(songs.ends, songs.contexts, strict=True))
    assert true < generated


def test_the_boundary_does_not_click_unlike_that_of_a_continuation_decoded_alone(
    model: MusicGen, firsts: list[Continuation], sounds: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    def flux(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        found = [seam_discontinuity(before, after, sample_rate_hz=SAMPLE_RATE_HZ)[0].log() for before, after in pairs]
        return mean(map(float, found))

    boundary = flux(sounds)
    contexts = [one.context[:, -prompt.shape[1] :] for one, (prompt, _) in zip(firsts, sounds, strict=True)]
    in_a_file = flux([
        (joined(context, prompt), generated) for context, (prompt, generated) in zip(contexts, sounds, strict=True)
    ])  # fmt: skip
    glued = flux([
        (context, model.decode(one.codes[:, one.window.context_frames :]))
        for context, one in zip(contexts, firsts, strict=True)
    ])  # fmt: skip
    assert max(boundary, in_a_file) < 0.4  # exp(0.4) = 1.5 times the usual flux; measured: 1.18 and 1.24 times
    assert glued > max(boundary, in_a_file) + 0.4  # measured: 2.73 times


def test_decoded_continuations_equal_the_audio_of_predict(
    firsts: list[Continuation], sounds: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for one, (_, generated) in zip(firsts, sounds, strict=True):
        torch.testing.assert_close(one.generated, generated, atol=1e-5, rtol=0)


def test_a_continuation_is_as_loud_as_its_prompt_and_neither_silent_nor_clipped(
    sounds: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    for prompt, generated in sounds:
        assert generated.isfinite().all()
        assert abs(level_db(generated, prompt)) < 4  # measured: -1.7 to +1.0 dB over 96 continuations
        quietest_db = min(level_db(piece, prompt) for piece in generated.split(SAMPLE_RATE_HZ // 2, dim=1))
        assert quietest_db > -10  # measured: -4.2 dB
        assert (generated.abs() > 1).float().mean() < 1e-3  # measured: 1e-5


def test_22_s_remain_music_in_sliding_windows_but_not_in_one_window_beyond_the_limit(
    model: MusicGen, clips: list[Clip], songs: Songs
) -> None:
    beyond = load_model("demo", max_frames=1500)
    beyond.prepare("32-true")
    chosen = [clip for clip in clips if clip.id in ("dreamy_06", "epic_10")]
    sliding = continue_clips(model, chosen, duration_s=22.0)
    forced = continued_in_one_window(beyond, sliding, num_frames=1500)
    music, noise = nats(model, sliding), nats(model, sliding, forced)
    own = [[clip.id for clip in clips].index(one.window.track) for one in sliding]
    for one, codes in zip(sliding, forced, strict=True):
        assert torch.equal(one.codes[:, :200], codes[:, :200])
        assert (one.codes[:, :450] == codes[:, :450]).float().mean() > 0.9  # both windows are the same up to frame 500
    far = slice(400, 1100)  # from 8 s on
    assert perplexity(nll[:, far] for nll in music) < 64  # a quarter of the codebook
    assert perplexity(nll[:, far] for nll in noise) > 100  # measured: 200, with a codebook of 256
    for row, (one, codes) in enumerate(zip(sliding, forced, strict=True)):
        parts = [one.generated, sounds_around(model, replace(one, codes=codes))[1]]
        pair = portraits(model, [part[:, 8 * SAMPLE_RATE_HZ :] for part in parts])
        slid, single = (distances(portrait, songs.ends[own[row]]) for portrait in pair)
        assert rank_of_own(pair[0], songs.ends, own[row])["chroma"] == 1
        assert slid["chroma"] < single["chroma"]
        assert slid["latents"] < single["latents"]
