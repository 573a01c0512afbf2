"""Runs of equal programs share their compiled functions: tracing takes most of a tiny run."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.train import finish, loop, run
from zo_jax.train.config import Config
from zo_jax.train.run_folder import resume
from zo_jax.train.tasks import text

# (where it is looked up, its name, whether what it returns is donated)
_MAKERS = (
    (loop, "make_train_step", False),
    (loop, "make_update", False),
    (resume, "make_update", False),
    (resume, "init_state", True),
    (finish, "init_state", True),
    (run, "count_trained", False),
    (text, "make_evaluate", False),
)


def share(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Replaces the functions that make a run's programs by such as make each of them once."""
    made: dict[tuple[str, ...], Any] = {}
    for module, name, is_donated in _MAKERS:
        replace(module, name, _once(getattr(module, name), made, is_donated))


def _once(make: Callable[..., Any], made: dict, is_donated: bool) -> Callable[..., Any]:
    @functools.wraps(make)
    def shared(*arguments: Any) -> Any:
        key = make.__name__, *(_relevant(argument) for argument in arguments)
        if key not in made:
            made[key] = make(*arguments)
        return jax.tree.map(jnp.copy, made[key]) if is_donated else made[key]

    return shared


def _relevant(argument: Any) -> str:
    """What tells a program from another: of a configuration neither its data nor its reports, of
    the loss of a text its model.
    """
    if isinstance(getattr(argument, "__self__", None), text.TextTask):
        argument = argument.__self__.model
    if not isinstance(argument, Config):
        return repr(argument)
    is_open = argument.optimizer.schedule == "constant"
    length = None if is_open else argument.train.num_steps
    return repr((dataclasses.replace(argument, data=None, train=None), length))
