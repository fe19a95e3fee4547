"""Converts audio to codes and codes to audio with EnCodec."""
