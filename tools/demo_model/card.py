"""Writes the model card of the demo model, with its figures and limits."""

# ruff: noqa: E501 - lines of the page are wrapped after the values have been inserted

from __future__ import annotations

from pathlib import Path

from demo_model import checks, codec, decoder
from demo_model.places import CARD, CLIPS, MODEL


def write_card(
    folder: Path, figures: list[checks.Figure], costs: list[checks.ClipCost], seconds: dict[str, int]
) -> None:
    """Writes the README.md next to the demo's weights.

    Args:
        folder: Folder of the package.
        figures: Result of `run_checks`.
        costs: Result of `clip_costs`.
        seconds: Wall-clock seconds of each stage, on two shared CPU cores.
    """
    sizes = {
        place: sum(file.stat().st_size for file in (folder / place).iterdir() if file.name != CARD)
        for place in (MODEL, CLIPS)
    }
    codec_plan, decoder_plan = codec.CodecPlan(), decoder.DecoderPlan()
    steps = codec_plan.wave_steps + codec_plan.spectrum_steps + codec_plan.codebook_steps + codec_plan.decoder_steps
    times = ", ".join(f"{stage} {spent / 60:.1f}" for stage, spent in seconds.items())
    clips = "\n".join(
        f"| {c.file} | {c.duration_s:g} | {c.perplexity:.2f} | +{c.loss_without_text:.3f} | +{c.loss_shuffled:.2f} |"
        for c in costs
    )
    text = f"""# The demo model

A trained MusicGen model of {sizes[MODEL] / 1e6:.1f} MB, with held-out clips of {sizes[CLIPS] / 1e6:.1f} MB, for trying all functions of the
package offline on a CPU. It was trained only on the synthetic songs of `tools/demo_model/music.py`. Its figures show
that the package works, and say nothing about real music.

- **Format**: transformers' `MusicgenForConditionalGeneration` in float16 safetensors, with tokenizer and processor.
- **Codec**: EnCodec, 32 kHz, hop 640 (50 frames per second), {codec.NUM_CODEBOOKS} codebooks of {codec.CODEBOOK_SIZE} entries. It was trained for {steps:,} steps.
- **Decoder**: delays 0, 1, 2, 3 and special token {decoder.SPECIAL_TOKEN}. It was trained together with a T5 text encoder on
  {decoder_plan.num_songs:,} songs of {decoder_plan.song_frames / 50:g} s: {decoder_plan.short_steps:,} steps on crops of {decoder.MAX_FRAMES // 100} s, then {decoder_plan.long_steps:,} on crops of {decoder.MAX_FRAMES // 50} s.
  Its limit is {decoder.MAX_FRAMES} frames (`max_length` of the generation config). Later positions were not trained.
- **Texts** describe mood, key, tempo, chords, melody, bass and drums: `dark music in c minor , at 125 bpm , piano chords ,
  bell melody , deep bass , house drums`. All other words are unknown tokens.
- **Clips**: `{CLIPS}/manifest.csv` (path, id, text) lists songs that were not used for training, in four formats and at
  three sample rates, in mono and stereo.

## Results
The figures were measured with the exported checkpoint on 32 other held-out songs of 20 s. Cross entropy (ce) is in nats
per code. The last column counts the songs for which the first of two figures is larger. For noise, it counts pairs of a
song and a noise.

{checks.table(figures)}

The next table shows figures of each clip, measured on the audio in its file: the perplexity over windows of 5 s after 5 s
of context, the increase of ce in nats without the text, and the increase over the first 10 s if the frames are shuffled.

| clip | s | ppl | no text | shuffled |
|---|---|---|---|---|
{clips}

Each song repeats a loop of 1.6 to 3.8 s, mostly with identical codes, so most codes after the first loop are predictable.
Therefore, the perplexity is far lower than that of real music. Quiet noise is encoded with few different codes and has no
higher ce than music, and the ce of silence is close to 0. A low perplexity does not prove quality. Nobody has listened to
the generated music.

## Reproducing the model
`python tools/train_demo_model.py --work <folder>` creates songs, codec, decoder, checkpoint, clips and this page. Minutes
per stage on two CPU cores: {times}.
"""
    (folder / MODEL / CARD).write_text(text)
