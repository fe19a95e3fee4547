"""Loads checkpoints: specification, codec, decoder, delay pattern."""
