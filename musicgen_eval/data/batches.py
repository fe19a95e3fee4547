"""Groups the windows of a plan into batches, and distributes the batches over the ranks.

The batches do not depend on the number of ranks, so a window always shares a batch with the same other windows. Every rank
processes the same number of batches. If there are too few batches, some ranks process an empty batch. Each batch is identified by a
hash of its windows. This module does not depend on Lightning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from hashlib import sha256

from torch.utils.data import Sampler

from musicgen_eval.data.plan import Plan


class RankBatches(Sampler[list[int]]):
    """Batch sampler that yields the batches of one rank.

    The windows are grouped into batches in order, and the batches are distributed over the ranks in round-robin order. Long windows
    are therefore spread evenly, and each window is processed by exactly one rank. The batches are the same for any number of ranks.
    If the number of batches is not a multiple of the world size, the last batch of some ranks is empty. If no batches remain, every
    rank receives one empty batch.

    Args:
        num_windows: Number of windows in the plan.
        batch_size: Number of windows per batch.
        rank: Rank of this process, counted from 0.
        world_size: Number of processes.
        done: Indices of the batches that have already been measured. These batches are omitted.

    >>> [list(RankBatches(5, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    [[[0, 1], [4]], [[2, 3], []]]
    >>> [list(RankBatches(5, batch_size=2, rank=rank, world_size=2, done={0, 1})) for rank in range(2)]
    [[[4]], [[]]]
    """

    def __init__(
        self, num_windows: int, *, batch_size: int, rank: int, world_size: int, done: Collection[int] = ()
    ) -> None:
        self.num_windows = num_windows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self._left = [number for number in range(num_batches(num_windows, batch_size)) if number not in done]

    def __len__(self) -> int:
        """Returns the number of batches per rank, including empty batches.

        The number is the same on every rank. It is at least 1, so that all ranks synchronise.
        """
        return max(1, -(-len(self._left) // self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            dealt = step * self.world_size + self.rank
            number = self._left[dealt] if dealt < len(self._left) else None
            yield [] if number is None else list(batch_rows(number, self.num_windows, self.batch_size))


def num_batches(num_windows: int, batch_size: int) -> int:
    """Returns the number of batches for `num_windows` windows."""
    return -(-num_windows // batch_size)


def batch_rows(number: int, num_windows: int, batch_size: int) -> range:
    """Returns the rows of the windows in batch `number`."""
    first = number * batch_size
    return range(first, min(first + batch_size, num_windows))


def batch_key(plan: Plan, rows: range) -> str:
    """Returns a key that identifies a batch: a hash of its windows, their order and the ids of their tracks."""
    windows = plan.windows
    columns = (windows.index, windows.start_frame, windows.context_frames, windows.target_frames)
    numbers = [column[rows.start : rows.stop].tolist() for column in columns]
    tracks = [plan.tracks.ids[track] for track in windows.track[rows.start : rows.stop].tolist()]
    return sha256(ascii((numbers, tracks)).encode()).hexdigest()[:16]
