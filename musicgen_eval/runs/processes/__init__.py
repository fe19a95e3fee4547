"""Handles the processes of a run: strategy, signals and messages between ranks."""
