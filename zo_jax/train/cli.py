"""The program: zo-jax COMMAND. Each command is a room of its own, imported when it is called."""

from collections.abc import Sequence
import difflib
import importlib
from importlib import metadata
import platform
import sys

import zo_jax

# Command: (module with main(args) -> exit code, what it does).
COMMANDS = {
    "train": ("zo_jax.train.tools.train", "train a model, or go on with a run"),
    "ledger": (
        "zo_jax.train.tools.ledger",
        "what a run's ledger holds; its state or model at any step",
    ),
    "plots": ("zo_jax.train.tools.plots", "curves of several runs in one picture"),
    "generate": ("zo_jax.train.tools.generate", "text from a model or a run"),
    "export": ("zo_jax.train.tools.export", "the model of a run as a Hugging Face folder"),
    "memory": ("zo_jax.train.tools.memory", "what each way of training needs in memory"),
}


def main(args: Sequence[str]) -> int:
    """Runs a command; returns the exit code.

    Args:
      args: the command and its own arguments, without the program.
    """
    command, *rest = args or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command == "--version":
        print(_version())
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command.lower(), COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it must be one of {', '.join(COMMANDS)}"
        print(f"error: {command!r} is no command; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[command][0]).main(rest)


def _version() -> str:
    """What a report of a fault needs; no device is asked."""
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "numpy", "optax"))
    where = f"Python {platform.python_version()}, {platform.platform()}"
    return f"zo_jax {zo_jax.__version__}\n{packages}; {where}"


def _help() -> str:
    lines = [f"  {name:8s} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: zo-jax COMMAND ...",
            "",
            "Trains language models with forward passes only. Commands:",
            "",
            *lines,
            "",
            "zo-jax COMMAND --help explains a command; zo-jax --version tells the version.",
        ]
    )
