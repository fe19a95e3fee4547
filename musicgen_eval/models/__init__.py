"""Checkpoints: specification, loading, codec, decoder and delay pattern."""
