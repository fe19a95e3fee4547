"""Runs an LSTM over several sequences at once on a CPU. The results are bit-identical to those for each sequence alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from musicgen_eval.models.packed_matrix import PackedMatrix, can_pack

MAX_LANES = 8
"""Maximum number of sequences that an LSTM processes in lockstep."""
LSTM_STEPS = 64
"""Number of steps in each block that an LSTM layer passes to the next layer, which may run in a different thread."""
CACHED_WEIGHTS = 2**18
"""Number of float32 weights that fit into a core's second-level cache."""


class LockstepLstm:
    """An LSTM that processes several sequences in lockstep. The outputs are bit-identical to those for each sequence alone.

    If a step processes only one sequence, most of the time is spent reading the weights (16 MB in Facebook's 32 kHz codec). In
    lockstep, the weights are read once for all sequences. Lockstep requires each row of oneDNN's product to be independent of the
    other rows. The constructor tests this condition. If the weights fit into a core's cache, lockstep has no advantage, and
    `nn.LSTM` processes the sequences one by one.

    Attributes:
        max_lanes: Maximum number of sequences per call.
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        self.plain = lstm
        self.layers: list[tuple[PackedMatrix, PackedMatrix]] = []
        if 4 * lstm.hidden_size**2 <= CACHED_WEIGHTS or not can_pack(torch.float32):
            self.max_lanes = 1
            return
        for k in range(lstm.num_layers):
            by_input, by_hidden, *biases = (
                _sigmoids_first(getattr(lstm, f"{name}_l{k}").detach())
                for name in _LSTM_PARAMETERS[: 4 if lstm.bias else 2]
            )
            bias = biases[0] + biases[1] if biases else None
            self.layers.append((PackedMatrix(by_input, bias), PackedMatrix(by_hidden)))
        self.max_lanes = MAX_LANES if all(_rows_are_independent(by_hidden) for _, by_hidden in self.layers) else 1

    @property
    def num_tasks(self) -> int:
        """Number of tasks that `tasks` returns."""
        return max(1, len(self.layers))

    def __call__(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Processes (T, D) sequences in the calling thread and returns (T, D) outputs. The longest sequence must come first."""
        outputs: list[Tensor] | None = None
        for task in self.tasks(sequences):
            outputs = task()
        assert outputs is not None
        return outputs

    def tasks(self, sequences: Sequence[Tensor]) -> list[Callable[[], list[Tensor] | None]]:
        """Returns one task per layer. The last task returns the (T, D) output of each sequence.

        A layer passes each block of `LSTM_STEPS` steps to the next layer as soon as the block is complete. The tasks may run in
        parallel or one after the other, but must be started in order.
        """
        if not self.layers:
            return [lambda: [self.plain(sequence)[0] for sequence in sequences]]
        blocks: Iterable[_Block] = _blocks(sequences)
        tasks: list[Callable[[], list[Tensor] | None]] = []
        for layer in self.layers[:-1]:
            queue = _BlockQueue()
            tasks.append(partial(queue.fill, _run_layer(*layer, blocks)))
            blocks = queue
        last = _run_layer(*self.layers[-1], blocks)
        return [*tasks, lambda: _joined(last, len(sequences))]


_Block = list[Tensor]
"""A block of steps of several sequences, (n_i, D) each. Sequences that have ended are omitted."""


class _BlockQueue:
    """A queue that passes blocks from one LSTM layer to the next, which may run in a different thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Block | None] = SimpleQueue()

    def fill(self, blocks: Iterable[_Block]) -> None:
        """Adds all blocks to the queue, and then marks the end of the queue.

        The end is also marked if an error occurs. Otherwise, the next layer would wait indefinitely.
        """
        try:
            for block in blocks:
                self._queue.put(block)
        finally:
            self._queue.put(None)

    def __iter__(self) -> Iterator[_Block]:
        return iter(self._queue.get, None)


def _blocks(sequences: Sequence[Tensor]) -> Iterator[_Block]:
    for start in range(0, len(sequences[0]), LSTM_STEPS):
        yield [sequence[start : start + LSTM_STEPS] for sequence in sequences if len(sequence) > start]


def _joined(blocks: Iterable[_Block], num_sequences: int) -> list[Tensor]:
    parts: list[list[Tensor]] = [[] for _ in range(num_sequences)]
    for block in blocks:
        for lane, piece in enumerate(block):
            parts[lane].append(piece)
    return [torch.cat(pieces) for pieces in parts]


def _run_layer(by_input: PackedMatrix, by_hidden: PackedMatrix, blocks: Iterable[_Block]) -> Iterator[_Block]:
    """Runs one layer of an LSTM over sequences in lockstep."""
    hidden: Tensor | None = None
    for block in blocks:
        num_steps, D = block[0].shape
        if hidden is None:
            hidden, cell = (block[0].new_zeros(len(block), D) for _ in range(2))
        # After the end of a sequence, its gates are zero, and its results are not used.
        gates = hidden.new_zeros(num_steps, len(block), 4 * D)
        for lane, piece in enumerate(block):
            gates[: len(piece), lane] = by_input(piece)
        hidden, cell = hidden[: len(block)], cell[: len(block)]
        steps = hidden.new_empty(num_steps, len(block), D)
        for gate, step in zip(gates, steps, strict=True):
            both = by_hidden(hidden, add=gate)
            both[:, : 3 * D].sigmoid_()
            enter, keep, leave, value = both.split(D, dim=1)
            cell = cell.mul(keep).addcmul_(enter, value.tanh_())
            hidden = torch.mul(leave, cell.tanh(), out=step)
        yield [steps[: len(piece), lane] for lane, piece in enumerate(block)]


_LSTM_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _sigmoids_first(parameter: Tensor) -> Tensor:
    """Reorders torch's gates (input, forget, value, output) so that the three gates that use a sigmoid are adjacent."""
    enter, keep, value, leave = parameter.chunk(4)
    return torch.cat([enter, keep, leave, value])


def _rows_are_independent(matrix: PackedMatrix) -> bool:
    """Returns whether each row of a product is bit-identical regardless of its position and of the other rows."""
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = matrix.shape
    x = torch.randn(MAX_LANES, in_features, generator=generator)
    add = torch.randn(MAX_LANES, out_features, generator=generator)
    alone = torch.cat([matrix(x[i : i + 1], add=add[i : i + 1]) for i in range(MAX_LANES)])
    return all(
        torch.equal(matrix(x[i:j].clone(), add=add[i:j].clone()), alone[i:j])
        for i in range(MAX_LANES)
        for j in range(i + 1, MAX_LANES + 1)
    )
