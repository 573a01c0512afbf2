"""A learning rate from projections and a few short trials of training.

Axes: q queries.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from zo_jax.estimators import Estimator
from zo_jax.update import Update

# Rates of trials differ by this factor; after so many of them none is found.
_RATIO, _MOST = 2.0, 24
# Entries on which the response of an optimiser is seen, [side, side].
_SIDE = 64

# The batch of a step, from 0.
Batches = Callable[[int], tuple[Any, ...]]


class Measured(NamedTuple):
    """Projections c at some parameters.

    Attributes:
      square: E[c²].
      squared_norm: E[c c'] of two batches along the same directions, ‖∇L‖².
      curvature: mean of zᵀ∇²L z, the trace of ∇²L.
      curvature_error: its standard error.
    """

    square: float
    squared_norm: float
    curvature: float
    curvature_error: float

    @property
    def noise_share(self) -> float:
        """The part of E[c²] that is minibatch noise."""
        return 1 - self.squared_norm / self.square


class Response(NamedTuple):
    """What an optimiser of rate 1 makes of independent estimates.

    Attributes:
      signal: the sum of its steps along the sum of the estimates, as a part of that.
      noise: mean square of an entry of the sum of its steps, over their number.
    """

    signal: float
    noise: float

    def best_rate(self, there: Measured) -> float:
        """η of the largest decrease η signal ‖∇L‖² - η²/2 noise tr ∇²L.

        The curvature is held to be no less than its error.
        """
        least = 1e-6 * math.sqrt(there.square)  # of a loss without any
        curvature = max(there.curvature, there.curvature_error, least)
        return self.signal * there.squared_norm / (self.noise * curvature)


class Trial(NamedTuple):
    """A short run.

    Attributes:
      decrease: of the loss on held-out batches; -inf if it was given up.
      params: after it; None if it was given up, or another is better.
    """

    decrease: float
    params: Any


class Bench:
    """A loss with an estimator and an optimiser, compiled, and the count of its evaluations.

    Args:
      loss_fn: as of `Estimator.project`.
      estimator: of the run.
      update_at: from a learning rate to the `Update` of a step.
      epsilon: of the central differences of `measure`.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        estimator: Estimator,
        update_at: Callable[[Any], Update],
        epsilon: float,
    ):
        def along(estimator: Estimator, scales: Sequence[float]) -> Callable[..., jax.Array]:
            losses = lambda *x: estimator.losses_along(loss_fn, *x[:2], scales, *x[2:])
            return jax.jit(losses)

        def update(rate: Any, state: Any, *record: Any) -> Any:
            return update_at(rate).from_projections(estimator.family, state, *record)[0]

        # One evaluation tells the loss, unless each query has a batch of its own.
        count = estimator.num_queries if estimator.batch_per_query else 1
        self.num_evaluations = 0
        self._estimator, self._update_at, self._epsilon = estimator, update_at, epsilon
        self._sides = along(estimator, [epsilon, -epsilon])
        self._middle = along(dataclasses.replace(estimator, num_queries=count), [0.0])
        self._project = jax.jit(lambda *x: estimator.project(loss_fn, *x)[:2])
        self._update = jax.jit(update, donate_argnums=1)
        self._respond = jax.jit(lambda *x: _feed(update_at, *x))

    def response(self, size: float, num_steps: int) -> Response:
        """Of the optimiser to so many estimates, found by feeding it such.

        Args:
          size: standard deviation of the entries of an estimate, which are normal.
          num_steps: of a run.
        """
        return Response(*map(float, self._respond(size, num_steps)))

    def normalizes(self, size: float, num_steps: int) -> bool:
        """Whether the optimiser brings its steps to one size, whatever that of the estimates is."""
        one, two = (self.response(x, num_steps).noise for x in (size, 2 * size))
        return two < 2 * one  # without: four times

    def measure(self, params: Any, key: jax.Array, groups: Sequence[Sequence[Any]]) -> Measured:
        """Projections of groups of one or two batches, each along q directions of its own."""
        squares, products, bends = [], [], []
        for i, group in enumerate(groups):
            own = jax.random.fold_in(key, i)
            sides = [self._losses(self._sides, params, own, batch) for batch in group]
            middles = [self._losses(self._middle, params, own, batch) for batch in group]
            c = [(side[:, 0] - side[:, 1]) / (2 * self._epsilon) for side in sides]
            squares += [x**2 for x in c]
            products.append(c[0] * c[-1])
            for side, middle in zip(sides, middles, strict=True):
                bends.append((side.sum(1) - 2 * middle[:, 0]) / self._epsilon**2)
        square, product = float(np.mean(squares)), float(np.mean(products))
        if not (math.isfinite(square) and square > 0):
            raise ValueError(
                "projections must be finite and not all 0 to tell a learning rate, got a mean "
                f"square of {square}: the loss is not finite for a batch, or the parameters are "
                "where it is least"
            )
        error = lambda x: float(np.std(x)) / math.sqrt(np.size(x))
        return Measured(
            square=square,
            squared_norm=min(max(product, error(products)), square),
            curvature=float(np.mean(bends)),
            curvature_error=error(bends),
        )

    def trial(
        self,
        params: Any,
        key: jax.Array,
        rate: float,
        course: Sequence[float],
        batches: Batches,
        held_out: Sequence[Any],
        before: float,
    ) -> Trial:
        """A run from `params`, at `rate` times a number of `course` each step, given up at a
        quarter of them if it has not brought the loss on held-out batches below what it was
        `before`.

        Raises:
          ValueError: the optimiser keeps its rate in its state, and the course is not constant.
        """
        state = self._update_at(rate).init(jax.tree.map(jnp.copy, params))
        if len(set(course)) > 1 and optax.tree.get_all_with_path(state.opt_state, "hyperparams"):
            raise ValueError(
                "an optimizer is given its rate anew at every step of a schedule, and one of "
                "optax.inject_hyperparams keeps the first; take the transformation itself"
            )
        decrease, num_steps = -math.inf, len(course)
        for step in range(num_steps):
            own = jax.random.fold_in(key, step)
            record = self._project(state.params, own, *batches(step))
            self.num_evaluations += self._estimator.num_evaluations
            state = self._update(np.float32(rate * course[step]), state, own, *record)
            if step + 1 in (-(-num_steps // 4), num_steps):
                decrease = before - self.mean_loss(state.params, held_out)
                if not decrease > 0:
                    return Trial(-math.inf, None)
        return Trial(decrease, state.params)

    def mean_loss(self, params: Any, held_out: Sequence[Any]) -> float:
        key = jax.random.key(0)  # of directions along which nothing moves
        return float(np.mean([self._losses(self._middle, params, key, x) for x in held_out]))

    def _losses(self, function: Any, params: Any, key: jax.Array, batch: Any) -> np.ndarray:
        losses = function(params, key, *batch)
        self.num_evaluations += losses.size
        return np.asarray(losses, np.float64)


def _feed(update_at: Callable[[Any], Update], size: Any, num_steps: Any) -> tuple[Any, Any]:
    """The signal and the noise of a `Response`."""
    small = 1e-4  # a rate at which parameters stay near zero, so that their decay has no say
    update, shape = update_at(jnp.float32(small)), (_SIDE, _SIDE)
    zero = jnp.zeros(())

    def step(i, carry):
        state, total, squares = carry
        key = jax.random.fold_in(jax.random.key(0), i)
        gradient = size * jax.random.normal(key, shape)
        state, _ = update.from_gradient(state, key, zero, {"kernel": gradient})
        return state, total + gradient, squares + jnp.sum(gradient**2)

    start = update.init({"kernel": jnp.zeros(shape)}), jnp.zeros(shape), zero
    state, total, squares = lax.fori_loop(0, num_steps, step, start)
    moved = -state.params["kernel"] / small
    return jnp.sum(moved * total) / squares, jnp.mean(moved**2) / num_steps


def search(run: Callable[[float], Trial], guess: float) -> dict[float, Trial]:
    """Trials by their rates, factors of two apart, until the best has a worse one above it and two
    below, and the lowest was not given up: rates that are far too large may lower the loss too, and
    some of them more than their neighbours.

    Raises:
      ValueError: none lowers it, or none is too large.

    >>> trials = search(lambda rate: Trial(rate - rate**2, None), guess=0.1)
    >>> [round(rate, 3) for rate in sorted(trials)], round(peak(trials)[0], 3)
    ([0.05, 0.1, 0.2, 0.4, 0.8], 0.5)
    """
    trials = {0: run(guess)}
    while len(trials) < _MOST:
        best = max(trials, key=lambda i: (trials[i].decrease, -i))
        missing = [i for i in (best - 1, best + 1, best - 2) if i not in trials]
        if not missing and trials[lowest := min(trials)].decrease == -math.inf:
            missing = [lowest - 1]
        if not missing:
            return {guess * _RATIO**i: trial for i, trial in trials.items()}
        new = run(guess * _RATIO ** missing[0])
        # Parameters are kept once.
        worse = best if new.decrease > trials[best].decrease else missing[0]
        trials[missing[0]] = new
        trials[worse] = trials[worse]._replace(params=None)
    low, high = (guess * _RATIO ** bound(trials) for bound in (min, max))
    any_lowers = any(trial.decrease > 0 for trial in trials.values())
    found = "larger ones only lower it more" if any_lowers else "none lowers the loss"
    raise ValueError(
        f"a learning rate must be found between {low:.2g} and {high:.2g}, where {found}; does the "
        "run start at a minimum, or has the loss none?"
    )


def peak(trials: dict[float, Trial]) -> tuple[float, Trial]:
    """(the rate of the largest decrease, the trial next to it).

    Between the best trial's rate r and r/2 the decrease is taken to be a η - b η², which is largest
    at η = a/2b, no farther than a factor of √2 from r, and not above it if 2r was given up.
    """
    rate = max(trials, key=lambda rate: trials[rate].decrease)
    one, half = trials[rate].decrease, max(trials[rate / _RATIO].decrease, 0.0)
    a, b = 4 * half - one, 4 * half - 2 * one  # with r = 1
    place = a / (2 * b) if b > 0 else math.inf
    highest = 2**0.5 if trials[rate * _RATIO].decrease > 0 else 1.0
    return rate * min(max(place, 0.5**0.5), highest), trials[rate]


def for_longer_run(noise_share: float, times: float) -> float:
    """η_T/η_n for a run of so many `times` the n steps of which η_n is the best rate.

    Of what bounds the rate, 1/η, let the part s after n steps come from minibatch noise. It grows
    as ‖∇L‖² falls, like the sum of the rates, and the rest stays: 1/η_T = (1 - s)/η_n + s η_T T /
    (η_n² n). Without noise that is η_n, with nothing else η_n √(n/T).

    s is the fourth root of the share of noise. The share itself would do if curvature did not grow
    as well; the root errs on the side of small rates, which cost less than large ones.

    >>> for_longer_run(0.0, 100.0), for_longer_run(1.0, 100.0), round(for_longer_run(0.3, 100.0), 3)
    (1.0, 0.1, 0.114)
    """
    s = noise_share**0.25
    return 2 / (1 - s + math.sqrt((1 - s) ** 2 + 4 * s * times))
