"""Reads slices of audio files at any sample rate, and writes audio files."""
