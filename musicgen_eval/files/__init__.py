"""Writes files atomically and without secrets, and detects changed files."""
