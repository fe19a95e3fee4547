"""Runs evaluations with Lightning, stores each run in a folder, and resumes interrupted runs."""
