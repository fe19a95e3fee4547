"""`python train_like_eval.py test --config configs/demo.yaml`: the Lightning CLI of musicgen_eval."""

import sys

from musicgen_eval.cli.main import lightning_main

if __name__ == "__main__":
    sys.exit(lightning_main())
