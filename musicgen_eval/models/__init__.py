"""MusicGen checkpoints: their specification, loading, codec, decoder and delay pattern."""
