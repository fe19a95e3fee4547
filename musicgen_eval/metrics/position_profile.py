"""A metric for the perplexity at each position in a window, including positions beyond the checkpoint's limit.

A position is the number of frames from the start of the window, as in the decoder's position table.
"""

from typing import Any

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.codebook_means import CodebookMeans, sums_and_counts
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.records import CodecSpec, Window


class PositionProfile(CodebookMeans):
    """Cross entropy and perplexity for each time bin of a window, and perplexity within and beyond the checkpoint's limit.

        0 s        1 s        2 s             limit           end_s
        |- ce_0s --|- ce_1s --|- ...            |                |
        |-------------- ppl_within -------------|-- ppl_beyond --|

    Results: `ce_<start>s` (in nats) and `ppl_<start>s` = exp(`ce_<start>s`) for each bin, where `<start>` is the start of the bin
    in seconds. Each `ce` is the mean of the codebooks' mean nlls. `ppl_within` covers the positions within the checkpoint's limit,
    and `ppl_beyond` covers all other positions. If a codebook has no scored codes in a bin, the values for this bin are NaN.

    Args:
        bin_s: Length of each bin, in seconds. The length must be a whole number of frames.
        end_s: End of the last bin, in seconds. The end must be a multiple of `bin_s`. Later codes are counted only in `ppl_within`
            and `ppl_beyond`.
        max_frames: Limit of the checkpoint, in frames. In a run, `configure` sets this argument to the checkpoint's limit.
        num_codebooks, frame_rate_hz: See `CodebookMeans`.

    >>> import torch
    >>> metric = PositionProfile(end_s=2, max_frames=50, num_codebooks=1)
    >>> metric.update(torch.full((1, 100), 8.0).log(), Window("song", 0, 0, 0, 100))
    >>> round(metric.compute()["ppl_1s"].item(), 4), round(metric.compute()["ppl_within"].item(), 4)
    (8.0, 8.0)

    Source: the definition of `CodebookPerplexity`, applied to each bin.
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
        """Sets the number of codebooks, the frame rate and the limit to those of the checkpoint, and resets the states."""
        self.max_frames = spec.max_frames
        super().configure(spec)

    def _set_up(self, num_codebooks: int, frame_rate_hz: float) -> None:
        """Creates the states, with one column per bin, one for positions within the limit, and one for positions beyond it."""
        if not (0 < self.bin_s < float("inf") and 0 < self.end_s < float("inf")):
            raise MetricError(
                f"PositionProfile: bin_s and end_s must be above 0 and finite, got {self.bin_s} and {self.end_s}"
            )
        bin_frames, num_bins = self.bin_s * frame_rate_hz, self.end_s / self.bin_s
        if round(bin_frames) < 1 or abs(bin_frames - round(bin_frames)) > 1e-6:
            raise MetricError(
                f"PositionProfile: bin_s={self.bin_s} s is {bin_frames:g} frames at {frame_rate_hz:g} Hz; "
                f"set bin_s to a multiple of {1 / frame_rate_hz:g} s"
            )
        if round(num_bins) < 1 or abs(num_bins - round(num_bins)) > 1e-6:
            raise MetricError(
                f"PositionProfile: end_s={self.end_s} s is {num_bins:g} bins of bin_s={self.bin_s} s; set end_s to a multiple of "
                "bin_s"
            )
        self.bin_frames, self.num_bins = round(bin_frames), round(num_bins)
        self.num_codebooks, self.frame_rate_hz = num_codebooks, frame_rate_hz
        shape = (num_codebooks, self.num_bins + 2)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        settings: dict[str, Any] = {"bin_s": self.bin_s, "end_s": self.end_s, "max_frames": self.max_frames}
        return MetricRecipe(
            units=dict.fromkeys(self._bin_names("ce"), "nats"),
            higher_is_better=False,
            source="mean over codebooks of mean nll, by position from the window's first frame",
            settings=settings,
        )

    def update(self, nll: Tensor, window: Window) -> None:
        """Adds the (K, T) nlls of a whole window, including its context, in nats. NaN values are not counted.

        Raises:
            MetricError: If K is not the number of codebooks, or T is not the number of frames in the window.
        """
        if nll.shape != (self.num_codebooks, window.num_frames):
            raise MetricError(
                f"PositionProfile: nll has shape {tuple(nll.shape)}, expected ({self.num_codebooks}, {window.num_frames}), "
                "the numbers of codebooks and of frames of the window"
            )
        missing = self.bin_frames * self.num_bins - window.num_frames  # negative: the window is longer than the profile
        profile = torch.nn.functional.pad(nll, (0, missing), value=float("nan"))
        bins = profile.unflatten(1, (self.num_bins, self.bin_frames))
        parts = (bins, nll[:, None, : self.max_frames], nll[:, None, self.max_frames :])
        sums, counts = zip(*(sums_and_counts(part) for part in parts), strict=True)
        self.total = self.total + torch.cat(sums, dim=1)
        self.count = self.count + torch.cat(counts, dim=1)

    def compute(self) -> dict[str, Tensor]:
        """Returns the results as float64 tensors."""
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
