"""Runs an evaluation: Lightning modules, callbacks, processes, run folders, and resuming."""
