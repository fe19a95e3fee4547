"""EnCodec: audio to codes, and codes to audio."""
