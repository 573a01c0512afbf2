"""Trains from a checkout: `python main.py` is `zo-jax train`; --help lists its flags."""

import sys

from zo_jax.train.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
