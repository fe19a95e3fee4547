"""Turns window records into numbers with intervals, files and tables."""
