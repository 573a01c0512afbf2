"""What a step does once its forward passes are done: a function of the key and the projections.

A run replays bit for bit because training and replay call the same compiled function.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zo_jax import entrywise, rounding
from zo_jax.estimators import mean_weights
from zo_jax.family import Family
from zo_jax.layout import Layout
from zo_jax.trees import WHOLE, Subset, tree_dot

# No entry of a direction is larger.
_LARGEST_ENTRY = 1e3
# A gradient of at most this norm is not scaled up by a clip.
_MIN_NORM = 1e-12


class TrainState(NamedTuple):
    """What a step changes. Keys and batches are functions of the seed and the step.

    Attributes:
      step: int32, steps taken.
      params: the model's parameters.
      opt_state: optax's state, of the parameters that are trained.
      num_skipped: int32, those of the steps that changed nothing, for want of a finite loss.
      skipped_in_row: int32, those of them since the last step that changed something.
      family: of the directions, where it learns from their projections; otherwise None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    num_skipped: jax.Array
    skipped_in_row: jax.Array
    family: Any = None


class UpdateMetrics(NamedTuple):
    """Scalars of one step.

    Attributes:
      loss: float32, as handed to the step.
      grad_norm: float32, of the estimate.
      num_updates: int32, steps of the optimiser before this one, of which its schedule is a
        function.
      num_skipped: as in `TrainState`, after this step.
      skipped_in_row: likewise.
    """

    loss: jax.Array
    grad_norm: jax.Array
    num_updates: jax.Array
    num_skipped: jax.Array
    skipped_in_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Update:
    """The optimisation of a step: pure functions of the state.

    The optimiser works in float32 whatever the dtype of the parameters: a second moment in bfloat16
    could not decay.

    Attributes:
      optimizer: an optax transformation, of gradients.
      subset: the parameters that are trained; leaves that are not floating never are.
      clip_norm: largest global norm of an estimate (0: any).
      rounding: of parameters of 16 bits, "stochastic" or "nearest"; see `rounding.apply`.
      layout: where the state lives; each device then sums and applies what it holds.
      weights: projections [q] -> the weights [q] of their directions, 0 where one is not finite; of
        a method that is no mean, such as `zo_jax.methods.Fzoo`.
    """

    optimizer: optax.GradientTransformation
    subset: Subset = WHOLE
    clip_norm: float = 0.0
    rounding: str = "stochastic"
    layout: Layout | None = None
    weights: Callable[[jax.Array], jax.Array] = mean_weights

    def init(self, params: Any, family: Family | None = None) -> TrainState:
        """The state before the first step; `family`, if it learns, as `Family.start` returns it."""
        zero = lambda: jnp.zeros((), jnp.int32)
        opt_state = self.optimizer.init(_as_float32(self._trained(params).select(params)))
        return TrainState(zero(), params, opt_state, zero(), zero(), family)

    def from_projections(
        self,
        perturbation: Family,
        state: TrainState,
        key: jax.Array,
        loss: jax.Array,
        projections_q: jax.Array,
    ) -> tuple[TrainState, UpdateMetrics]:
        """A step along ĝ = 1/q Σ cᵢ zᵢ, or with other weights, summed again from the key: of the
        data only the projections c have a part in it. A family in the state is taken rather than
        `perturbation`, and learns.

        If none of them is finite the step changes nothing, but is counted.
        """
        perturbation = perturbation if state.family is None else state.family
        keys = jax.random.split(key, len(projections_q))
        weights = self.weights(projections_q)
        trained = _as_float32_shapes(self._trained(state.params).select(state.params))
        family = perturbation.on(self.layout)
        # Told without the gradient, whose leaves can then be made and applied one by one.
        usable = jnp.any(jnp.isfinite(projections_q))
        usable &= jnp.isfinite(_LARGEST_ENTRY * jnp.sum(jnp.abs(weights)))
        if state.family is not None:
            state = state._replace(family=perturbation.learn(trained, keys, projections_q))
        if self.clip_norm:
            gradient, norm = family.combine_with_norm(trained, keys, weights)
            gradient, norm = clip(gradient, self.clip_norm), jnp.minimum(norm, self.clip_norm)
            return self._descend(state, key, loss, jax.tree.leaves(gradient), norm, usable)
        sums, squared = family.sums(trained, keys, weights)
        return self._descend(state, key, loss, sums, None, usable, squared)

    def from_gradient(
        self, state: TrainState, key: jax.Array, loss: jax.Array, gradient: Any
    ) -> tuple[TrainState, UpdateMetrics]:
        """A step along a gradient of the trained parameters; if it or the loss is not finite, only
        the count of it.
        """
        norm = optax.global_norm(gradient)
        usable = jnp.isfinite(loss) & jnp.isfinite(norm)
        return self._descend(state, key, loss, jax.tree.leaves(gradient), norm, usable)

    def _descend(
        self,
        state: TrainState,
        key: jax.Array,
        loss: jax.Array,
        sums: list[Any],
        norm: jax.Array | None,
        usable: jax.Array,
        squared: Any = 0,
    ) -> tuple[TrainState, UpdateMetrics]:
        """The step along a gradient, whose leaves are arrays or `RowSum`s.

        Without its norm that comes from `squared`, the square of that of the arrays.
        """
        subset = self._trained(state.params)
        old = subset.select(state.params)

        def step(leaves: list[jax.Array], old: Any) -> Any:
            params, opt_state = old
            gradient = jax.tree.unflatten(jax.tree.structure(params), leaves)
            updates, opt_state = self.optimizer.update(
                _as_float32(gradient), opt_state, _as_float32(params)
            )
            new = rounding.apply(params, updates, key, self.rounding), opt_state
            return jax.tree.map(lambda new, old: new.astype(old.dtype), new, old_state)

        # Adam's momentum would move the parameters with a zero gradient too.
        old_state = old, state.opt_state
        (trained, opt_state), rest = entrywise.apply(step, sums, old_state, usable)
        norm = jnp.sqrt(squared + rest) if norm is None else norm
        skipped = (~usable).astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            params=subset.merge(state.params, trained),
            opt_state=opt_state,
            num_skipped=state.num_skipped + skipped,
            skipped_in_row=skipped * (state.skipped_in_row + 1),
            family=state.family,
        )
        if self.layout is not None:
            new = self.layout.constrain(new)
        num_updates = state.step - state.num_skipped
        return new, UpdateMetrics(loss, norm, num_updates, new.num_skipped, new.skipped_in_row)

    def _trained(self, params: Any) -> Subset:
        return self.subset.floating(params)


def make_update(
    optimizer: optax.GradientTransformation, perturbation: Family, **options: Any
) -> Callable[..., tuple[TrainState, UpdateMetrics]]:
    """The jitted optimisation of a step: (state, key, loss, projections [q]) -> (state, metrics),
    the state donated.

    Args:
      optimizer: an optax transformation, of gradients.
      perturbation: the family of the directions.
      options: of `Update`.

    >>> import jax, jax.numpy as jnp, optax, zo_jax
    >>> loss_fn, params = lambda p: jnp.sum((p - 1) ** 2), jnp.zeros(4)
    >>> optimizer = optax.sgd(0.05)
    >>> state, update = zo_jax.Update(optimizer).init(params), make_update(optimizer, zo_jax.rademacher())
    >>> for step in range(50):
    ...     key = jax.random.fold_in(jax.random.key(0), step)
    ...     state, _ = update(state, key, *zo_jax.project(loss_fn, state.params, key, num_queries=8))
    >>> bool(loss_fn(state.params) < 1e-2)
    True
    """  # noqa: E501
    update = Update(optimizer, **options)
    step = lambda state, *record: update.from_projections(perturbation, state, *record)
    return jax.jit(step, donate_argnums=0)


def clip(gradient: Any, norm: float) -> Any:
    """The gradient with its global norm brought down to `norm`, unless that is 0."""
    if not norm:
        return gradient
    size = jnp.sqrt(tree_dot(gradient, gradient))
    factor = jnp.minimum(1.0, norm / jnp.maximum(size, _MIN_NORM))
    return jax.tree.map(lambda g: (factor * g).astype(g.dtype), gradient)


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _as_float32_shapes(tree: Any) -> Any:
    wide = lambda x: jnp.promote_types(x.dtype, jnp.float32)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, wide(x)), tree)
