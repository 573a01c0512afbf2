"""The flags of an experiment, parsed once: --config, one for every field, and errors that say what was meant."""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import sys
import textwrap
from typing import Any, NoReturn

import jax

from zo_jax.train import experiment, processes
from zo_jax.train.config import Config, ConfigError, walk


class Parser(argparse.ArgumentParser):
    """Argparse's, but for errors of one line."""

    def __init__(self, **options: Any):
        self.flags: list[str] = []
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=style, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        self.flags += names
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parse(parser: Parser, args: Sequence[str]) -> argparse.Namespace:
    """What `parser` reads in the arguments.

    Raises:
      ConfigError: an argument is no flag; the message names one that is near.
    """
    options, rest = parser.parse_known_args(args)
    if not rest:
        return options
    name = rest[0].partition("=")[0]
    if not name.startswith("-"):
        raise ConfigError(f"{rest[0]!r} is no flag; --help lists them all")
    if any(flag.startswith(f"{name}.") for flag in parser.flags):
        raise ConfigError(f"{name} is a section, not a field; --help lists its fields")
    # Capital letters are the likeliest mistake, and must not hide a near one.
    close = difflib.get_close_matches(name.lower(), parser.flags, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists them all"
    raise ConfigError(f"{name} is no flag{hint}")


def add_experiment(parser: Parser, default: str) -> None:
    """Adds --config and a flag for every field; they are read by `read_experiment`."""
    parser.add_argument(
        "--config",
        default=default,
        metavar="NAME",
        help=f"the experiment: {', '.join(experiment.shipped())}, or the path of a Python file with get_config(); "
        f"after a colon, its argument, as in icpram2025:200M (default {default})",
    )
    parser.epilog = help_text()
    for name, field, _ in walk(Config()):
        flag, hidden = f"--config.{name}", dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if field.type is bool:
            parser.add_argument(flag, nargs="?", const="true", **hidden)
            parser.add_argument(
                f"--noconfig.{name}",
                dest=f"config.{name}",
                action="store_const",
                const="false",
                **hidden,
            )
        else:
            parser.add_argument(flag, **hidden)


def read_experiment(options: argparse.Namespace) -> Any:
    """The experiment that the flags of `add_experiment` name, which `validate` has not seen yet.

    Raises:
      ConfigError: there is none, or a flag's value is not of the field's type.
    """
    config = experiment.load(options.config)
    given = {name: text for name, text in vars(options).items() if name.startswith("config.")}
    if not isinstance(config, Config):
        return config
    for name, field, _ in walk(Config()):
        if (text := given.get(f"config.{name}")) is not None:
            section, _, leaf = name.rpartition(".")
            setattr(getattr(config, section) if section else config, leaf, _read(name, field, text))
    return config


def _read(name: str, field: dataclasses.Field, text: str) -> Any:
    if field.type is bool:
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() in values:
            return values[text.lower()]
        raise ConfigError(f"--config.{name}={text}: it must be true or false")
    try:
        return field.type(text)  # type: ignore[operator]
    except ValueError:
        raise ConfigError(
            f"--config.{name}={text}: it must be a number of type {field.type.__name__}"  # type: ignore[union-attr]
        ) from None


def help_text() -> str:
    """Every field with its type, default and meaning, one paragraph a section."""
    return "\n".join(_help_lines())


def _help_lines() -> Iterator[str]:
    section = None
    sections = {f.name: f.metadata["help"] for f in dataclasses.fields(Config)}
    for name, field, _ in walk(Config()):
        head = name.rpartition(".")[0]
        if head != section:
            yield (
                f"\n{head}: {sections[head]}"
                if head
                else "--config.FIELD=VALUE replaces a field of the experiment:"
            )
            section = head
        default = repr(field.default) if field.type is str else str(field.default)
        yield f"  --config.{name} ({field.type.__name__}, default {default})"  # type: ignore[union-attr]
        yield textwrap.fill(
            field.metadata["help"], 100, initial_indent=" " * 6, subsequent_indent=" " * 6
        )


def fail(error: Exception) -> int:
    """Says in one line what went wrong; returns the exit code of it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    code = getattr(error, "exit_code", 2)
    print(f"{'error' if code == 2 else 'stopped'}: {line}", file=sys.stderr)
    if jax.distributed.is_initialized() and not getattr(error, "together", False):
        processes.leave(code)
    return code
