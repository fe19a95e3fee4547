"""Turns a source into a plan of tracks, windows and batches. Independent of Lightning and of models."""
