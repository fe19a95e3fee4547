"""The sections of `tools/gpu_check.py`, one file per section, and their common parts."""
