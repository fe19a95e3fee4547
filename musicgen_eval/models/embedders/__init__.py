"""Converts audio to embeddings, which metrics of sets and of text agreement compare."""
