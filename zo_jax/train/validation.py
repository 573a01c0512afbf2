"""What a configuration must be, checked before anything is compiled, and what it leaves open
filled in.
"""

from collections.abc import Callable
import copy
import difflib
from typing import Any

import numpy as np

from zo_jax.tiers import pack, sort_into_tiers
from zo_jax.train.combinations import check_combinations, check_mode, check_warmup
from zo_jax.train.config import SETTINGS, Config, blocks_per_step
from zo_jax.train.model import SIZES
from zo_jax.train.settings import (
    ConfigError,
    Setting,
    as_word,
    is_allowed,
    names_in,
    replace_value,
    unmet_part,
    walk,
)


def fill_in(config: Config) -> Config:
    """A copy of a valid configuration with what its names and types say filled in: the shape of a
    named size, numbers as floats.
    """
    config = copy.deepcopy(config)
    for name, value in walk(config):
        # An integer is a number too, but saved configs compare as text.
        if SETTINGS[name].kind is float and value not in SETTINGS[name].words:
            replace_value(config, name, float(value))
    if config.model.size in SIZES:
        for name, value in SIZES[config.model.size]._asdict().items():
            setattr(config.model, name, value)
    config.zo.parallel_batch_size = min(config.zo.parallel_batch_size, config.zo.num_queries)
    return config


def resolve(
    config: Config, num_examples: int, count_tokens: Callable[[], np.ndarray] | None = None
) -> Config:
    """A copy of a valid configuration with everything that it leaves open filled in.

    Args:
      config: passed `validate`.
      num_examples: training blocks of the corpus, or training examples, from which epochs become
        steps.
      count_tokens: () -> how often the training text has each token, where there is one.

    Raises:
      ConfigError: the warm-up is as long as the run, or the run longer than a run can be; or there
        is no text whose tokens could be counted.
    """
    config = fill_in(config)
    if not config.train.num_steps:
        blocks = config.train.num_epochs * num_examples
        config.train.num_steps = max(1, blocks // blocks_per_step(config))
        _check_setting(SETTINGS["train.num_steps"], config.train.num_steps)
    check_warmup(config)
    if config.zo.groups == "tokens" and not config.zo.tiers:
        if count_tokens is None:
            raise ConfigError(
                "zo.groups=tokens needs a training text to count; set zo.groups=layers"
            )
        ((_, rows),) = sort_into_tiers({"tokens": count_tokens()})
        config.zo.tiers = pack(rows)
    return config


def validate(config: Any) -> None:
    """Checks everything that can be checked without reading the data.

    Raises:
      ConfigError: the first problem found, with the field, what it must be, and what it is; or a
        field that was changed, but that nothing reads.
    """
    check_values(config)
    check_mode(config)
    check_effects(config)
    check_combinations(config)


def check_possible(config: Any) -> None:
    """`validate` but for effects: what a run that has been can be rebuilt from.

    Raises:
      ConfigError: as `validate`.
    """
    check_values(config)
    check_combinations(config)


def check_values(config: Any) -> None:
    """Whether every field is of its type, and one of the values that it may have.

    Raises:
      ConfigError: one is not.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"get_config() must return a zo_jax.train.config.Config; got {type(config).__name__}"
        )
    for name, value in walk(config):
        _check_setting(SETTINGS[name], value)


def without_effect(config: Config) -> dict[str, str]:
    """The fields that were changed from their defaults, but that nothing reads, each with the
    condition that does not hold.
    """
    values = dict(walk(config))
    changed = [one for one in SETTINGS.values() if values[one.name] != one.default]
    parts = {one.name: unmet_part(one.only_if, values) for one in changed}
    return {name: part for name, part in parts.items() if part}


def check_effects(config: Config) -> None:
    """Whether every field that was changed from its default has an effect.

    Raises:
      ConfigError: some have none; the message names those that have none for the same reason.
    """
    found = without_effect(config)
    if not found:
        return
    values, part = dict(walk(config)), next(iter(found.values()))
    names = [name for name, reason in found.items() if reason == part]
    given = ", ".join(f"{name}={as_word(values[name])}" for name in names)
    defaults = ", ".join(as_word(SETTINGS[name].default) for name in names)
    causes = names_in(part)
    now = ", ".join(f"{name} is {as_word(values[name])}" for name in causes)
    one = len(names) == 1
    raise ConfigError(
        f"{given} {'has' if one else 'have'} no effect: {'it is' if one else 'they are'} read only "
        f"if {part}, but "
        f"{now}; change {' or '.join(causes)}, or leave {'it' if one else 'them'} at {defaults}"
    )


def _check_setting(one: Setting, value: Any) -> None:
    if isinstance(value, str) and value in one.words:
        return
    accepted = (int, float) if one.kind is float else one.kind
    # A bool is an int to Python, but never meant as one here.
    if not isinstance(value, accepted) or (one.kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{one.name} must be of type {one.kind.__name__}; got {value!r}")
    if one.choices and value not in one.choices:
        known = {choice.lower(): choice for choice in one.choices}
        close = difflib.get_close_matches(value.lower(), known, n=1)
        hint = f"; did you mean {known[close[0]]}?" if close else ""
        choices = ", ".join(as_word(choice) for choice in one.choices)
        raise ConfigError(f"{one.name} must be one of {choices}; got {value!r}{hint}")
    if one.allowed and not is_allowed(value, one.allowed):
        raise ConfigError(f"{one.name} must be {one.allowed}; got {value}")
