"""Scores codes with a decoder, and generates continuations."""
