"""Forward passes and decoding steps of the decoder, on CPUs and accelerators."""
