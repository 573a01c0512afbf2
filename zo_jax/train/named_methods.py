"""The methods of the field that `zo.method` names, made of what a configuration says."""

from collections.abc import Callable
import json
from typing import Any

from zo_jax import methods
from zo_jax.estimators import Estimator
from zo_jax.methods import Method
from zo_jax.train.config import KEPT, Config, ConfigError


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
    "grzo": methods.Grzo,
}


def make_method(config: Config, estimator: Estimator) -> Method | None:
    """The method of a run, of its estimator; None for those that are plain estimates.

    Raises:
      ConfigError: the method has no such option, or the estimator is not one that it is made for.
    """
    name = config.zo.method
    if name not in _MADE:
        return None
    try:
        options = json.loads(config.zo.method_options or "{}")
        if not isinstance(options, dict):
            raise ValueError('they must be an object, like {"decay": 0.9}')
        return _MADE[name](estimator, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"zo.method={name} cannot be made of zo.method_options={config.zo.method_options!r} "
            f"and the other settings of zo: {error}"
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
