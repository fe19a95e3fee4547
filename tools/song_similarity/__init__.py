"""The parts of `tools/continued_music.py`: the similarity of continuations to the songs that they continue."""
