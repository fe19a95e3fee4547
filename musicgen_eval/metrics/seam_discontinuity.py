"""A metric for the spectral discontinuity at the boundary of a continuation, relative to the surrounding music."""

from __future__ import annotations

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.metrics.plugin.metric_internals import DtypeKeepingMetric

HOP_S = 0.008
FRAME_HOPS = 4  # length of a spectrum's window: 32 ms
SPAN_S = 1.0  # length of the audio on each side of a mark that `change` averages
AROUND_S = 3.0  # length of the analysed audio on each side of the boundary
MIN_HOPS = 3 * FRAME_HOPS  # shortest audio on each side of the boundary: 96 ms, which contains a few marks
COMPRESSION = 100.0  # lets components 40 dB below the mean magnitude still contribute
FLOOR = 0.01  # nats; smaller distances cannot be distinguished from silence


class SeamDiscontinuity(DtypeKeepingMetric):
    """Two ratios that compare the spectral change at the boundary of a continuation with the change elsewhere in the same music.

    A ratio of 1 means that the sound changes as much at the boundary as elsewhere. `flux` measures the change over a few
    milliseconds and detects clicks and hard cuts. `change` compares one second of audio before the boundary with one second after
    it, and detects a change to a different sound or song. The results are geometric means over continuations, because ratios of 4
    and 1/4 should count as equally far from 1. A continuation with less than 96 ms of audio before or after the boundary is not
    counted.

    At random places in an uncut recording, the ratios have a geometric mean of 1, whether or not the music has a beat. Individual
    ratios vary by a factor of 2 or more. Therefore, evaluate many continuations, and compare the results with those of the
    reference.

    >>> import torch
    >>> times = torch.arange(32000, dtype=torch.float64) / 32000
    >>> low, high = (torch.sin(2 * torch.pi * pitch * times).unsqueeze(0) for pitch in (500, 750))
    >>> unbroken, cut = SeamDiscontinuity(), SeamDiscontinuity()
    >>> unbroken.update(low, low, 32000)  # four periods per hop: the spectrum is constant
    >>> cut.update(low, high, 32000)
    >>> [(name, round(unbroken.compute()[name].item(), 2), bool(cut.compute()[name] > 10)) for name in ("flux", "change")]
    [('flux', 1.0, True), ('change', 1.0, True)]

    Source: spectral flux (Dixon, Onset detection revisited, 2006), modified to count decreases as well as increases, and novelty
    between two spans (Foote, Automatic audio segmentation, 2000). This package adds the comparison with other places.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")  # sums of log ratios
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        return MetricRecipe(
            units={"flux": "ratio", "change": "ratio"},
            higher_is_better=False,
            source="spectral flux (Dixon 2006) and novelty (Foote 2000) at the boundary, relative to other places within 3 s",
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
        """Adds one continuation, given as the (C, N) audio before the boundary and the (C, N) audio after the boundary."""
        ratios = seam_discontinuity(context_decoded, generated, sample_rate_hz=sample_rate_hz)
        if ratios.isnan().any():
            return
        self.total = self.total + ratios.log().to(self.total.device)
        self.count = self.count + 1

    def compute(self) -> dict[str, Tensor]:
        """Returns `flux` and `change` as float64 tensors. Both are NaN if no continuation was counted."""
        flux, change = (self.total / self.count).exp()
        return {"flux": flux, "change": change}


def seam_discontinuity(before: Tensor, after: Tensor, *, sample_rate_hz: int) -> Tensor:
    """Computes flux and change at a boundary, each divided by the geometric mean of the same measure at other marks.

        before ...----+----+----|----+----+----... after          there is one mark (+) per hop; | is the boundary, also a mark
                           [ frame ]                              a spectrum covers 4 hops and starts at a mark
        flux              <-------->                              largest distance between neighbouring spectra around the mark
        change   [-- span --]  [-- span --]                       distance between the mean spectra of the two spans

    Spectra are log(1 + 100 |X| / mean |X|). The mean covers all analysed audio, so the ratios do not depend on the gain of the
    audio. A distance is the root mean square of the differences over frequencies and channels. The other marks are at most 3 s from
    the boundary. Marks whose measured audio crosses the boundary are excluded. Each span is 1 s long, or a third of the shorter
    side if that is less. A floor of 0.01 nats is added to each measure, so silence has a ratio of 1. Logarithms are averaged, so
    the mean log ratio at a random mark is 0.

    Args:
        before: (C, N) floating-point audio that ends at the boundary.
        after: (C, N) floating-point audio that starts at the boundary.
        sample_rate_hz: Sample rate of `before` and `after`.

    Returns:
        (2,) float64 ratios, first for flux, then for change. Both are NaN if `before` or `after` is shorter than 96 ms.

    Raises:
        MetricError: If the shapes do not match, or if the audio contains NaN or infinite samples.
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
    """Converts (C, N) audio to (frames, C x frequencies) float64 spectra. Frame i starts at mark i."""
    window = torch.hann_window(FRAME_HOPS * hop, dtype=torch.float64, device=audio.device)
    spectra = torch.stft(
        audio.double(), n_fft=len(window), hop_length=hop, window=window, center=False, return_complex=True
    ).abs()
    mean = spectra.mean()
    relative = spectra / mean if mean > 0 else spectra
    return torch.log1p(COMPRESSION * relative).permute(2, 0, 1).flatten(1)


def _flux(spectra: Tensor) -> Tensor:
    """Returns the flux at each mark, starting with mark `FRAME_HOPS`.

    The flux at a mark is the largest distance between two neighbouring spectra, at least one of which spans the mark.
    """
    distances = _distance(spectra[1:], spectra[:-1])
    return distances.unfold(0, FRAME_HOPS, 1).amax(-1)


def _change(spectra: Tensor, span_hops: int) -> Tensor:
    """Returns the change at each mark, starting with mark `span_hops`.

    The change at a mark is the distance between the mean spectra of the spans before and after the mark.
    """
    num_frames = span_hops - FRAME_HOPS + 1  # frames that lie entirely within a span
    sums = torch.nn.functional.pad(spectra.cumsum(0), (0, 0, 1, 0))
    means = (sums[num_frames:] - sums[:-num_frames]) / num_frames  # row i: mean of the span that starts at mark i
    return _distance(means[span_hops:], means[:-span_hops])


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(-1).sqrt()


def _ratio(measure: Tensor, boundary: int, *, reach_hops: int) -> Tensor:
    """Divides the measure at the boundary by the geometric mean of the measure at marks whose audio does not cross the boundary.

    Args:
        measure: Values of the measure, one per mark, starting with mark `reach_hops`.
        boundary: Index of the mark at the boundary.
        reach_hops: Number of hops on each side of a mark. The measure at the mark depends on the audio within this range.
    """
    logs = (measure + FLOOR).log()
    at = boundary - reach_hops
    elsewhere = torch.cat([logs[: at - reach_hops + 1], logs[at + reach_hops :]])
    return (logs[at] - elsewhere.mean()).exp()


def _check(before: Tensor, after: Tensor) -> None:
    if before.dim() != 2 or after.dim() != 2 or before.shape[0] != after.shape[0]:
        raise MetricError(
            f"seam_discontinuity: audio before and after the boundary has shapes {tuple(before.shape)} and "
            f"{tuple(after.shape)}, expected (C, N) with the same number of channels"
        )
    for name, side in (("before", before), ("after", after)):
        if not side.isfinite().all():
            raise MetricError(
                f"seam_discontinuity: the audio {name} the boundary contains NaN or infinite samples; pass finite audio"
            )
