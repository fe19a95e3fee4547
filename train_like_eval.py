"""Runs the Lightning CLI of musicgen_eval, as in `python train_like_eval.py test --config configs/demo.yaml`."""

import sys

from musicgen_eval.cli.main import lightning_main

if __name__ == "__main__":
    sys.exit(lightning_main())
