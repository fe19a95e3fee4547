"""Finds and loads MusicGen checkpoints, and runs their codec and decoder."""
