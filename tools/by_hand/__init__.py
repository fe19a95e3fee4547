"""The parts of `tools/make_by_hand.py`: common mistakes of scoring MusicGen with a script, measured on the demo."""
