"""Draws codes on a CPU, step by step. `inference/continuation.py` applies the delays and determines the sequence of windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import MusicgenForCausalLM

from musicgen_eval.models.decoder.packing import is_packed
from musicgen_eval.models.decoder.sampling import Sampling
from musicgen_eval.models.decoder.step_decoder import StepDecoder
from musicgen_eval.models.decoder.window_draw import WindowDraw, guided
from musicgen_eval.models.threads import map_single_threaded, torch_threads


class CpuSteps:
    """Draws the codes of one batch, window by window.

    Args:
        decoder: A transformers `MusicgenForCausalLM` on a CPU, plain or packed.
        texts: (L_i, D) text states of the first rows. The other rows have the null condition (no text).
        num_rows: Number of rows, B.
        num_steps: Number of steps in the longest row, including its prompt.
        guidance_scale: Scale of classifier-free guidance. 1 means no guidance.
        sampling: Sampling settings.
    """

    def __init__(
        self,
        decoder: MusicgenForCausalLM,
        texts: Sequence[Tensor],
        *,
        num_rows: int,
        num_steps: int,
        guidance_scale: float,
        sampling: Sampling,
    ) -> None:
        self.num_rows, self.guidance_scale, self.sampling = num_rows, guidance_scale, sampling
        self._autocast = torch.is_autocast_enabled("cpu") and not is_packed(decoder)
        with self._precision():
            self._steps = StepDecoder(
                decoder,
                num_rows=num_rows + (len(texts) if guidance_scale != 1 else 0),
                num_steps=num_steps,
                text_states=texts,
            )

    def draw(self, window: WindowDraw) -> tuple[Tensor, list[int]]:
        """Reads the prompts of a window and draws the window's codes.

        Returns:
            (B, K, C) int64 columns that contain the drawn codes, and the indices of the rows whose hidden states are not finite.
        """
        with self._precision():
            self._read_prompts(window)
            columns, hidden = self._draw_columns(window)
        # A NaN, once it occurs, persists in the keys and values of its row, so checking the last hidden states is sufficient.
        finite = hidden.isfinite().all(1).tolist()
        return columns, sorted({self._row(twin) for twin, is_finite in enumerate(finite) if not is_finite})

    def _read_prompts(self, window: WindowDraw) -> None:
        steps, row_of = self._steps, [self._row(twin) for twin in range(self._steps.num_rows)]
        steps.begin([window.starts[row] for row in row_of])

        def read(twin: int) -> None:
            steps.read(twin, window.prompts[row_of[twin], :, : window.starts[row_of[twin]]])

        to_read = [twin for twin, row in enumerate(row_of) if not window.is_idle[row]]
        if len(to_read) > 1:
            map_single_threaded(read, to_read)
        else:
            for twin in to_read:
                read(twin)

    def _draw_columns(self, window: WindowDraw) -> tuple[Tensor, Tensor]:
        steps, B, columns = self._steps, self.num_rows, window.columns
        hidden = steps.last_read
        with torch_threads(steps.suitable_threads):
            for number in range(columns.shape[2]):
                if number:
                    ids = columns[:, :, number - 1]
                    hidden = steps.step(torch.cat([ids, ids[: steps.num_rows - B]]), number - 1)
                logits = guided(steps.logits(hidden), B, self.guidance_scale)
                drawn = self.sampling.draw(logits, None if window.numbers is None else window.numbers[:, :, number])
                columns[:, :, number] = torch.where(window.is_drawn[:, :, number], drawn, columns[:, :, number])
        return columns, hidden

    def _row(self, twin: int) -> int:
        """Returns the batch row that a decoder row belongs to. Guidance adds a second decoder row for each row with a text."""
        return twin % self.num_rows

    def _precision(self) -> torch.autocast:
        """Returns the autocast context for running the decoder.

        A plain decoder uses the caller's autocast settings. For a packed decoder, autocast is disabled, because the weights
        determine the precision.
        """
        return torch.autocast("cpu", dtype=torch.get_autocast_dtype("cpu"), enabled=self._autocast)
