"""Processes of a run: strategy, signals, messages between ranks."""
