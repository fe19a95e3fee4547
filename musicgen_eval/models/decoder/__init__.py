"""Runs the decoder's forward passes and decoding steps on CPUs and accelerators."""
