"""The program: python -m zo_jax, or zo-jax. Of the library nothing imports this room."""

import importlib.util
import sys


def main() -> int:
    """Runs the command line, or says what to install for it; returns the exit code."""
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
