"""Creates the plan of a run from a source of audio: the tracks, the windows and the batches.

This package does not depend on Lightning or on the models.
"""
