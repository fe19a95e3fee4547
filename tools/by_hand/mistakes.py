"""Scoring MusicGen by hand: the right way in four small functions, and each common mistake as a change of one line.

`docs/by_hand.md` shows the docstrings and the marked lines, so that the page always matches the executed code. The file is
long because it is meant to be read from top to bottom. Each mistake has about a dozen lines and is independent of the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DistributedSampler
from torchmetrics.text import Perplexity

from by_hand.demo import CONTEXT_S, TARGET_S, Demo, Figure, Piece, figure

MARK = "  # the mistake"
RIGHT = "# right: "
BATCH_SIZE = 8  # default of the package
NUM_DEVICES = 8


def delayed(model: Any, codes: Tensor) -> Tensor:
    """(K, T) codes -> (K, S) steps. The special token comes first, and each codebook is shifted by its delay."""
    K, T = codes.shape
    special = model.config.decoder.pad_token_id
    codes = torch.cat([codes.new_full((K, 1), special), codes], dim=1)
    _, steps = model.decoder.build_delay_pattern_mask(codes, pad_token_id=special, max_length=T + K)
    return steps[:, :-1]


def read(model: Any, processor: Any, steps: Tensor, text: str | None) -> Tensor:
    """(K, S) steps and a text -> (K, S, V) logits."""
    return model(**processor(text=[text], return_tensors="pt"), decoder_input_ids=steps).logits


def realigned(logits: Tensor, num_frames: int) -> Tensor:
    """(K, S, V) per step -> (K, T, V) per frame. Step t + k predicts frame t of codebook k."""
    return torch.stack([logits[k, k : k + num_frames] for k in range(len(logits))])


def nats(logits: Tensor, codes: Tensor) -> Tensor:
    """(K, T, V) logits and (K, T) codes -> (K, T) nll of each code."""
    return cross_entropy(logits.mT, codes, reduction="none")


def right_by_hand(demo: Demo) -> Figure:
    """Scores the demo's windows with the four functions and transformers only. The figure equals that of the package."""

    def nll(piece: Piece) -> Tensor:
        logits = read(demo.model, demo.processor, delayed(demo.model, piece.codes), piece.text)
        return nats(realigned(logits, piece.codes.shape[1]), piece.codes)

    return figure(demo.over_windows(nll))


@dataclass(frozen=True)
class Mistake:
    """A mistake in a script.

    Attributes:
        name: Name of the row.
        group: Part of the work that is affected.
        measure: Script with the mistake.
        with_text: True if the right figure for comparison uses texts.
    """

    name: str
    group: str
    measure: Callable[[Demo], Figure]
    with_text: bool = True

    @property
    def why(self) -> str:
        """Description of the mistake and its cause."""
        return inspect.cleandoc(self.measure.__doc__ or "").replace("\n", " ")

    @property
    def right_lines(self) -> list[str]:
        """Correct code instead of the mistake."""
        return [line.strip().removeprefix(RIGHT) for line in self._source if line.strip().startswith(RIGHT)]

    @property
    def lines(self) -> list[str]:
        """Code of the mistake."""
        return [line.removesuffix(MARK).strip() for line in self._source if line.endswith(MARK)]

    @property
    def _source(self) -> list[str]:
        return inspect.getsource(self.measure).splitlines()


MISTAKES: list[Mistake] = []


def mistake(
    name: str, *, group: str, with_text: bool = True
) -> Callable[[Callable[[Demo], Figure]], Callable[[Demo], Figure]]:
    """Returns a decorator that adds a function to `MISTAKES`."""

    def enter(measure: Callable[[Demo], Figure]) -> Callable[[Demo], Figure]:
        MISTAKES.append(Mistake(name, group, measure, with_text))
        return measure

    return enter


@mistake("undelayed codes fed and scored", group="Codes")
def undelayed(demo: Demo) -> Figure:
    """Four streams of codes, shifted by one step, look like the input of any language model. But MusicGen was
    trained on the delay pattern: codebook 2 expects to know codebook 1 of its own frame, and here it does not.
    """

    def nll(piece: Piece) -> Tensor:
        # right: steps = delayed(demo.model, piece.codes)
        steps = pad(piece.codes, (1, 0), value=demo.special_token)[:, :-1]  # the mistake
        return nats(read(demo.model, demo.processor, steps, piece.text), piece.codes)

    return figure(demo.over_windows(nll))


@mistake("delayed codes fed, undelayed codes scored", group="Codes")
def undelayed_scored(demo: Demo) -> Figure:
    """The input is correct, but the output is compared with undelayed codes. At step t, the model predicts frame t
    of codebook 1, but frame t - 3 of codebook 4. Only codebook 1 is scored correctly.
    """

    def nll(piece: Piece) -> Tensor:
        T = piece.codes.shape[1]
        logits = read(demo.model, demo.processor, delayed(demo.model, piece.codes), piece.text)
        # right: return nats(realigned(logits, T), piece.codes)
        return nats(logits[:, :T], piece.codes)  # the mistake

    return figure(demo.over_windows(nll))


@mistake("no special token in front", group="Codes")
def no_special_token(demo: Demo) -> Figure:
    """`build_delay_pattern_mask` is the public function for the delay pattern, and `generate` calls it. It is easy
    to miss that `generate` first adds the special token at the start. Without it, each output is one step late, and
    is compared with the code that was just fed.
    """

    def nll(piece: Piece) -> Tensor:
        codes, (K, T), special = piece.codes, piece.codes.shape, demo.special_token
        # right: codes = torch.cat([torch.full((K, 1), special), codes], dim=1)
        # right: _, steps = demo.model.decoder.build_delay_pattern_mask(codes, special, max_length=T + K)
        _, steps = demo.model.decoder.build_delay_pattern_mask(codes, special, max_length=T + K - 1)  # the mistake
        logits = read(demo.model, demo.processor, steps, piece.text)
        return nats(realigned(logits, T), piece.codes)

    return figure(demo.over_windows(nll))


@mistake("code 0 for the special token", group="Codes")
def zero_for_special(demo: Demo) -> Figure:
    """The id of the special token is one above the last code, so it looks out of range, and 0 is the usual padding.
    But code 0 is a sound, and every sequence in training started with the special token. The model takes seconds to
    recover.
    """

    def nll(piece: Piece) -> Tensor:
        steps = delayed(demo.model, piece.codes)
        steps = steps.masked_fill(steps == demo.special_token, 0)  # the mistake
        logits = read(demo.model, demo.processor, steps, piece.text)
        return nats(realigned(logits, piece.codes.shape[1]), piece.codes)

    return figure(demo.over_windows(nll))


@mistake("`labels=` given undelayed codes", group="Codes")
def labels_undelayed(demo: Demo) -> Figure:
    """The shortest script uses `labels=`: the model computes a loss, and its documentation says that labels are
    shifted inside. They are shifted, but not delayed. In addition, the input is made from the labels, so -100,
    which excludes the context from the loss, becomes the special token in the input. Pass both, delayed `labels`
    and the steps as `decoder_input_ids`.
    """
    demo.model.config.decoder.decoder_start_token_id = (
        demo.special_token
    )  # without it, an error message asks for this setting
    total, num_frames = 0.0, 0
    for piece in demo.pieces:
        labels = piece.codes.T[None].clone()
        labels[:, : piece.context_frames] = -100
        inputs = demo.processor(text=[piece.text], return_tensors="pt")
        with torch.inference_mode():
            # right: loss = demo.model(**inputs, decoder_input_ids=steps, labels=delayed_labels).loss
            loss = demo.model(**inputs, labels=labels).loss  # the mistake
        total += loss.item() * piece.window.target_frames
        num_frames += piece.window.target_frames
    ce = torch.tensor(total / num_frames, dtype=torch.float64)
    return Figure(ce=ce.item(), ppl=ce.exp().item())


@mistake("the delayed tail scored on padding", group="Codes")
def tail_on_padding(demo: Demo) -> Figure:
    """If T steps are fed for T frames, the last frames of the delayed codebooks have no output. Padding the logits
    with zeros makes the shapes match, but zeros are a uniform distribution, with an nll of ln V per code. Feed T +
    3 steps, or exclude the tail as audiocraft does.
    """

    def nll(piece: Piece) -> Tensor:
        K, T = piece.codes.shape
        steps = delayed(demo.model, piece.codes)
        # right: logits = read(demo.model, demo.processor, steps, piece.text)
        logits = read(demo.model, demo.processor, steps[:, :T], piece.text)  # the mistake
        logits = pad(logits, (0, 0, 0, K - 1))  # the mistake
        return nats(realigned(logits, T), piece.codes)

    return figure(demo.over_windows(nll))


@mistake("`decoder_inputs_embeds=` given the sums of embeddings", group="Codes")
def embeddings_fed(demo: Demo) -> Figure:
    """Probing and gradients need embeddings, so they are summed by hand and passed as `decoder_inputs_embeds`. Transformers
    5.17 then takes the length of the sequence from a tensor whose last axis is 1, and gives every frame position 0.
    """

    def nll(piece: Piece) -> Tensor:
        steps = delayed(demo.model, piece.codes)
        # right: logits = read(demo.model, demo.processor, steps, piece.text)
        embeds = sum(
            embed(row) for embed, row in zip(demo.model.decoder.model.decoder.embed_tokens, steps, strict=True)
        )
        inputs = demo.processor(text=[piece.text], return_tensors="pt")
        logits = demo.model(**inputs, decoder_inputs_embeds=embeds[None]).logits  # the mistake
        return nats(realigned(logits, piece.codes.shape[1]), piece.codes)

    return figure(demo.over_windows(nll))


@mistake('"" for no text', group="Text", with_text=False)
def empty_text(demo: Demo) -> Figure:
    """An empty text seems to mean no text. But the processor converts it to an end token, and the model receives a
    text that was not in its training. No text is the null condition: states of zeros, as returned by
    `get_unconditional_inputs`.
    """

    def nll(piece: Piece) -> Tensor:
        steps = delayed(demo.model, piece.codes)
        # right: none = demo.model.get_unconditional_inputs(1)
        # right: condition = dict(encoder_outputs=none.encoder_outputs, attention_mask=none.attention_mask)
        condition = demo.processor(text=[""], return_tensors="pt")  # the mistake
        logits = demo.model(**condition, decoder_input_ids=steps).logits
        return nats(realigned(logits, piece.codes.shape[1]), piece.codes)

    return figure(demo.over_windows(nll))


@mistake("padded text without its mask", group="Text")
def unmasked_text(demo: Demo) -> Figure:
    """Texts are padded to the same length, for a batch or a compiled model, and only `input_ids` is passed. The
    text encoder and the decoder then both attend to the padding.
    """

    def nll(piece: Piece) -> Tensor:
        inputs = demo.processor(text=[piece.text], padding="max_length", return_tensors="pt")
        steps = delayed(demo.model, piece.codes)
        # right: logits = demo.model(**inputs, decoder_input_ids=steps).logits
        logits = demo.model(input_ids=inputs.input_ids, decoder_input_ids=steps).logits  # the mistake
        return nats(realigned(logits, piece.codes.shape[1]), piece.codes)

    return figure(demo.over_windows(nll))


@mistake("short windows filled with silence, and scored", group="Audio")
def silence_scored(demo: Demo) -> Figure:
    """Windows of equal length are easy to batch, so the end of a clip is padded with zeros, and all frames are
    scored. Silence is very easy to predict.
    """
    longest = max(piece.audio.shape[1] for piece in demo.pieces)
    # right: audio = [piece.audio for piece in demo.pieces]
    audio = [pad(piece.audio, (0, longest - piece.audio.shape[1])) for piece in demo.pieces]  # the mistake
    pieces = []
    for piece, wave, codes in zip(demo.pieces, audio, demo.musicgen.encode(audio), strict=True):
        window = replace(piece.window, target_frames=codes.shape[1] - piece.context_frames)
        pieces.append(Piece(window, wave, codes, piece.text))
    return figure(demo.right_nll(pieces))


@mistake("320 samples per frame", group="Audio")
def hop_of_320(demo: Demo) -> Figure:
    """The best-known EnCodec model has 320 samples per frame, but MusicGen's has 640. With 320, 5 s are taken as
    500 frames, and windows are twice as long as intended. transformers extends the positions without a warning, and
    the model reads more frames than it was trained on. Bits per second are also doubled.
    """
    # right: frames_per_second = demo.spec.sample_rate_hz // 640
    frames_per_second = demo.spec.sample_rate_hz // 320  # the mistake
    pieces = demo.cut(
        demo.read(demo.spec.sample_rate_hz),
        texts=demo.texts,
        context_frames=int(CONTEXT_S * frames_per_second),
        target_frames=int(TARGET_S * frames_per_second),
    )
    return figure(demo.right_nll(pieces))


@mistake("audio at the file's own rate", group="Audio")
def own_rate(demo: Demo) -> Figure:
    """The audio of a file is passed to the encoder without resampling. The encoder accepts any array, and treats
    44.1 kHz as 32 kHz, which is slower and lower. The processor checks the rate only if it is given. Files with 32
    kHz give correct results, which hides the mistake.
    """
    # right: waves = demo.read(sample_rate_hz=32_000)
    waves = demo.read(sample_rate_hz=None)  # the mistake
    return figure(demo.right_nll(demo.cut(waves, texts=demo.texts)))


@mistake("audio at 22,050 Hz", group="Audio")
def librosa_rate(demo: Demo) -> Figure:
    """`librosa.load` resamples to 22,050 Hz by default. The model receives audio that is faster and higher."""
    # right: waves = demo.read(sample_rate_hz=32_000)
    waves = demo.read(sample_rate_hz=22_050)  # the mistake
    return figure(demo.right_nll(demo.cut(waves, texts=demo.texts)))


@mistake("mean of the windows' perplexities", group="Sums and averages")
def mean_of_windows(demo: Demo) -> Figure:
    """A perplexity is computed per window, and the mean is taken at the end. The exponential gives difficult
    windows a larger weight, which raises the mean.
    """
    ce = torch.stack([nll.double().mean() for nll in demo.nll])
    # right: ppl = torch.cat(demo.nll, dim=1).mean().exp()
    ppl = torch.stack([nll.mean().exp() for nll in demo.nll]).mean()  # the mistake
    return Figure(ce=ce.mean().item(), ppl=ppl.item())


@mistake(f"mean of the batches' perplexities, {BATCH_SIZE} windows each", group="Sums and averages")
def mean_of_batches(demo: Demo) -> Figure:
    """The mean is taken over batches, as training loops log it. The figure then depends on the batch size and on
    the order of the files, and the last batch has the same weight as a full one.
    """
    starts = range(0, len(demo.nll), BATCH_SIZE)
    batches = [torch.cat(demo.nll[first : first + BATCH_SIZE], dim=1) for first in starts]
    ce = torch.stack([nll.double().mean() for nll in batches])
    # right: ppl = torch.cat(batches, dim=1).mean().exp()
    ppl = torch.stack([nll.mean().exp() for nll in batches]).mean()  # the mistake
    return Figure(ce=ce.mean().item(), ppl=ppl.item())


@mistake("mean of the codebooks' perplexities", group="Sums and averages")
def mean_of_codebooks(demo: Demo) -> Figure:
    """Each codebook has a perplexity, and the script takes the mean of the four. By definition, the mean is taken
    over cross entropies, followed by one exponential. Here, the most difficult codebook dominates.
    """
    ce = torch.cat(demo.nll, dim=1).double().mean(1)
    # right: ppl = ce.mean().exp()
    ppl = ce.exp().mean()  # the mistake
    return Figure(ce=ce.mean().item(), ppl=ppl.item())


@mistake("softmax, then log, in fp16", group="Sums and averages")
def softmax_in_fp16(demo: Demo) -> Figure:
    """A model in half precision returns logits in half precision, and torchmetrics' `Perplexity` keeps that dtype:
    it computes the softmax first, and then the log. fp16 cannot represent probabilities below 6e-8, so a single
    code with an nll of 17 nats makes the result infinite.
    """
    metric = Perplexity()
    for logits, codes in scored_logits(demo):
        # right: metric.update(logits.float(), codes)
        metric.update(logits.half(), codes)  # the mistake
    return what_it_says(metric)


@mistake("softmax, then log, in bf16", group="Sums and averages")
def softmax_in_bf16(demo: Demo) -> Figure:
    """bf16 has a sufficient range, but only 8 bits: each log and the sum of each update are rounded by up to 0.2%.
    The effect is small at 1 nat per code, but 1% of the perplexity at 6 nats.
    """
    metric = Perplexity()
    for logits, codes in scored_logits(demo):
        # right: metric.update(logits.float(), codes)
        metric.update(logits.bfloat16(), codes)  # the mistake
    return what_it_says(metric)


@mistake("sums kept in bf16", group="Sums and averages")
def sums_in_bf16(demo: Demo) -> Figure:
    """A metric is a submodule of its Lightning module, and `precision: bf16-true` converts the whole module,
    including the metric's sums. A sum with 8 bits rounds small numbers, and finally ignores them. The error
    increases with the amount of music.
    """
    metric = Perplexity()
    module = torch.nn.ModuleDict({"perplexity": metric})
    module.to(torch.bfloat16)  # the mistake
    for logits, codes in scored_logits(demo):
        metric.update(logits, codes)
    return what_it_says(metric)


@mistake(f"the sampler's duplicates counted, {NUM_DEVICES} devices", group="Sums and averages")
def padded_sampler(demo: Demo) -> Figure:
    """`DistributedSampler` repeats the first windows until all devices have the same number, and Lightning's `test`
    adds this sampler by default. The figure then depends on the number of devices, and gives the first windows a
    larger weight.
    """
    ranks: list[DistributedSampler[Tensor]] = [
        DistributedSampler(demo.nll, num_replicas=NUM_DEVICES, rank=rank, shuffle=False) for rank in range(NUM_DEVICES)
    ]
    # right: return figure(demo.nll)
    return figure([demo.nll[row] for rank in ranks for row in rank])  # the mistake


@torch.inference_mode()
def scored_logits(demo: Demo) -> list[tuple[Tensor, Tensor]]:
    """Returns (K, target, V) logits and (K, target) codes of each window of the demo."""
    found = []
    for piece in demo.pieces:
        logits = read(demo.model, demo.processor, delayed(demo.model, piece.codes), piece.text)
        aligned = realigned(logits, piece.codes.shape[1])
        found.append((aligned[:, piece.context_frames :], piece.codes[:, piece.context_frames :]))
    return found


def what_it_says(metric: Perplexity) -> Figure:
    """Returns the figure of a torchmetrics `Perplexity`."""
    ppl = metric.compute().double()
    return Figure(ce=ppl.log().item(), ppl=ppl.item())
