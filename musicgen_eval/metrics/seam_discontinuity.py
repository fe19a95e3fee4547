"""How audible the joint of a continuation is: what happens to the spectrum there, against what happens around it.

Knows two pieces of audio that follow each other; not where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.plugin.contract import MetricRecipe

HOP_S = 0.008
FRAME_HOPS = 4  # a spectrum's window: 32 ms
SPAN_S = 1.0  # how much is averaged on either side of a place, for `change`
AROUND_S = 3.0  # how much is heard on either side of the joint
MIN_HOPS = 3 * FRAME_HOPS  # room for a few places on either side: 96 ms
COMPRESSION = 100.0  # what lies 40 dB below the mean magnitude still counts
FLOOR = 0.01  # nats; less change than this cannot be told from none


class SeamDiscontinuity(Metric):
    """How much more the sound changes at the joint than around it, as two ratios; 1: as anywhere in the same music.

    Results, geometric means over continuations, because a ratio of 4 and one of 1/4 are equally far from 1:
    `flux`, over a few milliseconds (clicks, hard cuts), and `change`, of the second before to the second after (another
    sound, another song). A continuation with less than 0.1 s on either side contributes nothing.

    A joint at a random place of an unbroken recording has 1 in the mean, beats or none, and scatters widely around it
    (a factor of 2 and more); a figure needs many continuations, and stands beside that of the true ones.

    >>> import torch
    >>> times = torch.arange(32000, dtype=torch.float64) / 32000
    >>> low, high = (torch.sin(2 * torch.pi * pitch * times).unsqueeze(0) for pitch in (500, 750))
    >>> unbroken, cut = SeamDiscontinuity(), SeamDiscontinuity()
    >>> unbroken.update(low, low, 32000)  # four periods a hop: nothing happens anywhere
    >>> cut.update(low, high, 32000)
    >>> [(name, round(unbroken.compute()[name].item(), 2), bool(cut.compute()[name] > 10)) for name in ("flux", "change")]
    [('flux', 1.0, True), ('change', 1.0, True)]

    Source: spectral flux (Dixon, Onset detection revisited, 2006), here with falls counted as well as rises, and novelty
    between two spans (Foote, Automatic audio segmentation, 2000); to take them relative to other places is ours.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")  # of log ratios
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def recipe(self) -> MetricRecipe:
        """Units, direction, source and settings."""
        return MetricRecipe(
            units={"flux": "ratio", "change": "ratio"},
            higher_is_better=False,
            source="spectral flux (Dixon 2006) and novelty (Foote 2000) at the joint, relative to other places within 3 s",
            settings={
                "hop_s": HOP_S,
                "frame_s": FRAME_HOPS * HOP_S,
                "span_s": SPAN_S,
                "around_s": AROUND_S,
                "compression": COMPRESSION,
                "floor": FLOOR,
            },
        )

    def update(self, context_decoded: Tensor, generated: Tensor, sample_rate_hz: int) -> None:
        """Adds one continuation: (C, N) audio before the joint and after it."""
        ratios = seam_discontinuity(context_decoded, generated, sample_rate_hz=sample_rate_hz)
        if ratios.isnan().any():
            return
        self.total = self.total + ratios.log().to(self.total.device)
        self.count = self.count + 1

    def compute(self) -> dict[str, Tensor]:
        """`flux` and `change`, float64; NaN where nothing was long enough."""
        flux, change = (self.total / self.count).exp()
        return {"flux": flux, "change": change}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Moves the states and keeps their dtypes, as `CodebookMeans` does."""
        device = fn(torch.empty(0, device=self.total.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)


def seam_discontinuity(before: Tensor, after: Tensor, *, sample_rate_hz: int) -> Tensor:
    """Flux and change at a joint, each relative to the geometric mean of the same measure at places around it.

        before ...----+----+----|----+----+----... after          one mark a hop, | the joint
                           [ frame ]                              a spectrum: 4 hops, the first one from a mark
        flux              <-------->                             largest step between neighbours of which one spans the mark
        change   [-- span --]  [-- span --]                       distance of the spans' mean spectra

    Spectra are log(1 + 100 |X| / mean |X|), the mean over all that is heard, so that gain does not matter; distances are
    root mean squares over frequencies and channels. Places are all marks whose measure lies wholly before or wholly after
    the joint, up to 3 s away. Spans are 1 s, or a third of the shorter side. A floor of 0.01 nats is added to each measure,
    so silence has the ratio 1. Because logarithms are averaged, the log ratio at a random place has mean 0.

    Args:
        before: (C, N) floating point, ends at the joint.
        after: (C, N) floating point, begins there.
        sample_rate_hz: of both.

    Returns:
        (2,) float64, the ratios of flux and change; NaN where either side is shorter than 96 ms.

    Raises:
        MetricError: other shapes, or audio that is not finite.
    """
    _check(before, after)
    hop = max(1, round(HOP_S * sample_rate_hz))
    most = int(AROUND_S * sample_rate_hz) // hop
    num_before, num_after = (min(most, side.shape[-1] // hop) for side in (before, after))
    if min(num_before, num_after) < MIN_HOPS:
        return torch.full((2,), float("nan"), dtype=torch.float64)
    audio = torch.cat([before[:, before.shape[-1] - num_before * hop :], after[:, : num_after * hop]], dim=1)
    spectra = _log_spectra(audio, hop)
    span_hops = min(round(SPAN_S / HOP_S), num_before // 3, num_after // 3)
    return torch.stack(
        [
            _ratio(_flux(spectra), num_before, reach_hops=FRAME_HOPS),
            _ratio(_change(spectra, span_hops), num_before, reach_hops=span_hops),
        ]
    )


def _log_spectra(audio: Tensor, hop: int) -> Tensor:
    """(C, N) audio to (frames, C x frequencies) float64; frame i begins at mark i."""
    window = torch.hann_window(FRAME_HOPS * hop, dtype=torch.float64, device=audio.device)
    spectra = torch.stft(
        audio.double(), n_fft=len(window), hop_length=hop, window=window, center=False, return_complex=True
    ).abs()
    mean = spectra.mean()
    relative = spectra / mean if mean > 0 else spectra
    return torch.log1p(COMPRESSION * relative).permute(2, 0, 1).flatten(1)


def _flux(spectra: Tensor) -> Tensor:
    """The measure at each mark from FRAME_HOPS on: the largest step between neighbours of which one spans the mark."""
    steps = _distance(spectra[1:], spectra[:-1])
    return steps.unfold(0, FRAME_HOPS, 1).amax(-1)


def _change(spectra: Tensor, span_hops: int) -> Tensor:
    """The measure at each mark from `span_hops` on: the distance of the mean spectra of the spans before and after it."""
    num_frames = span_hops - FRAME_HOPS + 1  # that lie wholly in a span
    sums = torch.nn.functional.pad(spectra.cumsum(0), (0, 0, 1, 0))
    means = (sums[num_frames:] - sums[:-num_frames]) / num_frames  # row i: of the span that begins at mark i
    return _distance(means[span_hops:], means[:-span_hops])


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(-1).sqrt()


def _ratio(measure: Tensor, joint: int, *, reach_hops: int) -> Tensor:
    """The measure at the joint over its geometric mean at marks whose measure does not reach across the joint.

    Args:
        measure: from mark `reach_hops` on.
        joint: the mark of the joint.
        reach_hops: how far to either side a measure looks.
    """
    logs = (measure + FLOOR).log()
    at = joint - reach_hops
    elsewhere = torch.cat([logs[: at - reach_hops + 1], logs[at + reach_hops :]])
    return (logs[at] - elsewhere.mean()).exp()


def _check(before: Tensor, after: Tensor) -> None:
    if before.dim() != 2 or after.dim() != 2 or before.shape[0] != after.shape[0]:
        raise MetricError(
            f"seam: expected (C, N) audio before and after the joint with the same channels, got {tuple(before.shape)} "
            f"and {tuple(after.shape)}"
        )
    for name, side in (("before", before), ("after", after)):
        if not side.isfinite().all():
            raise MetricError(f"seam: the audio {name} the joint is not finite; look for what made it NaN or infinite")
