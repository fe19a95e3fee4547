"""Atomic writes, file names, results cached per file, printable errors, and removal of secrets."""
