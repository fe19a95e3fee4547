"""Computes metric values and confidence intervals from window records, and writes and prints the results."""
