"""The demo model has learnt music, texts and its limit, as shown on clips that it was not trained on."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import AutoProcessor, MusicgenForConditionalGeneration

from musicgen_eval.audio.reader import open_track
from musicgen_eval.data.plan_builder import DEMO_CLIPS
from musicgen_eval.data.windows import plan_windows
from musicgen_eval.inference.batch_scoring import score_windows
from musicgen_eval.models.checkpoint import DEMO_MODEL
from musicgen_eval.models.delay import delay_codes
from musicgen_eval.models.musicgen import MusicGen, load_model

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parents[2] / "tools"
HALF = 250  # frames: 5 s of context, 5 s of target


@dataclass(frozen=True)
class Clip:
    """A clip of the manifest, with its text, its audio (1, N) at 32 kHz, and its codes (K, T)."""

    path: Path
    text: str
    audio: torch.Tensor
    codes: torch.Tensor


@pytest.fixture(scope="module")
def model() -> MusicGen:
    return load_model("demo")


@pytest.fixture(scope="module")
def clips(model: MusicGen) -> list[Clip]:
    folder = DEMO_CLIPS
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        track = open_track(folder / row["path"])
        num_samples = track.num_frames(50) * 640
        audio = track.read(0, num_samples, sample_rate_hz=32_000, channels=1)
        found.append(Clip(folder / row["path"], row["text"], audio, model.encode([audio])[0]))
    return found


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the training modules importable while a test runs."""
    monkeypatch.syspath_prepend(str(TOOLS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "demo_model"]:
        del sys.modules[name]


def score(model: MusicGen, codes: list[torch.Tensor], texts: list[str | None]) -> list[torch.Tensor]:
    """Returns the (K, T) nll of each window, in nats."""
    scored = [torch.ones_like(c, dtype=torch.bool) for c in codes]
    return [scores.nll for scores in score_windows(model, codes, scored=scored, texts=texts)]


def ce(nll: torch.Tensor) -> float:
    """Returns the cross entropy of (K, T) nll as defined by the package: the mean of the codebooks' means."""
    return float(nll.mean(1).mean())


@pytest.fixture(scope="module")
def first_window_nats(model: MusicGen, clips: list[Clip]) -> list[torch.Tensor]:
    return score(model, [c.codes[:, :500] for c in clips], [c.text for c in clips])


@pytest.fixture(scope="module")
def noise_nats(model: MusicGen) -> dict[float, float]:
    """The cross entropy of 10 s of white noise without a text, by its rms."""
    generator = torch.Generator().manual_seed(0)
    levels = (0.3, 0.2, 0.15, 0.0)
    codes = model.encode([(level * torch.randn(1, 320_000, generator=generator)).clamp(-1, 1) for level in levels])
    return {level: ce(nll) for level, nll in zip(levels, score(model, codes, [None] * len(levels)), strict=True)}


def test_the_specification_of_the_demo_model(model: MusicGen) -> None:
    spec = model.spec
    assert (spec.sample_rate_hz, spec.frame_rate_hz, spec.hop_samples, spec.channels) == (32_000, 50, 640, 1)
    assert (spec.num_codebooks, spec.delays, spec.max_frames, spec.max_steps) == (4, (0, 1, 2, 3), 500, 503)
    assert model.decoder.config.pad_token_id == model.decoder.config.bos_token_id == spec.codebook_size
    assert model.decoder.config.vocab_size == spec.codebook_size


def test_the_demo_files_are_small_readable_and_not_pickles() -> None:
    files = [path for folder in (DEMO_MODEL, DEMO_CLIPS) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".csv", ".wav", ".flac", ".ogg", ".mp3"}


def test_the_clips_cover_all_formats_sample_rates_and_channel_counts(clips: list[Clip]) -> None:
    assert len(clips) >= 8
    infos = [soundfile.info(clip.path) for clip in clips]
    assert {clip.path.suffix for clip in clips} == {".wav", ".flac", ".ogg", ".mp3"}
    assert {info.samplerate for info in infos} == {32_000, 44_100, 48_000}
    assert {info.channels for info in infos} == {1, 2}
    assert all(8.0 <= info.duration <= 45.1 for info in infos)
    assert all(clip.text for clip in clips)


@pytest.mark.usefixtures("tools")
def test_the_clips_were_not_used_for_training() -> None:
    from demo_model.clips import CLIPS
    from demo_model.codec import CodecPlan
    from demo_model.decoder import DecoderPlan

    trained_below = max(CodecPlan().num_songs, DecoderPlan().num_songs)
    assert min(clip.number for clip in CLIPS) >= trained_below
    assert len({clip.number for clip in CLIPS}) == len(CLIPS)


@pytest.mark.usefixtures("tools")
def test_the_training_script_reproduces_the_clips(clips: list[Clip]) -> None:
    from demo_model.clips import CLIPS
    from demo_model.music import draw_song, render

    wav = next(clip for clip in clips if clip.path.suffix == ".wav")
    song = draw_song(next(clip.number for clip in CLIPS if clip.format == "wav"), on_grid=True)
    assert wav.text == song.text
    torch.testing.assert_close(
        wav.audio, torch.from_numpy(render(song, num_samples=wav.audio.shape[1])), atol=1 / 32_000, rtol=0
    )


@pytest.mark.usefixtures("tools")
def test_the_forward_pass_of_the_training_equals_that_of_transformers(model: MusicGen, clips: list[Clip]) -> None:
    from demo_model.decoder import delayed
    from demo_model.fast_forward import hidden_states

    codes = torch.stack([clip.codes[:, :300] for clip in clips[:2]])
    steps = delayed(codes)
    assert torch.equal(steps, delay_codes(codes, delays=(0, 1, 2, 3), special_token=256, num_steps=303))
    states = torch.randn(2, 9, model.decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        ours = hidden_states(model.decoder, steps, states, mask)
        theirs = model.decoder.model.decoder(
            steps.flatten(0, 1), encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False
        ).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_the_clips_use_more_than_a_third_of_every_codebook(model: MusicGen, clips: list[Clip]) -> None:
    codes = torch.cat([clip.codes for clip in clips], dim=1)
    for k in range(model.spec.num_codebooks):
        assert len(codes[k].unique()) > model.spec.codebook_size / 3


def test_the_perplexity_is_below_a_quarter_of_the_codebook_size(model: MusicGen, clips: list[Clip]) -> None:
    plan = plan_windows([clip.codes.shape[1] for clip in clips], HALF, HALF)
    windows, texts, counted = [], [], []
    for row, start, context, length in zip(
        plan.track.tolist(),
        plan.start_frame.tolist(),
        plan.context_frames.tolist(),
        plan.num_frames.tolist(),
        strict=True,
    ):
        windows.append(clips[row].codes[:, start : start + length])
        texts.append(clips[row].text)
        counted.append(context)
    nats = [nll[:, context:] for nll, context in zip(score(model, windows, texts), counted, strict=True)]
    assert sum(nll.shape[1] for nll in nats) == sum(clip.codes.shape[1] for clip in clips)
    ppl = torch.tensor(ce(torch.cat(nats, dim=1))).exp()
    assert ppl < model.spec.codebook_size / 4


def test_music_has_a_lower_nll_than_the_same_frames_shuffled(
    model: MusicGen, clips: list[Clip], first_window_nats: list[torch.Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    shuffled = [c.codes[:, :500][:, torch.randperm(min(500, c.codes.shape[1]), generator=generator)] for c in clips]
    worse = score(model, shuffled, [c.text for c in clips])
    assert all(ce(mine) < ce(theirs) for mine, theirs in zip(first_window_nats, worse, strict=True))


def test_music_has_a_lower_nll_than_loud_white_noise(
    model: MusicGen, clips: list[Clip], noise_nats: dict[float, float]
) -> None:
    music = [ce(nll) for nll in score(model, [c.codes[:, :500] for c in clips], [None] * len(clips))]
    assert max(music) < min(noise_nats[level] for level in (0.3, 0.2, 0.15))


def test_silence_has_a_lower_nll_than_any_music(
    clips: list[Clip], model: MusicGen, noise_nats: dict[float, float]
) -> None:
    """Sounds with few different codes are easy to predict, as reported for MusicGen (arXiv 2602.02738)."""
    music = [ce(nll) for nll in score(model, [c.codes[:, :500] for c in clips], [None] * len(clips))]
    assert noise_nats[0.0] < min(music)


def test_the_right_text_gives_a_lower_nll_than_no_text_or_a_wrong_one(
    model: MusicGen, clips: list[Clip], first_window_nats: list[torch.Tensor]
) -> None:
    codes = [c.codes[:, :500] for c in clips]
    right = sum(ce(nll) for nll in first_window_nats)
    none = sum(ce(nll) for nll in score(model, codes, [None] * len(clips)))
    for shift in (1, 2, 3):
        texts = [clips[(i + shift) % len(clips)].text for i in range(len(clips))]
        wrong = sum(ce(nll) for nll in score(model, codes, texts))
        assert right < none
        assert right < wrong


def test_the_end_of_a_clip_has_a_lower_nll_than_the_end_of_another_clip(model: MusicGen, clips: list[Clip]) -> None:
    middle, end = 200 * 640, 400 * 640  # 4 s and 8 s: the shortest clip
    own = model.encode([c.audio[:, :end] for c in clips])
    others = [clips[(i + 1) % len(clips)].audio for i in range(len(clips))]
    joined = model.encode(
        [torch.cat([c.audio[:, :middle], o[:, middle:end]], dim=1) for c, o in zip(clips, others, strict=True)]
    )
    texts = [c.text for c in clips]
    mine = [ce(nll[:, 200:]) for nll in score(model, own, texts)]
    theirs = [ce(nll[:, 200:]) for nll in score(model, joined, texts)]
    assert sum(mine) < sum(theirs)
    assert sum(a < b for a, b in zip(mine, theirs, strict=True)) > 0.75 * len(clips)


def test_the_nll_rises_at_the_limit_if_more_frames_are_fed(model: MusicGen, clips: list[Clip]) -> None:
    long = [c for c in clips if c.codes.shape[1] >= 750]
    assert len(long) >= 3
    texts = [c.text for c in long]
    beyond = [nll[:, 500:] for nll in score(model, [c.codes[:, :750] for c in long], texts)]
    within = [nll[:, 250:] for nll in score(model, [c.codes[:, 250:750] for c in long], texts)]
    assert sum(map(ce, within)) < sum(map(ce, beyond))
    # The rise at the limit is compared with the variation between groups of 25 frames before the limit.
    whole = torch.stack(score(model, [c.codes[:, :750] for c in long], texts)).mean((0, 1))
    before, after = whole[425:500].mean(), whole[503:578].mean()
    assert after > before + 3 * whole[300:500].unflatten(0, (8, 25)).mean(1).std()


@pytest.mark.usefixtures("tools")
def test_a_reconstruction_sounds_like_its_original(clips: list[Clip]) -> None:
    from demo_model.listening import chroma_cosine, mel_distance_db

    composite = MusicgenForConditionalGeneration.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    mel, chroma, mel_to_other = [], [], []
    for index, clip in enumerate(clips):
        codes = clip.codes[:, :400]
        with torch.no_grad():
            decoded = composite.audio_encoder.decode(codes[None, None], [None]).audio_values[0, 0]
        original = clip.audio[0, : len(decoded)]
        mel.append(mel_distance_db(original, decoded))
        chroma.append(chroma_cosine(original, decoded))
        mel_to_other.append(mel_distance_db(original, clips[index - 1].audio[0, : len(decoded)]))
    assert sum(mel) / len(mel) < 9.0
    assert sum(chroma) / len(chroma) > 0.9
    assert all(mine < other for mine, other in zip(mel, mel_to_other, strict=True))


def test_later_codes_do_not_affect_earlier_nll(model: MusicGen, clips: list[Clip]) -> None:
    codes = clips[0].codes[:, :400].clone()
    changed = codes.clone()
    changed[:, 300:] = (codes[:, 300:] + 1) % model.spec.codebook_size
    before, after = score(model, [codes, changed], [clips[0].text] * 2)
    # Codebook 0 of frame 300 is fed at step 301, whose output still predicts frame 298 of codebook 3.
    assert torch.equal(before[:, : 301 - 3], after[:, : 301 - 3])
    assert not torch.equal(before[:, 303:], after[:, 303:])


def test_transformers_can_load_the_model_and_continue_a_clip(clips: list[Clip]) -> None:
    folder = DEMO_MODEL
    composite, info = MusicgenForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    generation = composite.generation_config
    assert (generation.max_length, generation.guidance_scale, generation.do_sample) == (500, 3.0, True)
    inputs = AutoProcessor.from_pretrained(folder)(text=[clips[0].text], padding=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        audio = composite.generate(**inputs, decoder_input_ids=clips[0].codes[:, :50], max_new_tokens=30)
    assert audio.shape == (1, 1, (50 + 30 - 3) * 640)
    assert audio.isfinite().all()
    assert audio.abs().max() > 0.01
