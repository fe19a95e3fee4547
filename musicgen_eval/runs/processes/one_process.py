"""A run of one process on one device, whatever launched the script and whatever it has set up.

`perplexity()`, `generate()` and `musicgen-eval` request one device. A SLURM job with several tasks, torchrun's variables or a
process group of the caller are none of their business, and stay as they are.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CUDAAccelerator

from musicgen_eval.models.numerics import float32_by_default


class OneProcess(LightningEnvironment):
    """A cluster of one process, independent of the variables that describe a larger one."""

    @property
    def creates_processes_externally(self) -> bool:
        """Nothing is to be launched."""
        return True

    def local_rank(self) -> int:
        """The only one."""
        return 0

    def node_rank(self) -> int:
        """The only one."""
        return 0

    def teardown(self) -> None:
        """Leaves WORLD_SIZE, which belongs to the caller."""


def one_device(accelerator: str) -> int | list[int]:
    """The device to run on, as Lightning takes it: the caller's current GPU where a GPU is used.

    Args:
        accelerator: as Lightning's: `auto`, `cpu`, `gpu`, `cuda`.
    """
    if accelerator in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available():
        return [torch.cuda.current_device()]
    return 1


@contextmanager
def own_defaults() -> Iterator[None]:
    """Undoes a default dtype or device of the caller, which tensors without their own would take on; as before at the end."""
    with ExitStack() as stack:
        if torch.get_default_dtype() != torch.float32:
            stack.enter_context(float32_by_default())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
