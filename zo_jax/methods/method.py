"""What a method is: a step in two halves, and the optax transformation that they make.

`project` has all the forward passes, and returns some numbers. `combine` makes updates of them and
of the step's key, without a loss and without data. So a run of any method is its parameters at the
start, its key and its numbers, as everywhere in this library; `transformation` replays it if the
numbers are handed in.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zo_jax.estimators import Estimator, mean_weights, typed_key
from zo_jax.family import Family
from zo_jax.noise import key_words, own_words
from zo_jax.trees import as_arrays

# Folded into a run's key for what lasts several steps; counts of steps are smaller.
_LASTING = np.uint32(2**32 - 1)


class Step(NamedTuple):
    """Which step of which run, as far as it decides what is drawn.

    Attributes:
      root: uint32 [2], the words of the run's key.
      count: int32, the steps taken before.
    """

    root: jax.Array
    count: jax.Array

    @property
    def key(self) -> jax.Array:
        """The step's own key."""
        return jax.random.fold_in(typed_key(self.root), self.count)

    def lasting(self, period: int | None) -> jax.Array:
        """A key that stays the same for `period` steps; for all of them if that is None."""
        first = jax.random.fold_in(typed_key(self.root), _LASTING)
        return first if period is None else jax.random.fold_in(first, self.count // period)


# For what has the shapes of a step alone.
FIRST = Step(np.zeros(2, np.uint32), np.zeros((), np.int32))  # pyright: ignore


class MethodState(NamedTuple):
    """State of a method's transformation.

    Attributes:
      key: uint32 [2], the words of the key that was given.
      count: int32, steps taken.
      loss: float32, of the last step (inf before the first).
      numbers: float32 [n], what the last step's forward passes said: with its key all that a replay
        needs.
      num_failed: int32, of those how many were not finite.
      memory: what the method keeps between steps: a pytree of arrays, () for most.
    """

    key: jax.Array
    count: jax.Array
    loss: jax.Array
    numbers: jax.Array
    num_failed: jax.Array
    memory: Any


@dataclasses.dataclass(frozen=True)
class Method:
    """A zeroth-order method: plain estimates unless a subclass says otherwise.

    Attributes:
      estimator: how losses are evaluated; its family draws the directions that a method starts
        from.

    Raises:
      ValueError: the estimator has `has_aux`, for which an update has no place, or `exact`, whose
        gradient is no matter of numbers.

    >>> import jax, jax.numpy as jnp, optax, zo_jax
    >>> method = zo_jax.methods.Method(zo_jax.Estimator(num_queries=4))
    >>> tx = optax.chain(method.transformation(jax.random.key(0)), optax.sgd(0.05))
    >>> loss_fn = lambda p: jnp.sum((p - 1) ** 2)
    >>> update = jax.jit(lambda state, params: tx.update(None, state, params, value_fn=loss_fn))
    >>> params = jnp.zeros(4)
    >>> state = tx.init(params)
    >>> for _ in range(50):
    ...     updates, state = update(state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(loss_fn(params) < 1e-2)
    True
    """

    estimator: Estimator = Estimator()

    # Whether a step can be taken again from its numbers, without data.
    replays: ClassVar[bool] = True

    def __post_init__(self):
        if self.estimator.has_aux:
            raise ValueError(
                f"{self._name} returns updates alone: set has_aux=False, and return the loss from "
                "value_fn"
            )
        if self.estimator.exact is not None:
            raise ValueError(
                f"{self._name} makes updates of numbers alone: set exact=None, and partition the "
                "parameters with optax.partition"
            )

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def num_numbers(self) -> int:
        """n, the numbers of a step."""
        return self.estimator.num_queries

    @property
    def num_evaluations(self) -> int:
        """Forward passes of a batch in a step."""
        return self.estimator.num_evaluations

    def evaluations_until(self, count: int) -> int:
        """Those in the first `count` steps."""
        return count * self.num_evaluations

    def init(self, params: Any) -> Any:
        """The memory before the first step."""
        del params
        return ()

    def family(self, params: Any, memory: Any, step: Step) -> Family:
        """The directions of a step."""
        del params, memory, step
        return self.estimator.family

    def at(self, params: Any, memory: Any, step: Step) -> Estimator:
        """The estimator of a step: with its directions, and the ε of its count."""
        epsilon = self.estimator.epsilon
        if callable(epsilon):
            epsilon = epsilon(step.count)
        family = self.family(params, memory, step)
        return dataclasses.replace(self.estimator, epsilon=epsilon, perturbation=family)

    def prepare(
        self, loss_fn: Callable[..., Any], params: Any, memory: Any, step: Step, *batch: Any
    ) -> Any:
        """The memory that a step's passes begin with, where the data decides it."""
        del loss_fn, params, step, batch
        return memory

    def project(
        self,
        loss_fn: Callable[..., Any],
        params: Any,
        memory: Any,
        step: Step,
        *batch: Any,
        **extra: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """The forward passes of a step: (loss, numbers [n])."""
        del extra
        loss, projections = self.at(params, memory, step).project(loss_fn, params, step.key, *batch)
        return loss, projections

    def combine(self, params: Any, memory: Any, step: Step, numbers: jax.Array) -> tuple[Any, Any]:
        """(updates, memory) from the numbers alone; updates are descended, as a gradient is."""
        estimator = self.at(params, memory, step)
        weights = self.weights(numbers, estimator.epsilon)
        return estimator.family.combine(params, estimator.keys(step.key), weights), memory

    def weights(self, numbers: jax.Array, epsilon: Any) -> jax.Array:
        """The weights [q] of the directions in the updates."""
        del epsilon
        return mean_weights(numbers)

    def transformation(self, key: jax.Array) -> optax.GradientTransformationExtraArgs:
        """The method in the place of the gradient in an optax chain, like `zo_jax.zeroth_order`.

        `update(updates, state, params, value_fn=..., batch=())` evaluates `value_fn(params,
        *batch)`; the updates may be None. With `numbers=...`, those of a step's state, no loss is
        evaluated: the step is taken again.

        Args:
          key: a PRNG key of the threefry implementation.

        Returns:
          The transformation; its state is a `MethodState`.

        Raises:
          ValueError: from `update`, `params`, or `value_fn` and `numbers`, are missing.
        """
        words = key_words(typed_key(key))

        def init_fn(params: Any) -> MethodState:
            zero = lambda: jnp.zeros((), jnp.int32)
            numbers = jnp.zeros(self.num_numbers, jnp.float32)
            memory = self.init(as_arrays(params))
            loss = jnp.full((), jnp.inf, jnp.float32)
            return MethodState(own_words(words), zero(), loss, numbers, zero(), memory)

        def update_fn(
            updates: Any,
            state: Any,
            params: Any = None,
            *,
            value_fn: Callable[..., jax.Array] | None = None,
            batch: tuple[Any, ...] = (),
            numbers: jax.Array | None = None,
            **extra_args: Any,
        ) -> tuple[Any, MethodState]:
            del updates
            if params is None or (value_fn is None and numbers is None):
                raise ValueError(
                    f"{self._name} evaluates the loss of perturbed parameters: pass both to update,"
                    " as tx.update(None, state, params, value_fn=lambda params: loss)"
                )
            if numbers is not None and not self.replays:
                raise ValueError(
                    f"a step of {self._name} depends on its data: pass value_fn and the batch, not "
                    "numbers"
                )
            params, step = as_arrays(params), Step(state.key, state.count)
            loss, memory = state.loss, state.memory
            if numbers is None:
                assert value_fn is not None
                memory = self.prepare(value_fn, params, memory, step, *batch)
                loss, numbers = self.project(value_fn, params, memory, step, *batch, **extra_args)
            numbers = jnp.asarray(numbers, jnp.float32)
            new, memory = self.combine(params, memory, step, numbers)
            return new, MethodState(
                key=state.key,
                count=jnp.asarray(optax.safe_increment(state.count)),
                loss=loss.astype(jnp.float32),
                numbers=numbers,
                num_failed=jnp.sum(~jnp.isfinite(numbers), dtype=jnp.int32),
                memory=memory,
            )

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def require_difference(method: Method, *differences: str) -> None:
    """Raises a ValueError if a method is not defined for its estimator's difference."""
    if method.estimator.difference not in differences:
        raise ValueError(
            f"{method._name} needs an estimator with difference "
            f"{' or '.join(map(repr, differences))}, got {method.estimator.difference!r}"
        )


def require_positive(name: str, value: Any) -> None:
    """Raises a ValueError if a number of steps, or a rank, is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def require_share(name: str, value: float) -> None:
    """Raises a ValueError if a number is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
