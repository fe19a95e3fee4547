"""Determines the length of audio files, checks their integrity, and decodes formats that soundfile does not decode exactly."""
