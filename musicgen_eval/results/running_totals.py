"""Running totals of one process. They are intended for progress displays only, and do not affect the results of the run."""

from collections.abc import Sequence

from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.metrics.plugin.inputs import WindowData
from musicgen_eval.metrics.plugin.states import State, compute_from
from musicgen_eval.records import CodecSpec


class RunningTotals:
    """Running totals of the windows that this process has measured: tracks, seconds of audio and perplexity.

    Args:
        spec: Codec specification of the checkpoint.

    Attributes:
        tracks: Plan rows of the tracks that have at least one measured window.
        scored_seconds: Length of the scored audio, in seconds. In `predict`, the length of the generated audio.
    """

    def __init__(self, spec: CodecSpec) -> None:
        self.tracks: set[int] = set()
        self.scored_seconds = 0.0
        self._perplexity = CodebookPerplexity(spec.num_codebooks, spec.frame_rate_hz)

    @property
    def ppl(self) -> float:
        """Perplexity over all windows added so far, or NaN before the first window."""
        state: State = {"total": self._perplexity.total, "count": self._perplexity.count}
        return compute_from(self._perplexity, state)["ppl"]

    def add(self, track_rows: Sequence[int], window_data: Sequence[WindowData]) -> None:
        """Adds the windows of a batch.

        Args:
            track_rows: Plan row of each window's track.
            window_data: Data of each window.
        """
        for row, data in zip(track_rows, window_data, strict=True):
            plain = data.on_cpu.readings[""]
            assert plain is not None  # the plain reading always exists
            self._perplexity.update(plain.nll)
            self.tracks.add(row)
            self.scored_seconds += plain.window.target_frames / data.frame_rate_hz
