"""How near a continuation is to its own song: measures that need no alignment, and the tables of docs/continuation.md.

    python tools/continued_music.py            # prints the tables; minutes on two CPU cores
    python tools/continued_music.py text       # one of them: songs, text, joint, limit, sampling

Knows audio, codes and a loaded model; what it says of the demo model says nothing of others.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torchaudio
from torch import Tensor

import musicgen_eval
from musicgen_eval.audio.reader import open_track
from musicgen_eval.data.plan_builder import DEMO_SOURCE
from musicgen_eval.inference.batch_continuation import ContinuedCodes, continue_windows, score_continuations
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.metrics.seam_discontinuity import seam_discontinuity
from musicgen_eval.models.musicgen import MusicGen, load_model
from musicgen_eval.records import Continuation, Reading

SAMPLE_RATE_HZ = 32_000
MEASURES = ("latents", "chroma", "mel")
SEEDS = (0, 1, 2)
SAMPLING = (  # temperature, top_k, guidance
    (0.0, 250, 1.0), (0.0, 250, 3.0), (0.5, 250, 1.0), (0.5, 250, 3.0), (1.0, 250, 1.0), (1.0, 250, 3.0), (1.0, 50, 1.0),
    (1.0, 50, 3.0), (1.0, 10, 3.0),
)  # fmt: skip
STRIDE_FRAMES = 300  # 3/5 of the demo's 500


@dataclass(frozen=True)
class Portrait:
    """What is compared of a stretch of audio.

    Attributes:
        latents: (T, D) the codec's vectors of its frames.
        chroma: (12,) share of each pitch class, of norm 1; zeros for silence.
        mel: (2, 64) mean and standard deviation over time of each band, in dB.
    """

    latents: Tensor
    chroma: Tensor
    mel: Tensor


@torch.inference_mode()
def portraits(model: MusicGen, sounds: Sequence[Tensor]) -> list[Portrait]:
    """Portraits of (1, N) sounds at 32 kHz, each heard by the codec alone."""
    hop = model.spec.hop_samples
    sounds = [sound[:, : sound.shape[1] // hop * hop] for sound in sounds]
    codes = model.encode(sounds)
    return [
        Portrait(_latents(model, row), _mean_chroma(sound[0]), _mel(sound[0]))
        for row, sound in zip(codes, sounds, strict=True)
    ]


def distances(one: Portrait, other: Portrait) -> dict[str, float]:
    """How far two stretches are apart, each measure in its unit, whatever their order in time.

    Returns:
        latents: root mean square distance of each frame to the nearest frame of the other, averaged over both directions.
        chroma: 1 - cosine of the shares of pitch classes; silence is at 1 from all.
        mel: root mean square difference of means and deviations of the bands, in dB.
    """
    apart = torch.cdist(one.latents, other.latents)
    nearest = (apart.amin(1).square().mean().sqrt() + apart.amin(0).square().mean().sqrt()) / 2
    return {
        "latents": float(nearest),
        "chroma": float(1 - one.chroma @ other.chroma),
        "mel": float((one.mel - other.mel).square().mean().sqrt()),
    }


def rank_of_own(portrait: Portrait, songs: Sequence[Portrait], own: int) -> dict[str, int]:
    """By each measure the place of one song among all by nearness, from 1; the last of those that are equally near."""
    found = [distances(portrait, song) for song in songs]
    return {name: sum(song[name] <= found[own][name] for song in found) for name in MEASURES}


def _latents(model: MusicGen, codes: Tensor) -> Tensor:
    codec: Any = model.audio_encoder
    layers = zip(codes, codec.quantizer.layers, strict=False)
    return torch.stack([layer.codebook.embed[row] for row, layer in layers]).sum(0)


def _power(audio: Tensor, fft: int, hop: int) -> Tensor:
    return torch.stft(audio, fft, hop, window=torch.hann_window(fft), return_complex=True).abs().square()


def _mel(audio: Tensor) -> Tensor:
    bank = torchaudio.functional.melscale_fbanks(1_025, 40.0, 16_000.0, 64, SAMPLE_RATE_HZ)
    level = 10 * (bank.t() @ _power(audio, 2_048, 512)).clamp(min=1e-4).log10()
    return torch.stack([level.mean(1), level.std(1)])


def _mean_chroma(audio: Tensor) -> Tensor:
    share = (_pitch_classes() @ _power(audio, 8_192, 1_600)).sqrt().sum(1)
    share = share - share.min()  # what all pitch classes have, as drums and noise do, is no harmony
    return share / share.norm() if share.norm() > 1e-3 else torch.zeros(12)


@lru_cache(maxsize=1)
def _pitch_classes() -> Tensor:
    """(12, F) which of the bins from 55 to 1760 Hz belong to which pitch class."""
    bins_hz = torch.arange(4_097) * SAMPLE_RATE_HZ / 8_192
    pitch = (12 * (bins_hz.clamp(min=1) / 440).log2()).round().long() % 12
    inside = (bins_hz >= 55) & (bins_hz <= 1_760)
    return (torch.nn.functional.one_hot(pitch, 12).t() * inside).float()


@dataclass(frozen=True)
class Clip:
    """A clip of the demo: its name, its text, and all of its audio, (1, N) at 32 kHz."""

    id: str
    path: Path
    text: str
    audio: Tensor


def demo_clips() -> list[Clip]:
    """The held-out clips of the package."""
    with DEMO_SOURCE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    clips = []
    for row in rows:
        track = open_track(DEMO_SOURCE.parent / row["path"])
        audio = track.read(0, track.num_frames(50) * 640, sample_rate_hz=SAMPLE_RATE_HZ, channels=1)
        clips.append(Clip(row["id"], DEMO_SOURCE.parent / row["path"], row["text"], audio))
    return clips


def continue_clips(
    model: MusicGen,
    clips: Sequence[Clip],
    *,
    texts: Sequence[str] | None = None,
    duration_s: float | None = 4.0,
    context_s: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[Continuation]:
    """Continues clips with `generate`; each keeps its own numbers whatever its text.

    Args:
        model: the model.
        clips: what to continue.
        texts: in place of the clips' own; "" is none.
        duration_s: how long the continuations get.
        context_s: where they begin; None: in the middle.
        seed: of the run.
        **settings: of `generate`.

    Returns:
        In the order of clips, those of one clip together.
    """
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.csv"
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "id", "text"])
            for clip, text in zip(clips, texts or [clip.text for clip in clips], strict=True):
                writer.writerow([clip.path, clip.id, text])
        result = musicgen_eval.generate(
            manifest,
            checkpoint=model,
            context_s=context_s,
            duration_s=duration_s,
            seed=seed,
            threads=1,
            accelerator="cpu",
            batch_size=16,
            **settings,
        )
    return list(result.continuations)


def sounds_around(model: MusicGen, continuation: Continuation) -> tuple[Tensor, Tensor]:
    """(1, N) what was heard and (1, N) what was generated, as the codec decodes them together."""
    audio = model.decode(continuation.codes)
    joint = continuation.window.context_frames * model.spec.hop_samples
    return audio[:, :joint], audio[:, joint:]


def nats(model: MusicGen, continuations: Sequence[Continuation], codes: Sequence[Tensor] | None = None) -> list[Tensor]:
    """(K, T) nll of what was generated, without guidance, in windows within the limit; or of other codes after the same context."""
    rows = [
        ContinuedCodes(one.window, one.codes if codes is None else codes[row], None, one.text)
        for row, one in enumerate(continuations)
    ]
    found = []
    for first in range(0, len(rows), 16):
        found += score_continuations(model, rows[first : first + 16], [Reading("")], stride_frames=STRIDE_FRAMES)
    reads = [read[""] for read in found]
    return [
        read.nll[:, one.window.context_frames :]
        for read, one in zip(reads, continuations, strict=True)
        if read is not None
    ]


def perplexity(curves: Iterable[Tensor]) -> float:
    """Of (K, T) nats, as the package counts it: from the means of codebooks over all codes."""
    return float(torch.cat(list(curves), dim=1).double().nanmean(1).mean().exp())


def level_db(audio: Tensor, other: Tensor) -> float:
    """How much louder the first is, by rms, in dB."""
    return float(20 * (audio.square().mean().sqrt() / other.square().mean().sqrt()).log10())


def joined(context: Tensor, context_decoded: Tensor, fade_samples: int = 1_280) -> Tensor:
    """The context as a joined file holds it: it fades into what the codec made of it within its last 40 ms."""
    rise = (torch.arange(fade_samples) + 1) / (fade_samples + 1)
    end = context[:, -fade_samples:] * (1 - rise) + context_decoded[:, -fade_samples:] * rise
    return torch.cat([context[:, :-fade_samples], end], dim=1)


def white_noise(like: Tensor, seed: int = 0) -> Tensor:
    """As long and as loud as another sound."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return noise * like.square().mean().sqrt()


def random_codes(model: MusicGen, num_frames: int, seed: int = 0) -> Tensor:
    """(K, T) uniform codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.spec.codebook_size, (model.spec.num_codebooks, num_frames), generator=generator)


def continued_in_one_window(model: MusicGen, continuations: Sequence[Continuation], *, num_frames: int) -> list[Tensor]:
    """The same contexts with the same numbers, drawn in one window whatever the limit: (K, T) codes each.

    Args:
        model: one that was loaded with a limit of num_frames.
        continuations: their contexts, texts and seeds are used.
        num_frames: the window.
    """
    assert model.spec.max_frames == num_frames
    return continue_windows(
        model,
        [one.codes[:, : one.window.context_frames] for one in continuations],
        [one.window for one in continuations],
        texts=[one.text for one in continuations],
        settings=ContinuationSettings(threads=1),
        stride_frames=STRIDE_FRAMES,
        seed=continuations[0].seed,
    )


def mean(values: Iterable[float]) -> float:
    """Of some numbers."""
    return float(torch.tensor(list(values), dtype=torch.float64).mean())


@dataclass(frozen=True)
class Songs:
    """What continuations are held against: 4 s before each clip's middle and 4 s after it, (1, N) as the codec decodes them.

    Attributes:
        contexts: portraits.
        ends: portraits.
        originals: (1, N) the ends as the files hold them.
        decoded: (1, N) the ends after the codec.
    """

    contexts: list[Portrait]
    ends: list[Portrait]
    originals: list[Tensor]
    decoded: list[Tensor]


def songs_of(model: MusicGen, clips: Sequence[Clip]) -> Songs:
    """The clips around their middles; the codec hears and decodes both sides together."""
    originals, contexts, ends = [], [], []
    for clip in clips:
        middle, span = clip.audio.shape[1] // 640 // 2 * 640, 4 * SAMPLE_RATE_HZ
        decoded = model.decode(model.encode([clip.audio[:, middle - span : middle + span]])[0])
        originals.append(clip.audio[:, middle : middle + span])
        contexts.append(decoded[:, :span])
        ends.append(decoded[:, span:])
    return Songs(portraits(model, contexts), portraits(model, ends), originals, ends)


def row_of(found: Sequence[tuple[int, Portrait]], songs: Songs) -> list[str]:
    """Mean distances to the own end and the own context, mean rank and share of rank 1 among the ends, of (clip, portrait)."""
    ends = [distances(portrait, songs.ends[own]) for own, portrait in found]
    contexts = [distances(portrait, songs.contexts[own]) for own, portrait in found]
    ranks = [rank_of_own(portrait, songs.ends, own) for own, portrait in found]
    return [
        *(f"{mean(row[name] for row in ends):.3g}" for name in MEASURES),
        *(f"{mean(row[name] for row in contexts):.3g}" for name in MEASURES),
        *(f"{mean(row[name] for row in ranks):.2f}, {mean(row[name] == 1 for row in ranks):.0%}" for name in MEASURES),
    ]


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """As markdown."""
    print("| " + " | ".join(head) + " |", "|" + "---|" * len(head), sep="\n")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


HEAD = [
    *(f"{name} to end" for name in MEASURES),
    *(f"{name} to context" for name in MEASURES),
    *(f"rank by {name}" for name in MEASURES),
]


def generated_portraits(
    model: MusicGen, found: Sequence[Continuation], clips: Sequence[Clip]
) -> list[tuple[int, Portrait]]:
    """(row of the clip, portrait of what was generated)."""
    order = {clip.id: row for row, clip in enumerate(clips)}
    sounds = [one.generated for one in found if one.generated is not None]
    return list(zip([order[one.window.track] for one in found], portraits(model, sounds), strict=True))


def print_songs(model: MusicGen, clips: Sequence[Clip]) -> None:
    """Continuations beside what is worse, and what cannot be bettered."""
    songs, span = songs_of(model, clips), 4 * SAMPLE_RATE_HZ
    rows = []
    for seed in SEEDS:
        found = continue_clips(model, clips, num_continuations=4, seed=seed)
        rows.append([f"generated, seed {seed}", *row_of(generated_portraits(model, found, clips), songs)])
    numbered = list(enumerate(clips))
    rows.append(["the true end, after the codec", *row_of(list(enumerate(songs.ends)), songs)])
    rows.append(["the true end, as it is", *row_of(list(enumerate(portraits(model, songs.originals))), songs)])
    rows.append(["the context, after the codec", *row_of(list(enumerate(songs.contexts)), songs)])
    others = [(own, portrait) for own, _ in numbered for other, portrait in enumerate(songs.ends) if other != own]
    rows.append(["another song's end", *row_of(others, songs)])
    chance = portraits(model, [model.decode(random_codes(model, 200, seed)) for seed in range(8)])
    rows.append(["random codes", *row_of(list(enumerate(chance)), songs)])
    noise = portraits(model, [white_noise(end, seed) for seed, end in enumerate(songs.decoded)])
    rows.append(["white noise, as loud", *row_of(list(enumerate(noise)), songs)])
    silence = portraits(model, [torch.zeros(1, span)])[0]
    rows.append(["silence", *row_of([(own, silence) for own, _ in numbered], songs)])
    print_table(["4 s", *HEAD], rows)


def print_text(model: MusicGen, clips: Sequence[Clip]) -> None:
    """What text and context do, each alone and together; the same numbers are drawn with."""
    songs, rows = songs_of(model, clips), []
    right, other, none = [clip.text for clip in clips], [clips[row - 5].text for row in range(8)], [""] * 8
    for heard, context_s in (("4 s", None), ("0.1 s", 0.1)):
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
            rows.append([heard, name, *row_of(pairs, songs), *(f"{share:.0%}" for share in nearer)])
    print_table(["heard", "text", *HEAD, *(f"right, guidance 3 nearer by {name}" for name in MEASURES)], rows)


def print_joint(model: MusicGen, clips: Sequence[Clip]) -> None:
    """Clicks and loudness."""
    rows: dict[str, list[Tensor]] = {}
    levels: dict[str, list[float]] = {"generated": [], "true": []}
    peaks: list[list[float]] = []
    over: list[list[float]] = []
    quietest: list[float] = []
    steps: list[float] = []
    finite = True
    seam = partial(seam_discontinuity, sample_rate_hz=SAMPLE_RATE_HZ)
    for one in [one for seed in SEEDS for one in continue_clips(model, clips, num_continuations=4, seed=seed)]:
        heard, generated = sounds_around(model, one)
        assert one.context is not None
        assert one.reference is not None
        alone = model.decode(one.codes[:, one.window.context_frames :])
        context = one.context[:, -heard.shape[1] :]
        true = model.decode(model.encode([torch.cat([context, one.reference], dim=1)])[0])
        for name, before, after in (
            ("true end after the context", context, one.reference),
            ("true end, after the codec", true[:, : heard.shape[1]], true[:, heard.shape[1] :]),
            ("generated, after the context as the codec decodes both", heard, generated),
            ("generated, in a joined file", joined(context, heard), generated),
            ("generated, decoded with its context, glued to the track without a fade", context, generated),
            ("generated, decoded alone, glued to the context as the codec decodes it", heard, alone),
            ("generated, decoded alone, glued to the track", context, alone),
        ):
            rows.setdefault(name, []).append(seam(before, after))
        levels["generated"].append(level_db(generated, heard))
        levels["true"].append(level_db(one.reference, context))
        peaks.append([float(sound.abs().max()) for sound in (generated, true, context)])
        over.append([float((sound.abs() > 1).float().mean()) for sound in (generated, true, context)])
        finite = finite and bool(generated.isfinite().all())
        quietest.append(min(level_db(piece, heard) for piece in generated.split(SAMPLE_RATE_HZ // 2, dim=1)))
        steps.append(float((generated[:, :640] - alone[:, :640]).abs().max()))
    table = []
    for name, found in rows.items():
        logs = torch.stack(found).log()
        flux, change = logs.mean(0).exp().tolist()
        table.append([name, f"{flux:.2f}", f"{change:.2f}", f"{float(logs[:, 0].exp().max()):.2f}"])
    print_table(["joint", "flux", "change", "largest flux"], table)
    for name, found_levels in levels.items():
        values = torch.tensor(found_levels)
        print(f"level of the {name} end over the context: mean {values.mean():+.2f} dB, sd {values.std():.2f}, "
              f"{values.min():+.2f} to {values.max():+.2f}")  # fmt: skip
    for column, name in enumerate(("generated", "true, after the codec", "true")):
        peak, share = max(row[column] for row in peaks), mean(row[column] for row in over)
        print(f"{name}: largest peak {peak:.3f}, samples beyond 1: {share:.2e}")
    print(f"all finite: {finite}; quietest half second {min(quietest):.1f} dB of the context")
    print(f"largest difference of the first 20 ms decoded alone: mean {mean(steps):.3f}, up to {max(steps):.3f}\n")


def print_limit(model: MusicGen, clips: Sequence[Clip]) -> None:
    """22 s, sliding and in one window, 5 s at a time; held against all that follows the middles, after the codec."""
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
        for name, found in (("sliding", sliding), ("sliding, 0.5 and 1", calm), ("one window", forced)):
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
    """Temperature, guidance, top_k."""
    songs, rows = songs_of(model, clips), []
    truth = continue_clips(model, clips)
    ends = []
    for one in truth:
        assert one.context is not None
        assert one.reference is not None
        heard = one.window.context_frames
        whole = model.encode([torch.cat([one.context[:, -heard * 640 :], one.reference], dim=1)])[0]
        ends.append(torch.cat([one.codes[:, :heard], whole[:, heard:]], dim=1))
    print(f"perplexity of the true ends: {perplexity(nats(model, truth, ends)):.2f}")
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
    print_table(["temperature", "top_k", "guidance", *HEAD, "ppl", "codes that differ between two"], rows)


TABLES: dict[str, Callable[[MusicGen, Sequence[Clip]], None]] = {
    "songs": print_songs,
    "text": print_text,
    "joint": print_joint,
    "limit": print_limit,
    "sampling": print_sampling,
}

if __name__ == "__main__":
    demo = load_model("demo")
    demo.prepare("32-true")
    for wanted in sys.argv[1:] or TABLES:
        TABLES[wanted](demo, demo_clips())
