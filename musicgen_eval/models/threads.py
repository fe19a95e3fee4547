"""Work side by side on a CPU, one torch thread each, so that no bit depends on how many threads or processes there are.

Several of torch's kernels give other last bits with another number of threads (oneDNN's convolutions and prepacked matrices,
`torch.sum`); none does when each piece of work has one thread to itself. Knows nothing of audio or models.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_single_threaded(
    fn: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int | None = None
) -> list[Result]:
    """Apply `fn` to every item, items side by side, each with one torch thread.

    The workers see the caller's autocast, inference and grad modes and its context variables. What they return does not depend
    on `num_workers`, if `fn` is a function of its item alone.

    Args:
        fn: called from several threads at once.
        items: taken up in their order.
        num_workers: how many items are in hand at once; None: as many as the caller has torch threads.

    Returns:
        The results in the order of the items.

    Raises:
        ValueError: `num_workers` is below 1.
        BaseException: whatever `fn` raised on the first item that failed; items not yet begun are dropped.

    >>> map_single_threaded(lambda n: n * torch.get_num_threads(), [1, 2, 3], num_workers=2)
    [1, 2, 3]
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers: expected at least 1, got {num_workers}")
    pending = list(items)
    num_workers = min(num_workers or torch.get_num_threads(), len(pending))
    if num_workers <= 1:
        with single_threaded():
            return [fn(item) for item in pending]

    modes = _Modes()

    def work(context: contextvars.Context, item: Item) -> Result:
        with modes.entered():
            return context.run(fn, item)

    with _single_threaded_pool(num_workers) as pool:
        futures = [pool.submit(work, contextvars.copy_context(), item) for item in pending]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Give the calling thread one torch thread, and its own number back at the end; other threads keep theirs."""
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield
        return
    with _SETTING:
        torch.set_num_threads(1)
        _set_default_for_new_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextlib.contextmanager
def torch_threads(num_threads: int | None) -> Iterator[None]:
    """Give the calling thread so many torch threads, and its own number back at the end; None: as many as it has."""
    found = torch.get_num_threads()
    if num_threads in (None, found):
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(found)


# torch.set_num_threads(n) sets the calling thread's number and, for the whole process, the number that a thread which has not
# used torch yet will start with. The second half is undone below; this lock keeps two callers from undoing each other's.
_SETTING = threading.Lock()


@contextlib.contextmanager
def _single_threaded_pool(num_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads with one torch thread each; neither the caller nor threads started elsewhere notice."""
    num_threads = torch.get_num_threads()
    all_set = threading.Barrier(num_workers)

    def settle() -> None:
        torch.get_num_threads()  # takes up the process's number now, or the first operator would, over ours
        torch.set_num_threads(1)
        all_set.wait()

    with ThreadPoolExecutor(num_workers, "single-threaded", initializer=settle) as pool:
        with _SETTING:
            # The barrier holds each of these in its own thread until all threads have started.
            for future in [pool.submit(torch.get_num_threads) for _ in range(num_workers)]:
                future.result()
            torch.set_num_threads(num_threads)
        yield pool


def _set_default_for_new_threads(num_threads: int) -> None:
    thread = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    thread.start()
    thread.join()


class _Modes:
    """torch's thread-local modes of the thread that made this, to be entered in another."""

    def __init__(self) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()
        self._cache = torch.is_autocast_cache_enabled()
        self._autocast = {
            kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        }

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._cache))
            yield
