"""Turns window records into metric values with confidence intervals, result files and printed tables."""
