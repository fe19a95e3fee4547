"""Utilities for files and messages: atomic writes, file names, per-file caches, printable errors, and redaction of secrets."""
