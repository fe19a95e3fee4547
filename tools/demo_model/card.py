"""Writes the model card: what the demo model is, what it reached, and what it does not."""

# ruff: noqa: E501 - lines of the page are wrapped where they end once they are filled in

from __future__ import annotations

from pathlib import Path

from demo_model import checks, codec, decoder


def write_card(
    folder: Path, figures: list[checks.Figure], costs: list[checks.ClipCost], seconds: dict[str, int]
) -> None:
    """Writes `README.md` into the demo's folder.

    Args:
        folder: the demo's; `model` and `clips` lie in it.
        figures: what `run_checks` measured.
        costs: what `clip_costs` measured.
        seconds: wall-clock seconds of each stage, on two shared CPU cores.
    """
    sizes = {
        name: sum(file.stat().st_size for file in (folder / place).iterdir())
        for name, place in (("model", "models/demo"), ("clips", "data/demo"))
    }
    codec_plan, decoder_plan = codec.CodecPlan(), decoder.DecoderPlan()
    steps = codec_plan.wave_steps + codec_plan.spectrum_steps + codec_plan.codebook_steps + codec_plan.decoder_steps
    times = ", ".join(f"{stage} {spent / 60:.1f}" for stage, spent in seconds.items())
    clips = "\n".join(
        f"| {c.file} | {c.duration_s:g} | {c.perplexity:.2f} | +{c.loss_without_text:.3f} | +{c.loss_shuffled:.2f} |"
        for c in costs
    )
    text = f"""# The demo model

A really trained MusicGen of {sizes["model"] / 1e6:.1f} MB with held-out clips of {sizes["clips"] / 1e6:.1f} MB, so that every function of the package
can be tried offline on a CPU. It knows only the synthetic songs of `tools/demo_model/music.py`: its figures say that
the instrument works, and nothing about music at large.

- **Format**: transformers' `MusicgenForConditionalGeneration`, float16 safetensors, with tokenizer and processor.
- **Codec**: EnCodec, 32 kHz, hop 640 (50 frames per second), {codec.NUM_CODEBOOKS} codebooks of {codec.CODEBOOK_SIZE} entries; {steps:,} steps.
- **Decoder**: delay pattern 0, 1, 2, 3; special token {decoder.SPECIAL_TOKEN}; a T5 encoder trained with it;
  {decoder_plan.num_songs:,} songs of {decoder_plan.song_frames / 50:g} s, {decoder_plan.short_steps:,} steps on crops of {decoder.MAX_FRAMES // 100} s, then {decoder_plan.long_steps:,} on crops of {decoder.MAX_FRAMES // 50} s.
  Its limit is {decoder.MAX_FRAMES} frames (`max_length` of the generation config): positions beyond them are untrained.
- **Texts** say mood, key, tempo, chords, melody, bass and drums: `dark music in c minor , at 125 bpm , piano chords ,
  bell melody , deep bass , house drums`. Other words are unknown to it.
- **Clips**: `clips/manifest.csv` (path, id, text); songs that were not trained on, in four formats, three rates, mono
  and stereo.

## What it reached
On 32 other held-out songs of 20 s, measured on the exported checkpoint; ce in nats a code. The last column counts the
songs (with noise: pairs of a song and a noise) for which the first of the two figures is the larger.

{checks.table(figures)}

The clips, on the audio as their files hold it: perplexity over windows of 5 s after 5 s; by how many nats ce rises
without the text; and by how many, over the first 10 s, with the frames shuffled.

| clip | s | ppl | no text | shuffled |
|---|---|---|---|---|
{clips}

Songs repeat a loop of 1.6 to 3.8 s, mostly in the very same codes, so most of what follows the first loop can be known:
the perplexity is far lower than that of real music. Quiet noise falls on few codes and costs no more than music, and
silence costs nearly nothing: a low perplexity is no proof of quality. Nobody has listened to what it generates.

## Again, from the seed
`python tools/train_demo_model.py --work <folder>` makes songs, codec, decoder, checkpoint, clips and this page; minutes
of each stage on two CPU cores: {times}.
"""
    (folder / "README.md").write_text(text)
