"""The program: python -m zo_jax, or zo-jax. Of the library nothing imports this room."""

import importlib.util
import os
import signal
import sys


def _interrupted(*_: object) -> None:
    """What Ctrl-C does but for the steps of a run, which are finished and saved first."""
    os.write(2, b"\nstopped: interrupted; the same command begins, or goes on from what is saved\n")
    os._exit(130)


def main() -> int:
    """Runs the command line, or says what to install for it; returns the exit code."""
    # Before the imports, which take seconds.
    signal.signal(signal.SIGINT, _interrupted)
    try:
        if importlib.util.find_spec("flax") is None:
            raise ModuleNotFoundError("No module named 'flax'", name="flax")
        from zo_jax.train import cli

        return cli.main(sys.argv[1:])
    except ModuleNotFoundError as error:
        if (error.name or "zo_jax").partition(".")[0] == "zo_jax":
            raise
        print(
            f"error: the program needs {error.name}, which the library alone does not; "
            "pip install 'zo_jax[train]'",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
