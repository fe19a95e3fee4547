"""Runs an evaluation in one process and on one device, independently of the caller's environment.

`perplexity()`, `generate()` and `musicgen-eval` always use one process. They ignore SLURM jobs with several tasks, environment
variables set by torchrun, and the caller's process group, and do not change any of these.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CUDAAccelerator

from musicgen_eval.models.numerics import float32_by_default, request_deterministic_lstms


class OneProcess(LightningEnvironment):
    """A cluster environment with one process. It ignores environment variables that describe a larger cluster."""

    @property
    def creates_processes_externally(self) -> bool:
        """True, so that Lightning does not launch any processes."""
        return True

    def local_rank(self) -> int:
        """Returns 0, the rank of the only process."""
        return 0

    def node_rank(self) -> int:
        """Returns 0, the rank of the only node."""
        return 0

    def teardown(self) -> None:
        """Does nothing. Lightning's method would delete the caller's environment variable WORLD_SIZE."""


def one_device(accelerator: str) -> int | list[int]:
    """Returns the value for Lightning's argument `devices`: the caller's current GPU if a GPU is used, otherwise 1.

    Args:
        accelerator: Value of Lightning's argument `accelerator`, which is `auto`, `cpu`, `gpu` or `cuda`.
    """
    if accelerator in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available():
        return [torch.cuda.current_device()]
    return 1


@contextmanager
def own_defaults() -> Iterator[None]:
    """Sets torch's default dtype to float32 and its default device to the CPU. Restores the caller's defaults on exit.

    This context manager also requests deterministic LSTMs on CUDA. The request applies to the whole process, and remains in effect
    after the `with` block.
    """
    request_deterministic_lstms()
    with ExitStack() as stack:
        if torch.get_default_dtype() != torch.float32:
            stack.enter_context(float32_by_default())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
