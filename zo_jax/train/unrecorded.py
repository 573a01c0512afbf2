"""The methods that `zo.method` names whose steps look at their data in ways that no numbers tell:
AGZO, DiZO and Addax. Their runs have no ledger, and go on from checkpoints.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from zo_jax import methods
from zo_jax.estimators import Estimator
from zo_jax.methods.method import FIRST
from zo_jax.train.config import UNRECORDED, Config
from zo_jax.train.named_methods import check_directions, made
from zo_jax.train.scopes import make_scope


class Unrecorded(NamedTuple):
    """A method as an optax transformation.

    Attributes:
      transformation: (key) -> it, of parameters that are trained.
      evaluations_until: (steps) -> the forward passes of a batch in so many.
      is_last: whether it moves what the optimiser has moved, and is handed no gradient to make.
      reads_tokens: whether its loss is that of every token.
    """

    transformation: Callable[[Any], optax.GradientTransformationExtraArgs]
    evaluations_until: Callable[[int], int]
    is_last: bool = False
    reads_tokens: bool = False


def make_unrecorded(config: Config, estimator: Estimator, model: Any = None) -> Unrecorded | None:
    """The method of a run, of its estimator; None for all others.

    Args:
      config: with its name and options.
      estimator: as of `make_estimator`.
      model: as of `make_scope`; AGZO reads where its layers are. None where no step is taken.

    Raises:
      ConfigError: the method has no such option, or not these values, or nothing to move.
    """
    name = config.zo.method
    if name not in UNRECORDED:
        return None
    makers = {"agzo": _agzo, "dizo": _dizo, "addax": _addax}
    return made(config, lambda **options: makers[name](config, estimator, model, **options))


def _agzo(config: Config, estimator: Estimator, model: Any, **options: Any) -> Unrecorded:
    """Of the matrices of layers; what is looked up, and the head, have normal numbers."""
    check_directions(config)
    stack = model and model.stack
    method = methods.Agzo(
        estimator,
        input_axis=-1 if config.model.path else -2,
        is_matrix=lambda path, leaf: path.startswith(f"{stack}/"),
        **options,
    )
    if model:
        trained = jax.eval_shape(make_scope(config.scope, model).select, model.shapes())
        if not jax.tree.leaves(jax.eval_shape(method.init, trained)):
            raise ValueError(
                f"its directions are those of the matrices of layers, and scope={config.scope} "
                "trains none of them; choose another scope"
            )
    until = lambda count: count * method.num_evaluations
    return Unrecorded(method.transformation, until, reads_tokens=True)


def _dizo(
    config: Config,
    estimator: Estimator,
    model: Any,
    period: int = 50,
    num_iterations: int = 5,
    **options: Any,
) -> Unrecorded:
    """Behind the optimiser, of plain estimates."""
    del config, model
    make = lambda key: methods.dizo(key, period, num_iterations, **options)
    # The options are looked at before the first step.
    make(FIRST.key)
    searches = lambda count: 2 * num_iterations * (count // period)
    until = lambda count: count * estimator.num_evaluations + searches(count)
    return Unrecorded(make, until, is_last=True)


def _addax(config: Config, estimator: Estimator, model: Any, **options: Any) -> Unrecorded:
    """The gradient of the first examples of a batch, and an estimate on the others."""
    del model
    chunks, whole = config.zo.batch_chunks, config.train.batch_size
    small = options.setdefault("small_batch", whole // 2 or None)
    if small is not None and (small >= whole or (whole - small) % chunks):
        raise ValueError(
            f"small_batch must leave a multiple of zo.batch_chunks={chunks} of the "
            f"train.batch_size={whole} examples to directions, got {small}"
        )
    make = lambda key: methods.addax(key, estimator=estimator, **options)
    make(FIRST.key)
    return Unrecorded(make, lambda count: count * (estimator.num_evaluations + 1))
