"""Perplexity by position in the window: how it falls as the model hears more, and what happens past the checkpoint's limit.

Knows nll and positions, which are counted in frames from the window's first, as the decoder's position table counts them.
"""

from typing import Any

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.codebook_means import CodebookMeans, sums_and_counts
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.records import CodecSpec, Window


class PositionProfile(CodebookMeans):
    """Cross entropy and perplexity of the codes in each stretch of the window, and on either side of the limit.

        0 s        1 s        2 s             limit           end_s
        |- ce_0s --|- ce_1s --|- ...            |                |
        |-------------- ppl_within -------------|-- ppl_beyond --|

    Results: `ce_<from>s` (nats, mean over codebooks of each codebook's mean) and `ppl_<from>s` = exp of it, by the second
    at which the stretch begins; `ppl_within` and `ppl_beyond`, of the positions below the checkpoint's limit and of those
    from it on. A stretch in which some codebook has no code is NaN.

    Args:
        bin_s: how long a stretch is, a whole number of frames.
        end_s: where the profile ends, a whole number of stretches; codes from here on count for `ppl_within` and
            `ppl_beyond` alone.
        max_frames: the limit, where there is no checkpoint to say it.
        num_codebooks, frame_rate_hz: as `CodebookMeans`.

    >>> import torch
    >>> metric = PositionProfile(end_s=2, max_frames=50, num_codebooks=1)
    >>> metric.update(torch.full((1, 100), 8.0).log(), Window("song", 0, 0, 0, 100))
    >>> round(metric.compute()["ppl_1s"].item(), 4), round(metric.compute()["ppl_within"].item(), 4)
    (8.0, 8.0)

    Source: the definition of `CodebookPerplexity`, stretch by stretch.
    """

    higher_is_better = False

    def __init__(
        self,
        bin_s: float = 1.0,
        end_s: float = 60.0,
        max_frames: int = 1500,
        num_codebooks: int = 4,
        frame_rate_hz: float = 50,
    ) -> None:
        self.bin_s, self.end_s, self.max_frames = bin_s, end_s, max_frames
        super().__init__(num_codebooks, frame_rate_hz)

    def configure(self, spec: CodecSpec) -> None:
        """Takes codebooks, frame rate and limit from the checkpoint."""
        self.max_frames = spec.max_frames
        super().configure(spec)

    def _set_up(self, num_codebooks: int, frame_rate_hz: float) -> None:
        """Lays the stretches: one column of the states each, then one for each side of the limit."""
        if not (0 < self.bin_s < float("inf") and 0 < self.end_s < float("inf")):
            raise MetricError(
                f"PositionProfile: bin_s and end_s must be above 0 and finite, got {self.bin_s} and {self.end_s}"
            )
        bin_frames, num_bins = self.bin_s * frame_rate_hz, self.end_s / self.bin_s
        if round(bin_frames) < 1 or abs(bin_frames - round(bin_frames)) > 1e-6:
            raise MetricError(
                f"PositionProfile: bin_s={self.bin_s} s is {bin_frames:g} frames at {frame_rate_hz:g} Hz; "
                f"choose a multiple of {1 / frame_rate_hz:g} s"
            )
        if round(num_bins) < 1 or abs(num_bins - round(num_bins)) > 1e-6:
            raise MetricError(
                f"PositionProfile: end_s={self.end_s} s is {num_bins:g} stretches of bin_s={self.bin_s} s; choose a multiple"
            )
        self.bin_frames, self.num_bins = round(bin_frames), round(num_bins)
        self.num_codebooks, self.frame_rate_hz = num_codebooks, frame_rate_hz
        shape = (num_codebooks, self.num_bins + 2)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def recipe(self) -> MetricRecipe:
        """Units, direction, source and settings."""
        settings: dict[str, Any] = {"bin_s": self.bin_s, "end_s": self.end_s, "max_frames": self.max_frames}
        return MetricRecipe(
            units=dict.fromkeys(self._bin_names("ce"), "nats"),
            higher_is_better=False,
            source="mean over codebooks of mean nll, by position from the window's first frame",
            settings=settings,
        )

    def update(self, nll: Tensor, window: Window) -> None:
        """Adds one window of (K, T) nats, context included; NaN is not counted."""
        if nll.shape != (self.num_codebooks, window.num_frames):
            raise MetricError(
                f"PositionProfile got values of shape {tuple(nll.shape)}; expected "
                f"({self.num_codebooks}, {window.num_frames}): codebooks and frames of the window"
            )
        missing = self.bin_frames * self.num_bins - window.num_frames  # negative: the window is longer than the profile
        profile = torch.nn.functional.pad(nll, (0, missing), value=float("nan"))
        bins = profile.unflatten(1, (self.num_bins, self.bin_frames))
        parts = (bins, nll[:, None, : self.max_frames], nll[:, None, self.max_frames :])
        sums, counts = zip(*(sums_and_counts(part) for part in parts), strict=True)
        self.total = self.total + torch.cat(sums, dim=1)
        self.count = self.count + torch.cat(counts, dim=1)

    def compute(self) -> dict[str, Tensor]:
        """The results, float64."""
        ce = self.means().mean(0)  # (bins + 2,)
        ppl = ce.exp()
        return {
            "ppl_within": ppl[-2],
            "ppl_beyond": ppl[-1],
            **dict(zip(self._bin_names("ce"), ce[:-2], strict=True)),
            **dict(zip(self._bin_names("ppl"), ppl[:-2], strict=True)),
        }

    def _bin_names(self, name: str) -> list[str]:
        return [f"{name}_{index * self.bin_frames / self.frame_rate_hz:g}s" for index in range(self.num_bins)]
