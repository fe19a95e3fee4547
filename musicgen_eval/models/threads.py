"""Runs CPU work in parallel with one torch thread per item, so that results do not depend on the number of threads.

The last bits of the results of some kernels (oneDNN's convolutions and packed products, `torch.sum`) depend on the number of
torch threads. If each item runs on one thread, the results are always the same.
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
    """Applies `fn` to all items in parallel, with one torch thread per item.

    The workers use the caller's context variables and its autocast, inference and grad modes. The results do not depend on
    `num_workers` if `fn` depends only on its item.

    Args:
        fn: Function to apply. Several threads may call the function at the same time.
        items: Items to process, which are started in order.
        num_workers: Number of items that are processed at the same time. None means the caller's number of torch threads.

    Returns:
        The results in the order of the items.

    Raises:
        ValueError: If `num_workers` is below 1.
        BaseException: The exception that `fn` raised for the first item that failed. Items that have not started are skipped.

    >>> map_single_threaded(lambda n: n * torch.get_num_threads(), [1, 2, 3], num_workers=2)
    [1, 2, 3]
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
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
    """Sets the calling thread's number of torch threads to 1, and restores it on exit. Other threads are unaffected."""
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
    """Sets the calling thread's number of torch threads, and restores the previous number on exit. None means no change."""
    found = torch.get_num_threads()
    if num_threads in (None, found):
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(found)


# torch.set_num_threads(n) sets the number for the calling thread, and the process-wide default for threads that have not used torch
# yet. The functions of this module restore the default. The lock prevents concurrent callers from restoring each other's value.
_SETTING = threading.Lock()


@contextlib.contextmanager
def _single_threaded_pool(num_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yields a pool whose workers have one torch thread each. The caller and other threads are not affected."""
    num_threads = torch.get_num_threads()
    all_set = threading.Barrier(num_workers)

    def settle() -> None:
        torch.get_num_threads()  # applies the process-wide default now, so that the first operator does not override the 1 below
        torch.set_num_threads(1)
        all_set.wait()

    with ThreadPoolExecutor(num_workers, "single-threaded", initializer=settle) as pool:
        with _SETTING:
            # The barrier keeps each of these tasks in its own thread until all threads have started.
            for future in [pool.submit(torch.get_num_threads) for _ in range(num_workers)]:
                future.result()
            torch.set_num_threads(num_threads)
        yield pool


def _set_default_for_new_threads(num_threads: int) -> None:
    thread = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    thread.start()
    thread.join()


class _Modes:
    """The thread-local torch modes of the thread that creates this object. Other threads can enter these modes."""

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
