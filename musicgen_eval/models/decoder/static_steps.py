"""Draws codes on an accelerator, step by step, with kernels, shapes and addresses that do not depend on the step number.

    step t:  feed column t -> write keys and values at `starts + t` -> hidden states -> logits -> draw column t + 1

All values that change between steps are stored in tensors at fixed addresses. These values are the step number, the positions, the
keys and values, the columns, and the uniform numbers. Therefore, a step can be captured as a CUDA graph and replayed. Attention
reads the cache up to a multiple of `BUCKET` keys, so there is one graph per bucket. Marks hide keys that have not been written (see
`fused_decoder.py`). The first step of a bucket runs eagerly to warm up the kernels, and is captured afterwards.

If a capture fails, a warning is issued, and all further steps run eagerly with the same kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from musicgen_eval.models.decoder.fused_decoder import HIDDEN, FusedDecoder, FusedLayer, TextKeys
from musicgen_eval.models.decoder.sampling import Sampling
from musicgen_eval.models.decoder.window_draw import WindowDraw, guided
from musicgen_eval.models.torch_internals import compiled_for_sizes
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import StepKernels

BUCKET = 256
"""Number of keys per bucket. The number of keys that attention reads is a multiple of this number."""
MAX_COMPILED = 1 << 16
"""Maximum number of combinations of sizes and buckets that a process compiles."""
MIN_REPLAYS = 8
"""Minimum number of remaining steps in a bucket for which a capture saves time."""
STEPS_AT_ONCE = 1 << 15
"""Maximum number of prompt steps per pass, over all rows. A smaller number reduces memory use."""


@dataclass(frozen=True)
class StepSizes:
    """The sizes and settings that determine the addresses, shapes and kernels of a step.

    Attributes:
        num_rows: Number of rows, B.
        num_texts: Number of rows with a text.
        text_length: Number of keys per text, including padding.
        num_steps: Maximum number of steps of a row, including its prompt. It is a multiple of `BUCKET`, so that batches of similar
            length can use the same cache and graphs.
        guidance_scale: Scale of classifier-free guidance. 1 means no guidance.
        sampling: Sampling settings.
        kernels: Execution mode of the steps: `graph`, `compiled` or `eager`.
    """

    num_rows: int
    num_texts: int
    text_length: int
    num_steps: int
    guidance_scale: float
    sampling: Sampling
    kernels: StepKernels


def static_steps(decoder: FusedDecoder, sizes: StepSizes) -> StaticSteps:
    """Returns the static steps for a batch.

    If the sizes are the same as in the last batch, the steps and graphs of the last batch are reused.
    """
    if decoder.last_steps is None or decoder.last_steps.sizes != sizes:
        decoder.last_steps = None  # frees the memory of the old cache before the new one is allocated
        decoder.last_steps = StaticSteps(decoder, sizes)
    steps: StaticSteps = decoder.last_steps
    return steps


def rounded_up(num_keys: int) -> int:
    """Rounds a number of keys up to a multiple of `BUCKET`."""
    return -(-num_keys // BUCKET) * BUCKET


class CudaGraph:
    """A captured sequence of kernels.

    Args:
        device: Device of the tensors.
        pool: Memory pool. Graphs can share a pool if they are not replayed at the same time.
        stream: Stream for capturing. All graphs that share a pool use the same stream.
    """

    def __init__(self, device: torch.device, pool: Any, stream: Any) -> None:
        self._device, self._pool, self._stream = device, pool, stream
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], None]) -> None:
        """Records the kernels that the function launches, without running them.

        Raises:
            RuntimeError: If the function synchronises with the device, or calls an operator that cannot be captured.
        """
        before = torch.cuda.current_stream(self._device)
        try:
            # "thread_local" restricts only this thread. Other threads may still pin memory for the next batch.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                function()
        except BaseException:
            torch.cuda.set_stream(before)  # torch stays on the capture's stream if a capture fails
            raise

    def replay(self) -> None:
        """Runs the captured kernels again on the same tensors."""
        self._graph.replay()


class StaticSteps:
    """Draws codes step by step, using tensors that are created once and filled for each window.

    Args:
        decoder: The decoder.
        sizes: Sizes and settings of a step.
    """

    def __init__(self, decoder: FusedDecoder, sizes: StepSizes) -> None:
        self.decoder, self.sizes = decoder, sizes
        B, K = sizes.num_rows, decoder.num_codebooks
        R = B + (sizes.num_texts if sizes.guidance_scale != 1 else 0)
        S = sizes.num_steps
        H, w = decoder.num_heads, decoder.marked_width
        self.num_rows, self.num_steps = R, S

        def zeros(*shape: int, dtype: torch.dtype = decoder.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=decoder.device)

        self._cache = zeros(len(decoder.layers), 2, R, H, S, w)  # keys and values
        self._qkv = zeros(R, 3, H, w)
        self._qkv[:, 0, :, decoder.head_width :] = 1.0
        texts = [zeros(2, sizes.num_texts, H, sizes.text_length, w) for _ in decoder.layers] if sizes.num_texts else []
        self._texts = TextKeys([keys for keys, _ in texts], [values for _, values in texts]) if texts else None
        self._positions = decoder.positions(S)
        self._rows = torch.arange(R, device=decoder.device)
        self._step = zeros(1, dtype=torch.int64)
        self._starts = zeros(R, dtype=torch.int64)
        self._columns = zeros(B, K, S, dtype=torch.int64)
        self._is_drawn = zeros(B, K, S, dtype=torch.bool)
        self._numbers = None if sizes.sampling.temperature == 0 else zeros(B, K, S, dtype=torch.float32)
        self._hidden = zeros(R, decoder.width, dtype=torch.float32)
        # An unbound function, because a bound method would create a reference cycle, which would keep the cache in memory until
        # Python's garbage collector runs.
        self._run_step: Callable[[StaticSteps, int], None] = StaticSteps._step_eagerly
        if sizes.kernels == "compiled":
            self._run_step = compiled_for_sizes(StaticSteps._step_eagerly, max_compiled=MAX_COMPILED)
        self._captures = sizes.kernels != "eager" and decoder.device.type == "cuda"
        self._graphs: dict[int, CudaGraph] = {}
        self._pool: Any = None
        self._stream: Any = None

    def draw(self, window: WindowDraw, texts: TextKeys | None) -> Tensor:
        """Reads the prompts of a window and draws the window's codes.

        Args:
            window: The window.
            texts: Keys and values of the rows with a text.

        Returns:
            (B, K, C) int64 columns that contain the drawn codes. The next call overwrites these columns.
        """
        with torch.autocast(self.decoder.device.type, enabled=False):
            self._fill(window, texts)
            self._read_prompts(window, texts)
            self._draw_column()
            longest, last = max(window.starts), window.columns.shape[2] - 1
            for number in range(1, last + 1):
                num_keys = min(rounded_up(longest + number), self.num_steps)
                self._advance(num_keys, num_left=min(last, num_keys - longest) - number)
        return self._columns[:, :, : last + 1]

    def failed_rows(self) -> list[int]:
        """Returns the indices of the rows whose last hidden states are not finite.

        Checking the last step is sufficient, because a NaN, once it occurs, persists in the keys and values of its row.
        """
        finite: list[bool] = self._hidden.isfinite().all(1).tolist()
        return sorted({row % self.sizes.num_rows for row, is_finite in enumerate(finite) if not is_finite})

    def _fill(self, window: WindowDraw, texts: TextKeys | None) -> None:
        """Copies a window into the existing tensors."""
        self._cache.zero_()  # a NaN of an earlier batch would propagate even with a weight of zero
        twins = self.num_rows - self.sizes.num_rows
        device, C = self.decoder.device, window.columns.shape[2]
        self._step.zero_()
        self._starts.copy_(upload(torch.tensor([*window.starts, *window.starts[:twins]]), device))
        self._columns[:, :, :C] = window.columns
        self._is_drawn[:, :, :C] = upload(window.is_drawn, device)
        if self._numbers is not None:
            assert window.numbers is not None
            self._numbers[:, :, :C] = window.numbers
        if self._texts is not None:
            assert texts is not None
            for kept, given in zip((*self._texts.keys, *self._texts.values), (*texts.keys, *texts.values), strict=True):
                kept.copy_(given)

    def _read_prompts(self, window: WindowDraw, texts: TextKeys | None) -> None:
        """Computes the keys and values of the prompts, and the hidden state after the last step of each prompt."""
        decoder, S = self.decoder, window.prompts.shape[2]
        rows_at_once = max(1, STEPS_AT_ONCE // S)
        num_texts = self.sizes.num_texts
        order = [*range(len(window.starts)), *range(self.num_rows - len(window.starts))]
        # Rows with a text and rows without a text are read in separate passes.
        for first, last in ((0, num_texts), (num_texts, self.num_rows)):
            for a in range(first, last, rows_at_once):
                b = min(a + rows_at_once, last)

                def keep(layer: int, keys: Tensor, values: Tensor, a: int = a, b: int = b) -> None:
                    cache = self._cache[layer, :, a:b, :, :S, : decoder.head_width]
                    cache[0], cache[1] = keys, values

                own = texts.rows(a, b) if texts is not None and last == num_texts else None
                prompts = torch.stack([window.prompts[row] for row in order[a:b]])
                hidden = decoder.hidden_states(prompts, own, keep=keep)
                self._hidden[a:b] = hidden[torch.arange(b - a, device=hidden.device), self._starts[a:b] - 1]
        is_written = torch.arange(self.num_steps, device=decoder.device) < self._starts[:, None]
        marks = self._cache[:, 0, :, :, :, decoder.head_width]
        marks.masked_fill_(~is_written[None, :, None, :], HIDDEN)

    def _advance(self, num_keys: int, *, num_left: int) -> None:
        """Runs one step, by replaying a graph if one exists.

        Args:
            num_keys: Number of keys that attention reads.
            num_left: Number of further steps that will read the same number of keys.
        """
        graph = self._graphs.get(num_keys)
        if graph is not None:
            graph.replay()
            return
        self._run_step(self, num_keys)
        if self._captures and self.decoder.may_capture and num_left >= MIN_REPLAYS:
            self._capture(num_keys)

    def _capture(self, num_keys: int) -> None:
        try:
            if self._stream is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.decoder.device)
            graph = CudaGraph(self.decoder.device, self._pool, self._stream)
            graph.capture(lambda: self._run_step(self, num_keys))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.decoder.may_capture = False
            reason = str(error.__context__ or error).strip().splitlines()[0]
            warnings.warn(f"decoding runs without CUDA graphs, which is slower: {reason}", stacklevel=2)
        else:
            self._graphs[num_keys] = graph

    def _step_eagerly(self, num_keys: int) -> None:
        """Feeds column `step`, increments `step`, and draws the next column."""
        decoder = self.decoder
        ids = self._columns.gather(2, self._step.expand(*self._columns.shape[:2], 1)).squeeze(2)
        ids = torch.cat([ids, ids[: self.num_rows - self.sizes.num_rows]])
        at = (self._starts + self._step).clamp(max=self.num_steps - 1)
        x = decoder.embed(ids) + self._positions.index_select(0, at)
        for number, layer in enumerate(decoder.layers):
            x = self._attend(x, layer, self._cache[number], at, num_keys)
            if self._texts is not None:
                own = x[: self.sizes.num_texts].unsqueeze(1)
                decoder.add_cross_attention(own, layer, self._texts.keys[number], self._texts.values[number])
            x = layer.feed_forward(x)
        self._hidden.copy_(decoder.final_norm(x))
        self._step.add_(1)
        self._draw_column()

    def _attend(self, x: Tensor, layer: FusedLayer, cache: Tensor, at: Tensor, num_keys: int) -> Tensor:
        """Writes this step's keys and values to the (2, R, H, S, w) cache, and returns x (R, D) plus the self attention of x."""
        R, _, H, _ = self._qkv.shape
        d = self.decoder.head_width
        self._qkv[..., :d].copy_(functional.linear(layer.self_norm(x), layer.qkv).view(R, 3, H, d))
        cache[:, self._rows, :, at] = self._qkv[:, 1:]
        mixed = functional.scaled_dot_product_attention(
            self._qkv[:, 0].unsqueeze(2), cache[0, :, :, :num_keys], cache[1, :, :, :num_keys], scale=self.decoder.scale
        )
        return x + functional.linear(mixed[:, :, 0, :d].flatten(1), layer.out)

    def _draw_column(self) -> None:
        """Draws column `step` from the hidden states."""
        logits = guided(self.decoder.logits(self._hidden), self.sizes.num_rows, self.sizes.guidance_scale)
        at = self._step.expand(*self._columns.shape[:2], 1)
        numbers = None if self._numbers is None else self._numbers.gather(2, at).squeeze(2)
        drawn = self.sizes.sampling.draw(logits, numbers).unsqueeze(2)
        self._columns.scatter_(2, at, torch.where(self._is_drawn.gather(2, at), drawn, self._columns.gather(2, at)))
