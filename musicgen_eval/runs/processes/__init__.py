"""Manages the processes of a run, including Lightning strategies, signals and messages between ranks."""
