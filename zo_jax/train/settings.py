"""How a setting declares itself: its default, what it means, the values it may have, and when it
has an effect.

Checks, help texts and tests all follow from these declarations, which stand beside the fields in
config.py.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import operator
import re
from typing import Any, NamedTuple

_COMPARISONS = {
    "at least": operator.ge,
    "at most": operator.le,
    "from": operator.ge,
    "to": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says, in one line, what to change."""


class Setting(NamedTuple):
    """What a field declares.

    Attributes:
      name: dotted, like "zo.epsilon".
      kind: int, float, str or bool.
      default: of that kind.
      help: what it means.
      choices: the strings that it may be; none: any.
      words: what it may be besides numbers, like "auto".
      allowed: the numbers that it may be, like "at least 0 and below 1", "from 0 to 1" or "at least
        1, or -1"; empty: any.
      only_if: when it has an effect, as in `unmet_part`; empty: always.
      may_change: what another value changes in a run that goes on; empty: it may not have one.
    """

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    allowed: str = ""
    only_if: str = ""
    may_change: str = ""


def setting(default: Any, help: str, **declared: Any) -> Any:
    """A field of a dataclass that declares a `Setting`: choices, words, allowed, only_if,
    may_change.
    """
    return dataclasses.field(default=default, metadata={"help": help, **declared})


def section(kind: type, help: str, only_if: str = "") -> Any:
    """A field of a dataclass that holds a dataclass of settings; `only_if` is a condition of all of
    them.
    """
    return dataclasses.field(default_factory=kind, metadata={"help": help, "only_if": only_if})


def declared(kind: Any) -> Iterator[Setting]:
    """The settings of a dataclass and of its sections, in order."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            condition = field.metadata["only_if"]
            for one in declared(field.type):
                both = " and ".join(filter(None, (condition, one.only_if)))
                yield one._replace(name=f"{field.name}.{one.name}", only_if=both)
        else:
            yield Setting(field.name, field.type, field.default, **field.metadata)  # type: ignore[arg-type]


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting of a dataclass of settings, in order.

    Raises:
      ConfigError: a section is not of its type.
    """
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if not dataclasses.is_dataclass(field.type):
            yield name, value
        elif isinstance(value, field.type):  # type: ignore[arg-type]
            yield from walk(value, f"{name}.")
        else:
            raise ConfigError(f"{name} must be a {field.type.__name__}; got {value!r}")  # type: ignore[union-attr]


def replace_value(config: Any, name: str, value: Any) -> None:
    """Sets the setting of a dotted name."""
    section, _, leaf = name.rpartition(".")
    setattr(getattr(config, section) if section else config, leaf, value)


def is_allowed(value: float, allowed: str) -> bool:
    """Whether a number is one of those that a declaration names.

    >>> is_allowed(0.5, "above 0 and below 1"), is_allowed(-1, "at least 1, or -1 for what is left")
    (True, True)
    >>> is_allowed(float("inf"), "above 0")
    False
    """
    if any(value == float(number) for number in re.findall(r" or (-?\d+)", allowed)):
        return True
    bounds = re.findall(rf"\b({'|'.join(_COMPARISONS)}) (-?[\d.e-]+)", allowed)
    finite = isinstance(value, int) or math.isfinite(value)
    return finite and all(_COMPARISONS[word](value, float(bound)) for word, bound in bounds)


def unmet_part(condition: str, values: Mapping[str, Any]) -> str:
    """The first part of a condition that does not hold, or the empty string if all do.

    Parts are joined by "and". A part is "NAME is VALUE" or "NAME is not VALUE", with more values
    after "or", and other such parts after "or". An empty string is written empty.

    >>> values = {"mode": "zo", "zo.difference": "jvp", "fo.source": ""}
    >>> unmet_part("mode is not fo and zo.difference is central or forward", values)
    'zo.difference is central or forward'
    >>> unmet_part("mode is zo or calibrate and fo.source is empty", values)
    ''
    """
    for part in filter(None, condition.split(" and ")):
        if not any(_holds(*clause, values) for clause in _clauses(part)):
            return part
    return ""


def names_in(part: str) -> list[str]:
    """The settings that a part of a condition speaks of."""
    return list(dict.fromkeys(name for name, *_ in _clauses(part)))


def as_word(value: Any) -> str:
    """A value as conditions write it."""
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _clauses(part: str) -> list[tuple[str, bool, list[str]]]:
    """(name, whether it is one of the values or none of them, values), joined by "or"."""
    clauses: list[tuple[str, bool, list[str]]] = []
    for piece in part.split(" or "):
        name, found, value = piece.partition(" is ")
        if found:
            clauses.append((name, not value.startswith("not "), [value.removeprefix("not ")]))
        else:
            clauses[-1][2].append(piece)
    return clauses


def _holds(name: str, positive: bool, words: list[str], values: Mapping[str, Any]) -> bool:
    return (as_word(values[name]) in words) is positive
