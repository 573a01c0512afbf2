"""The flags of an experiment, parsed once: --config, one for every field, and errors that say what
was meant.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import sys
import textwrap
from typing import Any, NoReturn

import jax

from zo_jax.train import experiment, processes
from zo_jax.train.config import SETTINGS, Config
from zo_jax.train.settings import ConfigError, Setting, as_word, replace_value
from zo_jax.train.validation import check_values, without_effect


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
        help=f"the experiment: {', '.join(experiment.shipped())}, or the path of a Python file with get_config(); "  # noqa: E501
        f"after a colon, its argument, as in icpram2025:200M (default {default})",
    )
    parser.epilog = help_text()
    for name, one in SETTINGS.items():
        flag, hidden = f"--config.{name}", dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if one.kind is bool:
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


def read_experiment(options: argparse.Namespace) -> Config:
    """The experiment that the flags of `add_experiment` name, each field one of the values that it
    may have.

    What the experiment's own file sets but the flags leave without effect, as --config.mode=fo does
    with its zo.num_queries, is left at its default, with a word about it. What is without effect in
    the file, or a flag, is left for `validate` to refuse.

    Raises:
      ConfigError: there is no such experiment, or a field has a value that it cannot have.
    """
    config = experiment.load(options.config)
    check_values(config)
    of_file = without_effect(config)
    given = {name.removeprefix("config."): x for name, x in vars(options).items() if "." in name}
    for name, text in given.items():
        replace_value(config, name, _read(SETTINGS[name], text))
    check_values(config)
    dropped = []
    while new := [x for x in without_effect(config) if x not in given and x not in of_file]:
        for name in new:
            replace_value(config, name, SETTINGS[name].default)
        dropped += new
    if dropped:
        print(
            f"left at their defaults, for the flags leave them without effect: {', '.join(dropped)}"
        )
    return config


def _read(one: Setting, text: str) -> Any:
    if text in one.words:
        return text
    if one.kind is bool:
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() in values:
            return values[text.lower()]
        raise ConfigError(f"--config.{one.name}={text}: it must be true or false")
    try:
        return one.kind(text)
    except ValueError:
        raise ConfigError(
            f"--config.{one.name}={text}: it must be a number of type {one.kind.__name__}"
            + "".join(f", or {word}" for word in one.words)
        ) from None


def help_text() -> str:
    """Every field: its type, default, values and meaning, and when it has an effect; a paragraph a
    section.
    """
    return "\n".join(_help_lines())


def _help_lines() -> Iterator[str]:
    sections = {f.name: f.metadata["help"] for f in dataclasses.fields(Config)}
    head = None
    for name, one in SETTINGS.items():
        before, head = head, name.rpartition(".")[0]
        if head != before:
            what = (
                f"\n{head}: {sections[head]}" if head else "--config.FIELD=VALUE replaces a field:"
            )
            yield what
        yield f"  --config.{name} ({one.kind.__name__}, default {as_word(one.default)})"
        about = [one.help]
        if one.choices:
            about.append(f"one of {', '.join(as_word(choice) for choice in one.choices)}")
        if one.allowed:
            about.append(" or ".join((*one.words, one.allowed)))
        if one.only_if:
            about.append(f"only if {one.only_if}")
        yield _wrap("; ".join(about))


def _wrap(text: str) -> str:
    indent = " " * 6
    return textwrap.fill(
        text, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def fail(error: Exception) -> int:
    """Says in one line what went wrong; returns the exit code of it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    code = getattr(error, "exit_code", 2)
    print(f"{'error' if code == 2 else 'stopped'}: {line}", file=sys.stderr)
    if getattr(error, "together", False):
        processes.say_goodbye()
    elif jax.distributed.is_initialized():
        processes.leave(code)
    return code
