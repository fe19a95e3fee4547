"""Shards a decoder over processes that share one model: each keeps a part of every layer, and gathers a layer to run it.

What is gathered is exact, so a sharded pass gives the numbers of a whole one; all processes of a mesh must make the same
passes in the same order, on the same batch. Knows the decoder's layers and a mesh; nothing of Lightning.
"""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import MusicgenForCausalLM


def shard_decoder(decoder: MusicgenForCausalLM, mesh: DeviceMesh) -> None:
    """Shards the layers in place; embeddings and output heads, which are small, stay whole on every process.

    Args:
        decoder: with its weights, equal on every process.
        mesh: of one dimension: the processes that share the model.
    """
    for layer in decoder.model.decoder.layers:
        fully_shard(layer, mesh=mesh)


def is_sharded(decoder: MusicgenForCausalLM) -> bool:
    """Whether its layers lie on several processes."""
    return isinstance(decoder.model.decoder.layers[0], FSDPModule)
