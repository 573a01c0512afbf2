"""The methods of the field that `zo.method` names, made of what a configuration says."""

from collections.abc import Callable
import json
from typing import Any, TypeVar

from zo_jax import methods
from zo_jax.estimators import Estimator
from zo_jax.methods import Method
from zo_jax.train.config import KEPT, OWN_DIRECTIONS, UNRECORDED, Config, ConfigError, ZOConfig

Made = TypeVar("Made")


def _evolution(estimator: Estimator, **options: Any) -> Method:
    """A member for each query."""
    sizes = dict(population=estimator.num_queries, sigma=estimator.epsilon)
    own = dict(perturbation=estimator.family, antithetic=False)
    return methods.evolution_strategy(estimator=estimator, **sizes, **own | options)


def _eggroll(estimator: Estimator, **options: Any) -> Method:
    """A pair of members for each query."""
    sizes = dict(population=2 * estimator.num_queries, sigma=estimator.epsilon)
    own = dict(perturbation=estimator.family)
    return methods.eggroll(estimator=estimator, **sizes, **own | options)


# FZOO is plain but for the weights of its directions, so its runs are plain ones.
_MADE: dict[str, Callable[..., Method]] = {
    "spsa15": methods.CurvatureSpsa,
    "evolution": _evolution,
    "eggroll": _eggroll,
    "lozo": methods.Lozo,
    "subzero": methods.SubZero,
    "tezo": methods.Tezo,
    "mopi": methods.Mopi,
    "zo_muon": methods.ZoMuon,
    "hizoo": methods.Hizoo,
    "conmezo": methods.ConMezo,
    "sparse_mezo": methods.SparseMezo,
    "svrg": methods.MezoSvrg,
    "grzo": methods.Grzo,
}


def _check_small_batch(config: Config, small: int | None) -> None:
    """Of SVRG."""
    chunks, whole = config.zo.batch_chunks, config.train.batch_size
    if small is not None and (small >= whole or small % chunks):
        raise ValueError(
            f"small_batch must be below train.batch_size={whole} and a multiple of "
            f"zo.batch_chunks={chunks}, got {small}"
        )


def make_method(config: Config, estimator: Estimator) -> Method | None:
    """The method of a run, of its estimator; None for those that are plain estimates.

    Raises:
      ConfigError: the method has no such option, or the estimator is not one that it is made for.
    """
    name = config.zo.method
    if name not in _MADE:
        return None

    def make(**options: Any) -> Method:
        method = _MADE[name](estimator, **options)
        if isinstance(method, methods.MezoSvrg):
            _check_small_batch(config, method.small_batch)
        by_flipout = isinstance(method, methods.Grzo) and method.use_flipout
        if by_flipout or name in OWN_DIRECTIONS:
            check_directions(config)
        return method

    return made(config, make)


def check_directions(config: Config) -> None:
    """Raises a ValueError if directions are chosen for a method with its own."""
    if config.zo.perturbation != ZOConfig.perturbation:
        raise ValueError(
            f"its directions are its own; leave zo.perturbation at {ZOConfig.perturbation}"
        )


def made(config: Config, make: Callable[..., Made]) -> Made:
    """What `make` makes of the options of a run's method.

    Raises:
      ConfigError: it raises a TypeError or a ValueError, or the options are none.
    """
    try:
        options = json.loads(config.zo.method_options or "{}")
        if not isinstance(options, dict):
            raise ValueError('they must be an object, like {"decay": 0.9}')
        return make(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"zo.method={config.zo.method} cannot be made of "
            f"zo.method_options={config.zo.method_options!r} and the other settings of zo: {error}"
        ) from None


def check_method(config: Config) -> None:
    """Raises a ConfigError if other settings leave a method with numbers or a memory of its own no
    room; whether it can be made of them, `make_method` says.
    """
    zo = config.zo
    if zo.perturbation in KEPT:
        raise ConfigError(
            f"zo.method={zo.method} and zo.perturbation={zo.perturbation} are two methods: choose "
            f"zo.perturbation=gaussian, or zo.method={zo.perturbation} alone"
        )
    if zo.epsilon == "auto":
        raise ConfigError(f"zo.method={zo.method} needs a number as zo.epsilon, got auto")
    if config.mesh.model > 1:
        raise ConfigError(
            f"zo.method={zo.method} keeps what lasts from step to step whole on each device: set "
            f"mesh.model=1, got {config.mesh.model}"
        )
    if zo.method == "grzo" and zo.num_queries != config.train.batch_size:
        raise ConfigError(
            "zo.method=grzo has a direction for each example: zo.num_queries must be "
            f"train.batch_size={config.train.batch_size}, got {zo.num_queries}"
        )
    if zo.method == "grzo" and zo.batch_per_query:
        raise ConfigError("zo.method=grzo reads one batch: set zo.batch_per_query=false")
    if zo.method == "grzo" and (zo.parallel_batch_size, zo.batch_chunks) != (1, 1):
        raise ConfigError(
            "zo.method=grzo evaluates the examples of a batch at once: leave "
            "zo.parallel_batch_size and zo.batch_chunks at 1"
        )
    if zo.method in UNRECORDED and zo.batch_per_query:
        raise ConfigError(f"zo.method={zo.method} reads one batch: set zo.batch_per_query=false")
    if zo.method == "agzo" and config.task.name != "text":
        raise ConfigError(
            "zo.method=agzo reads the losses of the tokens of text: it needs task.name=text, got "
            f"{config.task.name}"
        )
    if zo.method in ("evolution", "eggroll") and zo.difference != ZOConfig.difference:
        raise ConfigError(
            f"zo.method={zo.method} compares members rather than taking differences: leave "
            f"zo.difference at {ZOConfig.difference}, got {zo.difference}"
        )
