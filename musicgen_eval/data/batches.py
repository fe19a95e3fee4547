"""Batches of windows: formed once over all of a plan, named by what they hold, dealt to the ranks.

Batches do not depend on the number of devices, so neither do a window's neighbours. Every rank makes the same number of steps; the
surplus ones hold no window. Knows rows of a plan; nothing of audio or Lightning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from hashlib import sha256

from torch.utils.data import Sampler

from musicgen_eval.data.planning import Plan


class RankBatches(Sampler[list[int]]):
    """Deals batches to ranks: the same batches for any number of ranks, every window once, as many steps on each rank.

    Batches are formed in order and dealt round robin, so that each rank gets as many long windows as the others. Where
    they do not divide evenly, the last ranks get an empty batch at the end; where none are left, all get one.

    Args:
        num_windows: windows in all.
        batch_size: windows a batch.
        rank: this process, from 0.
        world_size: processes in all.
        done: numbers of batches that are not dealt any more.

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
        """Steps, the same on every rank; at least one, at whose end ranks come together."""
        return max(1, -(-len(self._left) // self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            dealt = step * self.world_size + self.rank
            number = self._left[dealt] if dealt < len(self._left) else None
            yield [] if number is None else list(batch_rows(number, self.num_windows, self.batch_size))


def num_batches(num_windows: int, batch_size: int) -> int:
    """How many batches windows make."""
    return -(-num_windows // batch_size)


def batch_rows(number: int, num_windows: int, batch_size: int) -> range:
    """The rows of the plan that a batch holds."""
    first = number * batch_size
    return range(first, min(first + batch_size, num_windows))


def batch_key(plan: Plan, rows: range) -> str:
    """A name for a batch that says all that it holds: which windows of which tracks, in which order."""
    windows = plan.windows
    columns = (windows.index, windows.start_frame, windows.context_frames, windows.target_frames)
    numbers = [column[rows.start : rows.stop].tolist() for column in columns]
    tracks = [plan.tracks.ids[track] for track in windows.track[rows.start : rows.stop].tolist()]
    return sha256(ascii((numbers, tracks)).encode()).hexdigest()[:16]
