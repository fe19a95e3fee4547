"""Paths of the demo in the package."""

MODEL = "models/demo"
CLIPS = "data/demo"
CARD = "README.md"  # next to the weights
