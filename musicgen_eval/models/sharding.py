"""Shards a decoder across processes. Each process stores a part of every layer, and gathers a whole layer only to run the layer.

Gathering is exact, so a sharded decoder gives the same numbers as an unsharded one. All processes of a mesh must run the same
passes in the same order, on the same batch. This module does not depend on Lightning.
"""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import MusicgenForCausalLM


def shard_decoder(decoder: MusicgenForCausalLM, mesh: DeviceMesh) -> None:
    """Shards a decoder's layers in place. Every process keeps all embeddings and output heads, which are small.

    Args:
        decoder: The decoder, with the same weights on every process.
        mesh: One-dimensional mesh of the processes that share the model.
    """
    for layer in decoder.model.decoder.layers:
        fully_shard(layer, mesh=mesh)


def is_sharded(decoder: MusicgenForCausalLM) -> bool:
    """Returns whether a decoder's layers are sharded across processes."""
    return isinstance(decoder.model.decoder.layers[0], FSDPModule)
