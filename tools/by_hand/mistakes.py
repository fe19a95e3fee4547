"""Scoring MusicGen by hand: the right way in four small functions, and every common mistake as a change of one line.

The docstrings and the marked lines are what `docs/by_hand.md` shows, so the page cannot drift from what was run. A long
file, so that it can be read from top to bottom: a mistake is a dozen lines and stands alone.
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
BATCH_SIZE = 8  # as the package's default
NUM_DEVICES = 8


def delayed(model: Any, codes: Tensor) -> Tensor:
    """(K, T) codes -> (K, S) steps: the special token first, then every codebook behind its delay."""
    K, T = codes.shape
    special = model.config.decoder.pad_token_id
    codes = torch.cat([codes.new_full((K, 1), special), codes], dim=1)
    _, steps = model.decoder.build_delay_pattern_mask(codes, pad_token_id=special, max_length=T + K)
    return steps[:, :-1]


def read(model: Any, processor: Any, steps: Tensor, text: str | None) -> Tensor:
    """(K, S) steps and a text -> (K, S, V) logits."""
    return model(**processor(text=[text], return_tensors="pt"), decoder_input_ids=steps).logits


def realigned(logits: Tensor, num_frames: int) -> Tensor:
    """(K, S, V) by step -> (K, T, V) by frame: codebook k speaks of frame t at step t + k."""
    return torch.stack([logits[k, k : k + num_frames] for k in range(len(logits))])


def nats(logits: Tensor, codes: Tensor) -> Tensor:
    """(K, T, V) logits and (K, T) codes -> (K, T) what each code costs."""
    return cross_entropy(logits.mT, codes, reduction="none")


def right_by_hand(demo: Demo) -> Figure:
    """The four functions over the demo's windows: the package's figure, out of transformers alone."""

    def nll(piece: Piece) -> Tensor:
        logits = read(demo.model, demo.processor, delayed(demo.model, piece.codes), piece.text)
        return nats(realigned(logits, piece.codes.shape[1]), piece.codes)

    return figure(demo.over_windows(nll))


@dataclass(frozen=True)
class Mistake:
    """One way to get it wrong.

    Attributes:
        name: of the row.
        group: which part of the work it spoils.
        measure: the script that makes it.
        with_text: whether the right figure beside it is the one with texts.
    """

    name: str
    group: str
    measure: Callable[[Demo], Figure]
    with_text: bool = True

    @property
    def why(self) -> str:
        """What it is, and why it tempts."""
        return inspect.cleandoc(self.measure.__doc__ or "").replace("\n", " ")

    @property
    def right_lines(self) -> list[str]:
        """The code that would be right in its place."""
        return [line.strip().removeprefix(RIGHT) for line in self._source if line.strip().startswith(RIGHT)]

    @property
    def lines(self) -> list[str]:
        """The code that makes it."""
        return [line.removesuffix(MARK).strip() for line in self._source if line.endswith(MARK)]

    @property
    def _source(self) -> list[str]:
        return inspect.getsource(self.measure).splitlines()


MISTAKES: list[Mistake] = []


def mistake(
    name: str, *, group: str, with_text: bool = True
) -> Callable[[Callable[[Demo], Figure]], Callable[[Demo], Figure]]:
    """Enters a function into `MISTAKES`."""

    def enter(measure: Callable[[Demo], Figure]) -> Callable[[Demo], Figure]:
        MISTAKES.append(Mistake(name, group, measure, with_text))
        return measure

    return enter


@mistake("undelayed codes fed and scored", group="Codes")
def undelayed(demo: Demo) -> Figure:
    """Four streams of codes, shifted by one, look like any language model's input. But MusicGen was trained on the
    delay pattern: codebook 2 expects to know codebook 1 of its own frame, and here it does not.
    """

    def nll(piece: Piece) -> Tensor:
        # right: steps = delayed(demo.model, piece.codes)
        steps = pad(piece.codes, (1, 0), value=demo.special_token)[:, :-1]  # the mistake
        return nats(read(demo.model, demo.processor, steps, piece.text), piece.codes)

    return figure(demo.over_windows(nll))


@mistake("delayed codes fed, undelayed codes scored", group="Codes")
def undelayed_scored(demo: Demo) -> Figure:
    """The input is right, and the output is taken to line up with the codes. It lines up with the *delayed* codes: at
    step t the model speaks of frame t of codebook 1 and of frame t - 3 of codebook 4. Only codebook 1 comes out right.
    """

    def nll(piece: Piece) -> Tensor:
        T = piece.codes.shape[1]
        logits = read(demo.model, demo.processor, delayed(demo.model, piece.codes), piece.text)
        # right: return nats(realigned(logits, T), piece.codes)
        return nats(logits[:, :T], piece.codes)  # the mistake

    return figure(demo.over_windows(nll))


@mistake("no special token in front", group="Codes")
def no_special_token(demo: Demo) -> Figure:
    """`build_delay_pattern_mask` is the public helper for the pattern, and `generate` calls it with codes. What `generate`
    does first is easy to miss: it puts the special token in front. Without it each output is one step late, and the
    model is asked for the code that it was just given.
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
    """The special token's id is one past the last code, so it looks out of range, and 0 is the usual padding. To the
    model code 0 is a sound, and the special token is how every piece that it ever heard began: it takes seconds to
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
    """The shortest script of all: the model has a loss, and its documentation says that labels are shifted inside. They
    are shifted, not delayed. And -100, which is to keep the context out of the loss, is made into the input too: the
    model hears special tokens where the context was. Give both, `labels` delayed and the steps as `decoder_input_ids`.
    """
    demo.model.config.decoder.decoder_start_token_id = demo.special_token  # what the error without it asks for
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
    """T frames in, T steps out: the last frames of the delayed codebooks have no output yet. A buffer of zeros makes the
    shapes fit, and zeros are a uniform guess, ln V nats a code. Feed T + 3 steps, or leave the tail out as audiocraft
    does.
    """

    def nll(piece: Piece) -> Tensor:
        K, T = piece.codes.shape
        steps = delayed(demo.model, piece.codes)
        # right: logits = read(demo.model, demo.processor, steps, piece.text)
        logits = read(demo.model, demo.processor, steps[:, :T], piece.text)  # the mistake
        logits = pad(logits, (0, 0, 0, K - 1))  # the mistake
        return nats(realigned(logits, T), piece.codes)

    return figure(demo.over_windows(nll))


@mistake('"" for no text', group="Text", with_text=False)
def empty_text(demo: Demo) -> Figure:
    """An empty text is the natural way to say nothing. The processor makes an end token of it, and the model hears a
    text that it never learnt. No text is the null condition: states of zero, as `get_unconditional_inputs` gives.
    """

    def nll(piece: Piece) -> Tensor:
        steps = delayed(demo.model, piece.codes)
        # right: none = demo.model.get_unconditional_inputs(1)
        # right: heard = dict(encoder_outputs=none.encoder_outputs, attention_mask=none.attention_mask)
        heard = demo.processor(text=[""], return_tensors="pt")  # the mistake
        logits = demo.model(**heard, decoder_input_ids=steps).logits
        return nats(realigned(logits, piece.codes.shape[1]), piece.codes)

    return figure(demo.over_windows(nll))


@mistake("padded text without its mask", group="Text")
def unmasked_text(demo: Demo) -> Figure:
    """Texts are padded to one length, for a batch or a compiled model, and only `input_ids` is passed on. Then text
    encoder and decoder both listen to the padding.
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
    """Equal lengths make batches easy, so a clip's end is filled up with zeros and all frames are counted. Silence is
    the easiest thing there is to predict.
    """
    longest = max(piece.audio.shape[1] for piece in demo.pieces)
    # right: audio = [piece.audio for piece in demo.pieces]
    audio = [pad(piece.audio, (0, longest - piece.audio.shape[1])) for piece in demo.pieces]  # the mistake
    pieces = []
    for piece, wave, codes in zip(demo.pieces, audio, demo.musicgen.encode(audio), strict=True):
        window = replace(piece.window, target_frames=codes.shape[1] - piece.context_frames)
        pieces.append(Piece(window, wave, codes, piece.text))
    return figure(demo.right_nll(pieces))


@mistake("320 samples a frame", group="Audio")
def hop_of_320(demo: Demo) -> Figure:
    """EnCodec's best known model has 320 samples a frame; MusicGen's has 640. Then 5 s are taken to be 500 frames, and
    windows are twice as long as they should be. transformers extends the positions without a word, and the model reads
    past what it was trained on. Bits per second come out doubled as well.
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
    """A file is read and passed on. The encoder takes any array, and hears 44.1 kHz as 32 kHz: slower and lower. The
    processor checks a rate only if it is told one. Files that are at 32 kHz already come out right, which hides it.
    """
    # right: waves = demo.read(sample_rate_hz=32_000)
    waves = demo.read(sample_rate_hz=None)  # the mistake
    return figure(demo.right_nll(demo.cut(waves, texts=demo.texts)))


@mistake("audio at 22,050 Hz", group="Audio")
def librosa_rate(demo: Demo) -> Figure:
    """`librosa.load` resamples to 22,050 Hz unless told otherwise. The model hears everything faster and higher."""
    # right: waves = demo.read(sample_rate_hz=32_000)
    waves = demo.read(sample_rate_hz=22_050)  # the mistake
    return figure(demo.right_nll(demo.cut(waves, texts=demo.texts)))


@mistake("mean of the windows' perplexities", group="Sums and averages")
def mean_of_windows(demo: Demo) -> Figure:
    """One window at a time, a perplexity each, and their mean at the end. The exponential makes the hard windows weigh
    more than the easy ones, which lifts the mean.
    """
    ce = torch.stack([nll.double().mean() for nll in demo.nll])
    # right: ppl = torch.cat(demo.nll, dim=1).mean().exp()
    ppl = torch.stack([nll.mean().exp() for nll in demo.nll]).mean()  # the mistake
    return Figure(ce=ce.mean().item(), ppl=ppl.item())


@mistake(f"mean of the batches' perplexities, {BATCH_SIZE} windows each", group="Sums and averages")
def mean_of_batches(demo: Demo) -> Figure:
    """The same in batches, as training loops log it. The figure now depends on the batch size and on the order of the
    files, and the last batch counts as much as a full one.
    """
    starts = range(0, len(demo.nll), BATCH_SIZE)
    batches = [torch.cat(demo.nll[first : first + BATCH_SIZE], dim=1) for first in starts]
    ce = torch.stack([nll.double().mean() for nll in batches])
    # right: ppl = torch.cat(batches, dim=1).mean().exp()
    ppl = torch.stack([nll.mean().exp() for nll in batches]).mean()  # the mistake
    return Figure(ce=ce.mean().item(), ppl=ppl.item())


@mistake("mean of the codebooks' perplexities", group="Sums and averages")
def mean_of_codebooks(demo: Demo) -> Figure:
    """Each codebook has its perplexity, and four numbers ask for a mean. The definition takes the mean of the cross
    entropies and the exponential once; here the hardest codebook decides.
    """
    ce = torch.cat(demo.nll, dim=1).double().mean(1)
    # right: ppl = ce.mean().exp()
    ppl = ce.exp().mean()  # the mistake
    return Figure(ce=ce.mean().item(), ppl=ppl.item())


@mistake("softmax, then log, in fp16", group="Sums and averages")
def softmax_in_fp16(demo: Demo) -> Figure:
    """A model in half precision gives logits in half precision, and torchmetrics' `Perplexity` stays in it: softmax first,
    the log after. fp16 knows no probability below 6e-8, so a single code that surprises the model by 17 nats costs
    infinitely much.
    """
    metric = Perplexity()
    for logits, codes in scored_logits(demo):
        # right: metric.update(logits.float(), codes)
        metric.update(logits.half(), codes)  # the mistake
    return what_it_says(metric)


@mistake("softmax, then log, in bf16", group="Sums and averages")
def softmax_in_bf16(demo: Demo) -> Figure:
    """bf16 has the range, and 8 bits: each log and the sum of each update are rounded by up to 0.2%. That is little at
    1 nat a code, and 1% of a perplexity at 6.
    """
    metric = Perplexity()
    for logits, codes in scored_logits(demo):
        # right: metric.update(logits.float(), codes)
        metric.update(logits.bfloat16(), codes)  # the mistake
    return what_it_says(metric)


@mistake("sums kept in bf16", group="Sums and averages")
def sums_in_bf16(demo: Demo) -> Figure:
    """A metric is part of its Lightning module, and `precision: bf16-true` converts the whole module, the metric's sums
    with it. A sum of 8 bits takes in small numbers roughly, and in the end not at all: the more music, the worse.
    """
    metric = Perplexity()
    module = torch.nn.ModuleDict({"perplexity": metric})
    module.to(torch.bfloat16)  # the mistake
    for logits, codes in scored_logits(demo):
        metric.update(logits, codes)
    return what_it_says(metric)


@mistake(f"the sampler's duplicates counted, {NUM_DEVICES} devices", group="Sums and averages")
def padded_sampler(demo: Demo) -> Figure:
    """`DistributedSampler` repeats the first windows until every device has as many as the others; Lightning's `test`
    puts it in unasked. The figure depends on the number of devices, and moves to wherever the first windows are.
    """
    ranks: list[DistributedSampler[Tensor]] = [
        DistributedSampler(demo.nll, num_replicas=NUM_DEVICES, rank=rank, shuffle=False) for rank in range(NUM_DEVICES)
    ]
    # right: return figure(demo.nll)
    return figure([demo.nll[row] for rank in ranks for row in rank])  # the mistake


@torch.inference_mode()
def scored_logits(demo: Demo) -> list[tuple[Tensor, Tensor]]:
    """(K, target, V) logits and (K, target) codes of each of the demo's windows."""
    found = []
    for piece in demo.pieces:
        logits = read(demo.model, demo.processor, delayed(demo.model, piece.codes), piece.text)
        aligned = realigned(logits, piece.codes.shape[1])
        found.append((aligned[:, piece.context_frames :], piece.codes[:, piece.context_frames :]))
    return found


def what_it_says(metric: Perplexity) -> Figure:
    """The figure of a torchmetrics `Perplexity`."""
    ppl = metric.compute().double()
    return Figure(ce=ppl.log().item(), ppl=ppl.item())
