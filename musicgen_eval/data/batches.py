"""Groups the windows of a plan into batches, identifies each batch by a hash of its windows, and distributes batches over ranks.

Batches do not depend on the number of ranks, so a window always shares a batch with the same windows. Every rank takes the same
number of steps; surplus steps get an empty batch. Independent of Lightning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from hashlib import sha256

from torch.utils.data import Sampler

from musicgen_eval.data.plan import Plan


class RankBatches(Sampler[list[int]]):
    """Samples the batches of one rank.

    The batches are the same for any number of ranks, and together the ranks get every window once. Batches are formed in
    order and distributed round robin, so that long windows are spread evenly. If the number of batches is not a multiple
    of the world size, the last ranks get an empty batch at the end. If no batches are left, every rank gets an empty one.

    Args:
        num_windows: Number of windows in the plan.
        batch_size: Windows per batch.
        rank: Rank of this process, from 0.
        world_size: Number of processes.
        done: Numbers of the batches that have already been measured. They are left out.

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
        """Returns the number of steps. It is the same on every rank, and at least one, so that all ranks synchronise."""
        return max(1, -(-len(self._left) // self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            dealt = step * self.world_size + self.rank
            number = self._left[dealt] if dealt < len(self._left) else None
            yield [] if number is None else list(batch_rows(number, self.num_windows, self.batch_size))


def num_batches(num_windows: int, batch_size: int) -> int:
    """Returns the number of batches."""
    return -(-num_windows // batch_size)


def batch_rows(number: int, num_windows: int, batch_size: int) -> range:
    """Returns the rows of the plan that form a batch."""
    first = number * batch_size
    return range(first, min(first + batch_size, num_windows))


def batch_key(plan: Plan, rows: range) -> str:
    """Returns a hash of the windows of a batch, their tracks and their order."""
    windows = plan.windows
    columns = (windows.index, windows.start_frame, windows.context_frames, windows.target_frames)
    numbers = [column[rows.start : rows.stop].tolist() for column in columns]
    tracks = [plan.tracks.ids[track] for track in windows.track[rows.start : rows.stop].tolist()]
    return sha256(ascii((numbers, tracks)).encode()).hexdigest()[:16]
