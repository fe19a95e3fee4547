"""Length, integrity and decoding of each audio format."""
