"""Modules that determine the length of audio files, check their integrity and decode them, one per format."""
