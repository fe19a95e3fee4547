"""MusicGen checkpoints as this package uses them: their specification, their loading, and what they compute."""
