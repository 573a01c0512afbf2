"""Trains from a checkout: `python main.py` is `zo-jax train`; --help lists its flags."""

import os
import signal
import sys


def _interrupted(*_: object) -> None:
    """What Ctrl-C does but for the steps of a run, which are finished and saved first."""
    os.write(2, b"\nstopped: interrupted; the same command begins, or goes on from what is saved\n")
    os._exit(130)


if __name__ == "__main__":
    # Before the imports, which take seconds.
    signal.signal(signal.SIGINT, _interrupted)
    from zo_jax.train.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
