"""What a run changes, what is told and kept of a step, and the state before the first one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zo_jax.layout import Layout
from zo_jax.train import guided_steps
from zo_jax.train.choices import (
    base_key,
    make_estimator,
    make_rules,
    own_method,
    scope_of,
    unrecorded_method,
)
from zo_jax.train.config import Config
from zo_jax.trees import ALL, WHOLE, Subset
from zo_jax.update import TrainState, Update


class RunState(NamedTuple):
    """All that a run changes.

    Attributes:
      train: step, parameters, optimiser state and counts.
      history: of the losses, for the adaptive schedule of mode instruct; elsewhere None.
      num_flat: int32, steps so far whose scores were all equal; None where a loss is lowered.
    """

    train: TrainState
    history: guided_steps.LossHistory | None
    num_flat: jax.Array | None = None

    @property
    def step(self) -> jax.Array:
        return self.train.step

    @property
    def params(self) -> Any:
        return self.train.params


class StepMetrics(NamedTuple):
    """Scalars of one step, nan where it has no such thing.

    Attributes:
      loss, grad_norm, learning_rate: float32.
      num_skipped, skipped_in_row: int32, as in `TrainState`, after this step.
      cosine_target, noise_scale: float32, of guided directions.
      drift: float32, how far the trained parameters are from the anchor.
      num_flat: int32, as in `RunState`, after this step.
      best_score: float32, the best member's mean score.
    """

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    num_skipped: jax.Array
    skipped_in_row: jax.Array
    cosine_target: jax.Array
    noise_scale: jax.Array
    drift: jax.Array
    num_flat: jax.Array | float
    best_score: jax.Array | float


class StepRecord(NamedTuple):
    """What `update` needs to take a step again.

    Attributes:
      key: uint32 [2], the words of the step's key.
      loss: float32.
      projections: float32 [q], or the numbers of a method.
    """

    key: jax.Array
    loss: jax.Array
    projections: jax.Array


def init_state(config: Config, model: Any, layout: Layout | None = None) -> RunState:
    """The state before the first step, each array where it belongs: fresh parameters from the seed
    alone, or those of a pretrained model.
    """
    rules = make_rules(config, model, layout)
    params = model.start(jax.random.fold_in(base_key(config), 2**31), layout)

    init = lambda params: _begin(config, model, rules, layout, params)
    places = layout and layout.shardings(jax.eval_shape(init, params))
    return jax.jit(init, donate_argnums=0, out_shardings=places)(params)


def state_shapes(config: Config, model: Any) -> RunState:
    """The shapes of `init_state`, without allocating any."""
    rules = make_rules(config, model)
    begin = lambda params: _begin(config, model, rules, None, params)
    return jax.eval_shape(begin, model.shapes())


def _begin(
    config: Config, model: Any, rules: Update, layout: Layout | None, params: Any
) -> RunState:
    history = guided_steps.new_history() if config.instruct.adaptive else None
    num_flat = None if config.objective.name == "loss" else jnp.zeros((), jnp.int32)
    family = _start(config, model, layout, params)
    return RunState(rules.init(params, family), history, num_flat)


def _start(config: Config, model: Any, layout: Layout | None, params: Any) -> Any:
    """What directions depend on at the first step: the family if it learns, the memory of a method;
    otherwise None.
    """
    method = own_method(config)
    unrecorded = unrecorded_method(config, layout, model)
    if not (method or unrecorded) and config.zo.groups == "none":
        return None
    trained = scope_of(config, model).select(params)
    if unrecorded:
        return unrecorded.transformation(base_key(config)).init(trained)
    return method.init(trained) if method else make_estimator(config, layout, model).start(trained)


def kept_part(config: Config, model: Any) -> Subset:
    """What checkpoints keep of a run's state: all but the parameters that are not trained, which
    come from the seed or from a pretrained model.
    """
    scope = scope_of(config, model)
    if scope.indices is None:
        return WHOLE
    num_leaves = len(jax.tree.leaves(state_shapes(config, model)))
    # The leaves are the step, the parameters, and the rest.
    rest = num_leaves - 1 - len(scope.indices)
    return Subset((ALL, *scope.indices, *(ALL,) * rest))
