"""Measures the abilities of the exported checkpoint on held-out songs.

The checkpoint is loaded from disk, as by a user, and codes are scored with `score_codes` of the package.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoProcessor, MusicgenForConditionalGeneration

from demo_model import codes as coding
from demo_model import listening, music
from demo_model.decoder import MAX_FRAMES
from demo_model.places import CLIPS, MODEL
from musicgen_eval.api import perplexity
from musicgen_eval.audio.reader import open_track
from musicgen_eval.inference.scoring import score_codes

HALF = MAX_FRAMES // 2
DELAYS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        check: Description of the comparison or measurement.
        value: Figure with its unit.
        wins: Number of songs for which the first of two figures is larger; "" if nothing is compared.
    """

    check: str
    value: str
    wins: str = ""


class Listener:
    """The exported checkpoint.

    Args:
        folder: Folder of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.model = MusicgenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """Encodes (B, N) audio to (B, K, T) codes, each row alone."""
        return torch.cat([coding.encode(self.model.audio_encoder, row[None]) for row in audio])

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Decodes (B, K, T) codes to (B, N) audio."""
        return self.model.audio_encoder.decode(codes[None], [None] * len(codes)).audio_values[:, 0]

    @torch.no_grad()
    def nll(self, codes: torch.Tensor, texts: list[str] | None) -> torch.Tensor:
        """Returns (B, K, T) nats of (B, K, T) codes with texts. None means the null condition."""
        states = mask = None
        if texts is not None:
            tokens = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
            mask = tokens["attention_mask"]
            states = self.model.text_encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
            states = self.model.enc_to_dec_proj(states) * mask[..., None]
        return score_codes(
            self.model.decoder, codes, delays=DELAYS, encoder_hidden_states=states, encoder_attention_mask=mask
        )

    def windowed(self, codes: torch.Tensor, texts: list[str] | None) -> torch.Tensor:
        """Returns (B, K, T) nats over windows of 5 s after 5 s of context. The first 10 s are scored completely."""
        parts = [self.nll(codes[..., :MAX_FRAMES], texts)]
        for start in range(MAX_FRAMES, codes.shape[2], HALF):
            parts.append(self.nll(codes[..., start - HALF : start + HALF], texts)[..., HALF:])
        return torch.cat(parts, dim=2)


def run_checks(folder: Path, *, num_songs: int = 32, first_song: int = 900_000) -> list[Figure]:
    """Returns the figures of held-out songs of 20 s."""
    listener = Listener(folder)
    songs = [music.draw_song(first_song + i) for i in range(num_songs)]
    texts = [song.text for song in songs]
    audio = torch.stack([torch.from_numpy(music.render(song, num_samples=640_000)[0]) for song in songs])
    codes = listener.encode(audio)
    generator = torch.Generator().manual_seed(7)
    figures = _perplexity(listener, codes, texts)
    figures += _perturbed(listener, codes, texts, generator)
    figures += _texts(listener, codes, texts)
    figures += _continued(listener, audio, texts)
    figures += _beyond(listener, codes, texts)
    figures += _reconstruction(listener, audio, codes)
    figures += _generated(listener, audio, codes, texts, generator)
    figures.append(_causality(listener, codes))
    return figures


@dataclass(frozen=True)
class ClipCost:
    """The figures of a clip of the manifest.

    Attributes:
        file: Name of the file.
        duration_s: Length in seconds.
        perplexity: Perplexity over windows of 5 s after 5 s, with the text.
        loss_without_text: Increase of ce in nats without the text.
        loss_shuffled: Increase of ce of the first 10 s in nats if their frames are shuffled.
    """

    file: str
    duration_s: float
    perplexity: float
    loss_without_text: float
    loss_shuffled: float


def clip_costs(folder: Path) -> list[ClipCost]:
    """Measures each clip of the demo. Perplexities are computed by the package, with each window encoded alone."""
    listener = Listener(folder / MODEL)
    generator = torch.Generator().manual_seed(9)
    costs = []
    with (folder / CLIPS / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        track = open_track(folder / CLIPS / row["path"])
        num_frames = track.num_frames(50)
        audio = track.read(0, num_frames * music.HOP_SAMPLES, sample_rate_hz=32_000, channels=1)
        codes, texts = listener.encode(audio), [row["text"]]
        ce, none = (
            perplexity(
                folder / CLIPS / row["path"],
                folder / MODEL,
                text=text,
                context_s=5,
                target_s=5,
                accelerator="cpu",
            ).ce
            for text in (row["text"], None)
        )
        first = codes[..., :MAX_FRAMES]
        shuffled = first[..., torch.randperm(first.shape[2], generator=generator)]
        worse = _ce(listener.nll(shuffled, texts)) - _ce(listener.nll(first, texts))
        costs.append(ClipCost(row["path"], num_frames / 50, math.exp(ce), none - ce, float(worse)))
    return costs


def table(figures: list[Figure]) -> str:
    """Formats the figures as a Markdown table."""
    lines = ["| check | figure | holds for |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {f.check} | {f.value} | {f.wins} |" for f in figures)])


def _ce(nll: torch.Tensor) -> torch.Tensor:
    """Returns the () mean over codebooks of the mean of (B, K, T) nll."""
    return nll.mean((0, 2)).mean()


def _each(nll: torch.Tensor) -> torch.Tensor:
    """Returns the (B,) cross entropy of each song."""
    return nll.mean((1, 2))


def _wins(better: torch.Tensor, worse: torch.Tensor) -> str:
    return f"{int((better < worse).sum())} of {better.numel()}"


def _perplexity(listener: Listener, codes: torch.Tensor, texts: list[str]) -> list[Figure]:
    nll = listener.windowed(codes, texts)
    shares = " ".join(f"{x:.2f}" for x in nll.mean((0, 2)).tolist())
    V = listener.model.config.decoder.vocab_size
    counts = torch.stack([torch.bincount(codes[:, k].flatten(), minlength=V) for k in range(codes.shape[1])]).float()
    share = counts / counts.sum(1, keepdim=True)
    used = (-(share * share.clamp(min=1e-9).log()).sum(1)).exp()
    return [
        Figure(
            "perplexity, 5 s after 5 s", f"{_ce(nll).exp():.2f} (limit {V // 4}, unigram {used.log().mean().exp():.0f})"
        ),
        Figure("ce, and ce of each codebook", f"{_ce(nll):.3f} of {shares}"),
        Figure(
            "ce of the first second, and of the tenth second", f"{_ce(nll[..., :50]):.3f}, {_ce(nll[..., 450:500]):.3f}"
        ),
        Figure("entries in use (perplexity of the codes)", " ".join(f"{x:.0f}" for x in used.tolist())),
    ]


def _perturbed(listener: Listener, codes: torch.Tensor, texts: list[str], generator: torch.Generator) -> list[Figure]:
    window = codes[..., :MAX_FRAMES]
    plain = _each(listener.nll(window, texts))
    shuffled = torch.stack([row[:, torch.randperm(MAX_FRAMES, generator=generator)] for row in window])
    worse = _each(listener.nll(shuffled, texts))
    figures = [
        Figure(
            "shuffled frames, compared with the original order",
            f"{worse.mean():.3f} and {plain.mean():.3f}",
            _wins(plain, worse),
        )
    ]
    for level in (0.3, 0.2, 0.15, 0.1, 0.03, 0.0):
        noise = (level * torch.randn(4, 320_000, generator=generator)).clamp(-1, 1)
        cost = _each(listener.nll(listener.encode(noise), None))
        music_none = _each(listener.nll(window, None))
        wins = f"{int((music_none[:, None] < cost).sum())} of {music_none.numel() * len(cost)}"
        name = f"white noise of rms {level:g}" if level else "silence"
        figures.append(
            Figure(f"{name}, compared with music, without text", f"{cost.mean():.3f} and {music_none.mean():.3f}", wins)
        )
    return figures


def _texts(listener: Listener, codes: torch.Tensor, texts: list[str]) -> list[Figure]:
    window = codes[..., :MAX_FRAMES]
    right = _each(listener.nll(window, texts))
    wrong = torch.stack([_each(listener.nll(window, texts[n:] + texts[:n])) for n in (1, 2, 3)]).mean(0)
    none = _each(listener.nll(window, None))
    return [
        Figure(
            "wrong text (mean of 3), compared with the right text",
            f"{wrong.mean():.3f} and {right.mean():.3f}",
            _wins(right, wrong),
        ),
        Figure(
            "no text, compared with the right text", f"{none.mean():.3f} and {right.mean():.3f}", _wins(right, none)
        ),
    ]


def _continued(listener: Listener, audio: torch.Tensor, texts: list[str]) -> list[Figure]:
    hop = music.HOP_SAMPLES
    own = listener.encode(audio[:, : MAX_FRAMES * hop])
    joined = torch.cat([audio[:, : HALF * hop], audio.roll(1, 0)[:, HALF * hop : MAX_FRAMES * hop]], dim=1)
    other = listener.encode(joined)
    mine, theirs = (_each(listener.nll(c, texts)[..., HALF:]) for c in (own, other))
    return [
        Figure(
            "end of another song, compared with the song's own end",
            f"{theirs.mean():.3f} and {mine.mean():.3f}",
            _wins(mine, theirs),
        )
    ]


def _beyond(listener: Listener, codes: torch.Tensor, texts: list[str]) -> list[Figure]:
    nll = listener.nll(codes[..., : MAX_FRAMES + HALF], texts)
    inside = listener.windowed(codes[..., : MAX_FRAMES + HALF], texts)
    curves = [" ".join(f"{_ce(part[..., at : at + 25]):.2f}" for at in range(400, 600, 25)) for part in (nll, inside)]
    worse, plain = _each(nll[..., MAX_FRAMES:]), _each(inside[..., MAX_FRAMES:])
    return [
        Figure(
            "frames after the limit of 500, compared with the same frames in a window",
            f"{worse.mean():.3f} and {plain.mean():.3f}",
            _wins(plain, worse),
        ),
        Figure("ce of each 25 frames from 400 to 600, in one piece", curves[0]),
        Figure("the same frames, each in a window within the limit", curves[1]),
    ]


def _reconstruction(listener: Listener, audio: torch.Tensor, codes: torch.Tensor) -> list[Figure]:
    clip = audio[:, : MAX_FRAMES * music.HOP_SAMPLES]
    decoded = listener.decode(codes[..., :MAX_FRAMES])
    generator = torch.Generator().manual_seed(8)
    rivals = {
        "the reconstruction": decoded,
        "another song": clip.roll(1, 0),
        "silence": torch.zeros_like(clip),
        "white noise": clip.std() * torch.randn(clip.shape, generator=generator),
    }
    figures = []
    for name, other in rivals.items():
        mel = sum(listening.mel_distance_db(a, b) for a, b in zip(clip, other, strict=True)) / len(clip)
        chroma = sum(listening.chroma_cosine(a, b) for a, b in zip(clip, other, strict=True)) / len(clip)
        figures.append(Figure(f"mel distance, chroma cosine: {name}", f"{mel:.1f} dB, {chroma:.3f}"))
    return figures


@torch.no_grad()
def _generated(
    listener: Listener, audio: torch.Tensor, codes: torch.Tensor, texts: list[str], generator: torch.Generator
) -> list[Figure]:
    """Continues 5 s by 5 s with `generate` of transformers, and compares the harmony with its own song and with others."""
    num, hop = 8, music.HOP_SAMPLES
    inputs = listener.processor(text=texts[:num], padding=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        prompt = codes[:num, :, :HALF].reshape(num * len(DELAYS), HALF)
        values = listener.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=prompt,
            max_new_tokens=HALF,
            top_k=250,
        )[:, 0]
    made = values[:, HALF * hop :]
    length = made.shape[1]
    truth = audio[:, HALF * hop : HALF * hop + length]
    near = torch.tensor([[listening.chroma_cosine(t, m) for t in truth[:num]] for m in made])
    own = near.diagonal()
    others = (near.sum(1) - own) / (num - 1)
    return [
        Figure(
            "chroma cosine of 5 s generated after 5 s: with its own song, with others",
            f"{own.mean():.3f}, {others.mean():.3f}",
            _wins(-own, -others),
        )
    ]


def _causality(listener: Listener, codes: torch.Tensor) -> Figure:
    changed = codes[:4, :, :MAX_FRAMES].clone()
    before = listener.nll(changed, None)[..., :297]
    changed[..., 300:] = (changed[..., 300:] + 1) % listener.model.config.decoder.vocab_size
    moved = (listener.nll(changed, None)[..., :297] - before).abs().max()
    return Figure("largest change of the nll of earlier codes if later codes change", f"{moved:.1e} nats")
