"""Where the demo lies in the package."""

MODEL = "models/demo"
CLIPS = "data/demo"
CARD = "README.md"  # beside the weights
