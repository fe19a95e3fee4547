"""The EnCodec codec, which converts audio to codes and codes to audio."""
