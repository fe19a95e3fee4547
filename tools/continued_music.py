"""Measures the similarity of the demo's continuations to their songs, and prints the tables of docs/continuation.md.

    python tools/continued_music.py            # prints all tables, in minutes on two CPU cores
    python tools/continued_music.py text       # prints one table: songs, text, boundary, limit or sampling

The figures apply to the demo model only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from song_similarity.clips import Clip, continue_clips, continued_in_one_window, demo_clips
from song_similarity.distances import MEASURES, SAMPLE_RATE_HZ, Portrait, distances, mean, portraits, rank_of_own
from song_similarity.likelihood import nats, perplexity
from song_similarity.songs import Songs, generated_portraits, songs_of
from song_similarity.sounds import joined, level_db, random_codes, sounds_around, white_noise
from torch import Tensor

from musicgen_eval.metrics.seam_discontinuity import seam_discontinuity
from musicgen_eval.models.musicgen import MusicGen, load_model

SEEDS = (0, 1, 2)
SAMPLING = (  # temperature, top_k, guidance
    (0.0, 250, 1.0), (0.0, 250, 3.0), (0.5, 250, 1.0), (0.5, 250, 3.0), (1.0, 250, 1.0), (1.0, 250, 3.0), (1.0, 50, 1.0),
    (1.0, 50, 3.0), (1.0, 10, 3.0),
)  # fmt: skip
HEAD = [
    *(f"{name} to reference" for name in MEASURES),
    *(f"{name} to context" for name in MEASURES),
    *(f"rank by {name}" for name in MEASURES),
]


def print_songs(model: MusicGen, clips: Sequence[Clip]) -> None:
    """Compares continuations with references, contexts, other songs, random codes, noise and silence."""
    songs, span = songs_of(model, clips), 4 * SAMPLE_RATE_HZ
    rows = []
    for seed in SEEDS:
        found = continue_clips(model, clips, num_continuations=4, seed=seed)
        rows.append([f"generated, seed {seed}", *row_of(generated_portraits(model, found, clips), songs)])
    numbered = list(enumerate(clips))
    rows.append(["reference, after the codec", *row_of(list(enumerate(songs.ends)), songs)])
    rows.append(["reference, before the codec", *row_of(list(enumerate(portraits(model, songs.originals))), songs)])
    rows.append(["context, after the codec", *row_of(list(enumerate(songs.contexts)), songs)])
    others = [(own, portrait) for own, _ in numbered for other, portrait in enumerate(songs.ends) if other != own]
    rows.append(["reference of another song", *row_of(others, songs)])
    chance = portraits(model, [model.decode(random_codes(model, 200, seed)) for seed in range(8)])
    rows.append(["random codes", *row_of(list(enumerate(chance)), songs)])
    noise = portraits(model, [white_noise(end, seed) for seed, end in enumerate(songs.decoded)])
    rows.append(["white noise of equal loudness", *row_of(list(enumerate(noise)), songs)])
    silence = portraits(model, [torch.zeros(1, span)])[0]
    rows.append(["silence", *row_of([(own, silence) for own, _ in numbered], songs)])
    print_table(["4 s", *HEAD], rows)


def print_text(model: MusicGen, clips: Sequence[Clip]) -> None:
    """Compares texts and lengths of the prompt, with the same random numbers."""
    songs, rows = songs_of(model, clips), []
    right, other, none = [clip.text for clip in clips], [clips[row - 5].text for row in range(8)], [""] * 8
    for prompt, context_s in (("4 s", None), ("0.1 s", 0.1)):
        nearest: list[dict[str, float]] = []
        runs: list[tuple[str, list[str], dict[str, Any]]] = [
            ("right, guidance 3", right, {}),
            ("right, guidance 1", right, {"guidance_scale": 1.0}),
            ("another clip's, guidance 3", other, {}),
            ("another clip's, guidance 1", other, {"guidance_scale": 1.0}),
            ("none", none, {}),
            ("none, temperature 0.5", none, {"temperature": 0.5}),
        ]
        for name, texts, settings in runs:
            found = continue_clips(model, clips, texts=texts, context_s=context_s, num_continuations=4, **settings)
            pairs = generated_portraits(model, found, clips)
            ends = [distances(portrait, songs.ends[own]) for own, portrait in pairs]
            nearest = nearest or ends
            nearer = [mean(a[m] < b[m] for a, b in zip(nearest, ends, strict=True)) for m in MEASURES]
            rows.append([prompt, name, *row_of(pairs, songs), *(f"{share:.0%}" for share in nearer)])
    print_table(
        ["prompt", "text", *HEAD, *(f"closer with right text and guidance 3 by {name}" for name in MEASURES)], rows
    )


def print_boundary(model: MusicGen, clips: Sequence[Clip]) -> None:
    """Measures discontinuities at the boundary, and levels."""
    rows: dict[str, list[Tensor]] = {}
    levels: dict[str, list[float]] = {"generated": [], "reference": []}
    peaks: list[list[float]] = []
    over: list[list[float]] = []
    quietest: list[float] = []
    steps: list[float] = []
    finite = True
    seam = partial(seam_discontinuity, sample_rate_hz=SAMPLE_RATE_HZ)
    for one in [one for seed in SEEDS for one in continue_clips(model, clips, num_continuations=4, seed=seed)]:
        prompt, generated = sounds_around(model, one)
        assert one.context is not None
        assert one.reference is not None
        alone = model.decode(one.codes[:, one.window.context_frames :])
        context = one.context[:, -prompt.shape[1] :]
        true = model.decode(model.encode([torch.cat([context, one.reference], dim=1)])[0])
        for name, before, after in (
            ("reference after the context", context, one.reference),
            ("reference after the context, after the codec", true[:, : prompt.shape[1]], true[:, prompt.shape[1] :]),
            ("generated, decoded together with the prompt", prompt, generated),
            ("generated, in a joined file", joined(context, prompt), generated),
            ("generated, decoded together with the prompt, appended to the track without a fade", context, generated),
            ("generated, decoded alone, appended to the decoded prompt", prompt, alone),
            ("generated, decoded alone, appended to the track", context, alone),
        ):
            rows.setdefault(name, []).append(seam(before, after))
        levels["generated"].append(level_db(generated, prompt))
        levels["reference"].append(level_db(one.reference, context))
        peaks.append([float(sound.abs().max()) for sound in (generated, true, context)])
        over.append([float((sound.abs() > 1).float().mean()) for sound in (generated, true, context)])
        finite = finite and bool(generated.isfinite().all())
        quietest.append(min(level_db(piece, prompt) for piece in generated.split(SAMPLE_RATE_HZ // 2, dim=1)))
        steps.append(float((generated[:, :640] - alone[:, :640]).abs().max()))
    table = []
    for name, found in rows.items():
        logs = torch.stack(found).log()
        flux, change = logs.mean(0).exp().tolist()
        table.append([name, f"{flux:.2f}", f"{change:.2f}", f"{float(logs[:, 0].exp().max()):.2f}"])
    print_table(["boundary", "flux", "change", "largest flux"], table)
    for name, found_levels in levels.items():
        values = torch.tensor(found_levels)
        print(f"level of {name} relative to the context: mean {values.mean():+.2f} dB, sd {values.std():.2f}, "
              f"{values.min():+.2f} to {values.max():+.2f}")  # fmt: skip
    for column, name in enumerate(("generated", "context and reference, after the codec", "context")):
        peak, share = max(row[column] for row in peaks), mean(row[column] for row in over)
        print(f"{name}: largest peak {peak:.3f}, samples beyond 1: {share:.2e}")
    print(f"all finite: {finite}; quietest half second: {min(quietest):.1f} dB relative to the prompt")
    print(f"largest difference in the first 20 ms if decoded alone: mean {mean(steps):.3f}, maximum {max(steps):.3f}\n")


def print_limit(model: MusicGen, clips: Sequence[Clip]) -> None:
    """Compares pieces of 5 s of 22 s, generated in sliding windows or in one window, with the second half of the clips."""
    beyond = load_model("demo", max_frames=1500)
    beyond.prepare("32-true")
    halves = [clip.audio[:, clip.audio.shape[1] // 1280 * 640 :] for clip in clips]
    whole = portraits(model, [model.decode(codes) for codes in model.encode(halves)])
    order = {clip.id: row for row, clip in enumerate(clips)}
    for chosen, number in (([clip for clip in clips if clip.id == "dreamy_06"], 4), (clips, 1)):
        sliding = continue_clips(model, chosen, duration_s=22.0, num_continuations=number)
        calm = continue_clips(
            model, chosen, duration_s=22.0, num_continuations=number, temperature=0.5, guidance_scale=1.0
        )
        forced = [
            replace(one, codes=codes)
            for one, codes in zip(sliding, continued_in_one_window(beyond, sliding, num_frames=1500), strict=True)
        ]
        owns = [order[one.window.track] for one in sliding]
        rows = []
        for name, found in (
            ("sliding", sliding),
            ("sliding, temperature 0.5, guidance 1", calm),
            ("one window", forced),
        ):
            sounds, curves = [sounds_around(model, one)[1] for one in found], nats(model, found)
            for first_s in (0, 5, 10, 15, 20):
                pieces = [sound[:, first_s * SAMPLE_RATE_HZ : (first_s + 5) * SAMPLE_RATE_HZ] for sound in sounds]
                pairs = list(zip(owns, portraits(model, pieces), strict=True))
                near = [distances(portrait, whole[own]) for own, portrait in pairs]
                ranks = [rank_of_own(portrait, whole, own) for own, portrait in pairs]
                stretch = [curve[:, first_s * 50 : (first_s + 5) * 50] for curve in curves]
                rows.append([
                    name, f"{first_s} to {min(first_s + 5, 22)} s", *(f"{mean(row[m] for row in near):.3g}" for m in MEASURES),
                    *(f"{mean(row[m] for row in ranks):.2f}" for m in MEASURES), f"{perplexity(stretch):.2f}",
                ])  # fmt: skip
        print_table([f"{len(chosen)} x {number}", "", *MEASURES, *(f"rank by {m}" for m in MEASURES), "ppl"], rows)


def print_sampling(model: MusicGen, clips: Sequence[Clip]) -> None:
    """Compares temperatures, values of top_k and guidance scales."""
    songs, rows = songs_of(model, clips), []
    truth = continue_clips(model, clips)
    ends = []
    for one in truth:
        assert one.context is not None
        assert one.reference is not None
        num_prompt = one.window.context_frames
        whole = model.encode([torch.cat([one.context[:, -num_prompt * 640 :], one.reference], dim=1)])[0]
        ends.append(torch.cat([one.codes[:, :num_prompt], whole[:, num_prompt:]], dim=1))
    print(f"perplexity of the references: {perplexity(nats(model, truth, ends)):.2f}")
    for temperature, top_k, guidance in SAMPLING:
        settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "guidance_scale": guidance}
        number = 4 if temperature else 1
        seeds = SEEDS if temperature else SEEDS[:1]
        found = []
        for seed in seeds:
            found += continue_clips(model, clips, num_continuations=number, seed=seed, **settings)
        pairs = generated_portraits(model, found, clips)
        differ = []
        for first in range(0, len(found), number):
            group = [one.codes[:, -200:] for one in found[first : first + number]]
            differ += [float((a != b).float().mean()) for i, a in enumerate(group) for b in group[:i]]
        rows.append([
            f"{temperature:g}", str(top_k), f"{guidance:g}", *row_of(pairs, songs), f"{perplexity(nats(model, found)):.2f}",
            f"{mean(differ):.0%}" if differ else "-",
        ])  # fmt: skip
    print_table(["temperature", "top_k", "guidance", *HEAD, "ppl", "codes that differ between two continuations"], rows)


def row_of(found: Sequence[tuple[int, Portrait]], songs: Songs) -> list[str]:
    """Returns the cells of one table row.

    Args:
        found: (row of the clip, portrait) of each sound.
        songs: Songs to compare with.

    Returns:
        Mean distances to the own reference and the own context, and mean rank and share of rank 1 among the references.
    """
    ends = [distances(portrait, songs.ends[own]) for own, portrait in found]
    contexts = [distances(portrait, songs.contexts[own]) for own, portrait in found]
    ranks = [rank_of_own(portrait, songs.ends, own) for own, portrait in found]
    return [
        *(f"{mean(row[name] for row in ends):.3g}" for name in MEASURES),
        *(f"{mean(row[name] for row in contexts):.3g}" for name in MEASURES),
        *(f"{mean(row[name] for row in ranks):.2f}, {mean(row[name] == 1 for row in ranks):.0%}" for name in MEASURES),
    ]


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table in Markdown."""
    print("| " + " | ".join(head) + " |", "|" + "---|" * len(head), sep="\n")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


TABLES: dict[str, Callable[[MusicGen, Sequence[Clip]], None]] = {
    "songs": print_songs,
    "text": print_text,
    "boundary": print_boundary,
    "limit": print_limit,
    "sampling": print_sampling,
}

if __name__ == "__main__":
    demo = load_model("demo")
    demo.prepare("32-true")
    for wanted in sys.argv[1:] or TABLES:
        TABLES[wanted](demo, demo_clips())
