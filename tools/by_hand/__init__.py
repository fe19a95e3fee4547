"""What goes wrong when MusicGen is scored with a script, measured on the demo: the parts of `tools/make_by_hand.py`."""
