"""Trains the decoder and the text encoder on the codes and texts of the songs.

The whole `MusicgenForConditionalGeneration` is built from one configuration, because sub-models that share configurations lose
their causal mask. It contains the trained codec, and its other parts are trained.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import torch
from torch import nn
from transformers import (
    EncodecModel,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)

from demo_model import fast_forward, text
from demo_model.codec import CODEBOOK_SIZE, NUM_CODEBOOKS
from demo_model.halves import Halves

MAX_FRAMES = 500
SPECIAL_TOKEN = CODEBOOK_SIZE


@dataclass(frozen=True)
class DecoderPlan:
    """Lengths of the parts of the decoder's training.

    Attributes:
        num_songs: Number of songs for training.
        song_frames: Length of each song in frames.
        short_steps: Number of steps on crops of half the limit.
        long_steps: Number of steps on crops of the whole limit.
        batch_frames: Number of frames per step, over all crops.
        learning_rate: Highest learning rate. It decreases to a hundredth of this value.
        null_share: Share of the crops without a text.
        seed: Seed of weights and crops.
    """

    num_songs: int = 8_000
    song_frames: int = 620
    short_steps: int = 2_000
    long_steps: int = 13_000
    batch_frames: int = 4_000
    learning_rate: float = 2e-3
    null_share: float = 0.15
    seed: int = 2


def model_config(codec: EncodecModel, *, vocabulary_size: int) -> MusicgenConfig:
    """Returns the configuration of the whole model."""
    text_encoder = T5Config(
        vocab_size=vocabulary_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=CODEBOOK_SIZE,
        max_position_embeddings=MAX_FRAMES + NUM_CODEBOOKS - 1,
        num_hidden_layers=4,
        ffn_dim=432,
        num_attention_heads=4,
        hidden_size=144,
        dropout=0.0,
        num_codebooks=NUM_CODEBOOKS,
        audio_channels=1,
        pad_token_id=SPECIAL_TOKEN,
        bos_token_id=SPECIAL_TOKEN,
    )
    return MusicgenConfig(
        text_encoder=text_encoder.to_dict(), audio_encoder=codec.config.to_dict(), decoder=decoder.to_dict()
    )


def build_model(codec: EncodecModel, *, seed: int) -> MusicgenForConditionalGeneration:
    """Builds the model with the trained codec, and random weights in its other parts.

    With the initialisation of transformers (deviation 0.02), training takes minutes longer. Therefore embeddings have a deviation
    of 0.5, and linear layers one of 1/sqrt(fan in).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MusicgenForConditionalGeneration(model_config(codec, vocabulary_size=len(text.vocabulary())))
        model.audio_encoder.load_state_dict(codec.state_dict())
        for part in (model.decoder, model.text_encoder, model.enc_to_dec_proj):
            for name, module in part.named_modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                    if name.endswith(("out_proj", "fc2", "wo", ".o")):
                        module.weight.data.mul_(0.5)
                    if name.endswith("SelfAttention.q"):  # T5 does not scale its scores
                        module.weight.data.mul_(0.25)
                elif isinstance(module, nn.Embedding) and "relative" not in name:
                    nn.init.normal_(module.weight, std=0.5)
    return model


def delayed(codes: torch.Tensor) -> torch.Tensor:
    """Arranges codes in the decoder's input layout, with the special token at positions without a code.

    ```
    step       0  1  2  3  4        input: codebook k holds frame t at step t + 1 + k
    codebook 0 S  0  1  2  S        and the logit for frame t of codebook k is the output at step t + k
    codebook 1 S  S  0  1  2        (T = 3, K = 2, S: special; the last frame of the last codebook is never fed)
    ```

    Args:
        codes: (B, K, T) codes.

    Returns:
        (B, K, S), S = T + K - 1.
    """
    B, K, T = codes.shape
    steps = torch.full((B, K, T + K), SPECIAL_TOKEN, dtype=torch.long)
    for k in range(K):
        steps[:, k, k + 1 : k + 1 + T] = codes[:, k]
    return steps[..., :-1]


@dataclass(frozen=True)
class Crops:
    """The training data of a step.

    Attributes:
        codes: (B, K, T) int64.
        tokens: (B, L) tokens of the texts.
        mask: (B, L), 0 for padding of the texts.
        shown: (B,), 1 for rows with a text and 0 for the null condition.
    """

    codes: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    shown: torch.Tensor

    def halved(self) -> list[Crops]:
        """Splits the crops into two equal parts."""
        parts = zip(*(t.chunk(2) for t in (self.codes, self.tokens, self.mask, self.shown)), strict=True)
        return [Crops(*part) for part in parts]


def codebook_losses(model: MusicgenForConditionalGeneration, crops: Crops) -> torch.Tensor:
    """Returns the (K,) mean nll in nats."""
    num_frames = crops.codes.shape[2]
    states = model.text_encoder(input_ids=crops.tokens, attention_mask=crops.mask).last_hidden_state
    states = model.enc_to_dec_proj(states) * crops.mask[..., None] * crops.shown[:, None, None]
    hidden = fast_forward.hidden_states(model.decoder, delayed(crops.codes), states, crops.mask)
    losses = []
    for k, head in enumerate(model.decoder.lm_heads):
        logits = head(hidden[:, k : k + num_frames]).float()
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), crops.codes[:, k].flatten()))
    return torch.stack(losses)


@torch.no_grad()
def compare_with_transformers(model: MusicgenForConditionalGeneration) -> float:
    """Returns the largest difference from the forward pass of transformers in float32, relative to the deviation."""
    generator = torch.Generator().manual_seed(0)
    steps = delayed(torch.randint(CODEBOOK_SIZE, (2, NUM_CODEBOOKS, 300), generator=generator))
    states = torch.randn(2, 9, model.decoder.config.hidden_size, generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    theirs = model.decoder.model.decoder(
        steps.flatten(0, 1), encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False
    ).last_hidden_state
    ours = fast_forward.hidden_states(model.decoder, steps, states, mask)
    return float((ours - theirs).abs().max() / theirs.std())


def train_decoder(
    codec: EncodecModel,
    codes: torch.Tensor,
    texts: list[str],
    plan: DecoderPlan,
    *,
    held_out: tuple[torch.Tensor, list[str]],
    snapshot: Path,
) -> MusicgenForConditionalGeneration:
    """Trains on (songs, K, T) int16 codes and their texts. Prints the loss of held-out songs, and saves checkpoints.

    Returns:
        The model in eval mode.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    model = build_model(codec, seed=plan.seed)
    trained = [p for part in (model.decoder, model.text_encoder, model.enc_to_dec_proj) for p in part.parameters()]
    print(f"decoder: {sum(p.numel() for p in trained)} parameters", flush=True)
    tokenizer = text.build_tokenizer()
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    tokens, mask = encoded["input_ids"], encoded["attention_mask"]
    matrices = [p for p in trained if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98))
    halves = Halves(trained)

    def loss(part: Crops) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            losses = codebook_losses(model, part)
        return losses.mean(), losses.detach()

    print(
        f"decoder: difference from the forward pass of transformers {compare_with_transformers(model):.1e}", flush=True
    )
    num_steps, start = plan.short_steps + plan.long_steps, time.monotonic()
    seen: list[torch.Tensor] = []
    model.train()
    for step in range(num_steps):
        num_frames = MAX_FRAMES if step >= plan.short_steps else MAX_FRAMES // 2
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _schedule(step, num_steps)
        crops = _crops(codes, tokens, mask, plan, num_frames=num_frames, generator=generator)
        seen += halves.backward(loss, crops.halved())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 100 == 99 or step == num_steps - 1:
            mean = torch.stack(seen).mean(0)
            shares = " ".join(f"{x:.2f}" for x in mean.tolist())
            print(
                f"decoder: step {step + 1} {time.monotonic() - start:.0f} s ce {mean.mean():.3f} of {shares}",
                flush=True,
            )
            seen.clear()
        if step % 500 == 499 or step == num_steps - 1:
            _report(model, *held_out)
            model.save_pretrained(snapshot)
    return model.eval()


def _schedule(step: int, num_steps: int) -> float:
    """Returns the factor of the learning rate: warm-up over 200 steps, then a cosine down to a hundredth."""
    return min(1.0, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + cos(pi * step / num_steps)))


def _crops(
    codes: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    plan: DecoderPlan,
    *,
    num_frames: int,
    generator: torch.Generator,
) -> Crops:
    """Returns crops of random songs. Half of them start with the song, where the text is most informative."""
    num_crops = plan.batch_frames // num_frames
    which = torch.randint(len(codes), (num_crops,), generator=generator)
    starts = torch.randint(codes.shape[2] - num_frames + 1, (num_crops,), generator=generator)
    starts = starts * (torch.rand(num_crops, generator=generator) < 0.5)
    crops = [codes[i, :, s : s + num_frames] for i, s in zip(which.tolist(), starts.tolist(), strict=True)]
    shown = (torch.rand(num_crops, generator=generator) >= plan.null_share).float()
    return Crops(torch.stack(crops).long(), tokens[which], mask[which], shown)


@torch.no_grad()
def _report(model: MusicgenForConditionalGeneration, codes: torch.Tensor, texts: list[str]) -> None:
    """Prints the loss of held-out songs with the right text, with that of the next song, and without a text."""
    encoded = text.build_tokenizer()(texts, padding=True, return_tensors="pt")
    tokens, mask = encoded["input_ids"], encoded["attention_mask"]
    codes, everyone = codes[..., :MAX_FRAMES].long(), torch.ones(len(codes))
    right = codebook_losses(model, Crops(codes, tokens, mask, everyone))
    wrong = codebook_losses(model, Crops(codes, tokens.roll(1, 0), mask.roll(1, 0), everyone)).mean()
    none = codebook_losses(model, Crops(codes, tokens, mask, everyone * 0)).mean()
    shares = " ".join(f"{x:.2f}" for x in right.tolist())
    print(
        f"decoder: held-out ce {right.mean():.3f} of {shares}; wrong text {wrong:.3f}, no text {none:.3f}", flush=True
    )
