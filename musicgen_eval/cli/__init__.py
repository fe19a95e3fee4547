"""Implements the two commands, `train_like_eval.py` and `musicgen-eval`."""
