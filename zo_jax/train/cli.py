"""The command line around a configuration: its help, and errors that say what was meant."""

from collections.abc import Sequence
import dataclasses
import difflib
import os
from pathlib import Path
import sys

import jax

from zo_jax.train import processes
from zo_jax.train.config import Config, ConfigError, walk


def help_text() -> str:
    """Every field with its type, default and meaning, one paragraph a section."""
    lines, section = [], None
    sections = {f.name: f.metadata["help"] for f in dataclasses.fields(Config)}
    for name, field, _ in walk(Config()):
        head = name.rpartition(".")[0]
        if head != section:
            lines.append(f"\n{head}: {sections[head]}" if head else "")
            section = head
        default = repr(field.default) if field.type is str else str(field.default)
        lines.append(f"  --config.{name} ({field.type.__name__}, default {default})")
        lines.append(f"      {field.metadata['help']}")
    return "\n".join(lines)


def prepare_arguments(args: Sequence[str], default_config: Path) -> list[str]:
    """The arguments in the order that the flag parser needs: the file of --config first, then its fields.

    Args:
      args: the command line, without the program.
      default_config: the file, where --config is not among them.

    Raises:
      ConfigError: --config does not name a file or --config.NAME a field, which the parser says less clearly.
    """
    names = [name for name, _, _ in walk(Config())]
    sections = {name.rpartition(".")[0] for name in names}
    path, rest, args = None, [], list(args)
    while args:
        arg = args.pop(0)
        flag, equals, value = arg.lstrip("-").partition("=")
        head, dot, name = flag.partition(".")
        if not arg.startswith("-"):
            rest.append(arg)
        elif flag == "config":
            path = value if equals else args.pop(0) if args else ""
        elif dot and head in ("config", "noconfig") and name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists them all"
            what = "is a section, not a field" if name in sections else "is no field"
            raise ConfigError(f"--config.{name}: {name} {what} of the configuration{hint}")
        else:
            rest.append(arg)
    path = str(default_config) if path is None else path
    # A config file may be given an argument after a colon.
    if not os.path.isfile(path.partition(":")[0]):
        raise ConfigError(f"--config must name a Python file; there is no file {path!r}")
    return [f"--config={path}", *rest]


def fail(error: Exception) -> None:
    """Says in one line what went wrong, and ends the program with the exit code of it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    code = getattr(error, "exit_code", 2)
    last = "Traceback" in str(error)  # of a config file that raises: its last line says why
    print(f"{'error' if code == 2 else 'stopped'}: {lines[-last]}", file=sys.stderr)
    if getattr(error, "together", False):
        processes.say_goodbye()
    elif jax.distributed.is_initialized():
        processes.leave(code)
    sys.exit(code)
