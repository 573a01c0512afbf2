"""What a loss is like along random lines: its rounding noise, its derivatives, and the perturbation
size that follows from them.

All of it comes from tables of the loss at seven points, L(θ + j h z) for j = -3..3, along a few
directions z, at spacings h that are looked for.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from zo_jax.estimators import Estimator

# Truncation that a projection may have, as a part of the spread of projections: a twentieth adds
# 1/400 to the variance of the estimate, and room is left for a loss whose third derivative grows.
TRUNCATION = 0.05
# Directions of a table, and its points to either side of the parameters.
DIRECTIONS, REACH = 3, 3
# The spacing that is tried first, the widest, and by what it changes.
_FIRST, _WIDEST, _FACTOR, _MOST_TABLES = 1e-3, 1.0, 4.0, 12


class Line(NamedTuple):
    """What a loss is like along random directions z, at one batch.

    Attributes:
      loss: L(θ).
      noise: σ, the standard deviation of the rounding error of one evaluation.
      slope: root of the mean square of ⟨∇L, z⟩.
      curvature: mean of zᵀ∇²L z, an estimate of the Hessian's trace.
      second: root of the mean square of zᵀ∇²L z.
      third: root of the mean square of D³L[z, z, z]; 0 where it does not show above the noise.
      spacing: of the points that the derivatives come from.
      num_evaluations: of the loss.
    """

    loss: float
    noise: float
    slope: float
    curvature: float
    second: float
    third: float
    spacing: float
    num_evaluations: int


def noise_level(values: Any) -> float:
    """The noise of a function from its values at points of equal spacing (Moré and Wild,
    "Estimating computational noise", 2011).

    Of the differences Δᵏ of order k what is smooth vanishes, and independent noise of variance σ²
    stays: E[(Δᵏf)²] = σ² (2k)!/(k!)². Orders four, five and six tell it, if they tell about the same.

    Args:
      values: [..., K], several tables of K points, 7 or more, side by side; squares are averaged.

    Returns:
      σ; 0 if half of all neighbours are equal (points too close, or a function constant piece by
      piece); nan if the orders differ by more than a factor of four (points too far apart).

    >>> import numpy as np
    >>> x = np.arange(30) * 1e-3
    >>> values = np.sin(x) + 1e-4 * np.random.default_rng(0).normal(size=30)
    >>> bool(0.5e-4 < noise_level(values) < 2e-4), noise_level(np.ones(7)), noise_level(np.exp(np.arange(7)))
    (True, 0.0, nan)
    """  # noqa: E501
    values = np.asarray(values, np.float64)
    if np.mean(np.diff(values) == 0) >= 0.5:
        return 0.0
    level = lambda k: float(np.sqrt(np.mean(np.diff(values, k) ** 2) / math.comb(2 * k, k)))
    levels = [level(k) for k in (4, 5, 6)]
    agree = max(levels) <= 4 * min(levels)
    return float(np.sqrt(np.mean(np.square(levels)))) if agree else float("nan")


def look_along(
    estimator: Estimator, loss_fn: Callable[..., Any], params: Any, key: jax.Array, *batch: Any
) -> Line:
    """The noise and the derivatives of a loss along random directions, from a few dozen evaluations.

    The spacing of a table is right for the noise where its differences of high order are noise, and
    for the derivatives where the third stands out from the noise, or where the slope no longer
    outweighs the curvature.

    Args:
      estimator: its family of directions and how it evaluates; its number of queries and its
        epsilon have no say.
      loss_fn, params, key, *batch: as of `Estimator.project`.

    Raises:
      ValueError: the loss is not finite at the parameters, or does not change along the directions.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> line = look_along(zo_jax.Estimator(), lambda w: jnp.sum(jnp.sin(w)), jnp.ones(50), jax.random.key(0))
    >>> bool(line.noise < 1e-5), bool(abs(line.curvature / (-50 * jnp.sin(1.0)) - 1) < 0.1)
    (True, True)
    """  # noqa: E501
    tables = _Tables(estimator, loss_fn, params, key, batch)
    noise, spacing = _find_noise(tables)
    # Derivatives need wider tables than noise does.
    while True:
        line = _derivatives(tables, spacing, noise)
        wider = spacing * _FACTOR
        reach = REACH * spacing
        is_seen = line.third > 0 or (line.second > 0 and reach * line.second > line.slope)
        if is_seen or wider > _WIDEST or not np.all(np.isfinite(tables.at(wider))):
            return line._replace(num_evaluations=tables.num_evaluations)
        spacing = wider


def best_epsilon(line: Line, difference: str = "central") -> float:
    """The perturbation size for projections that are as right as can be, or, where many sizes are
    right enough, the largest of them.

    The error of a central difference is ε²/6 |D³L[z, z, z]| by truncation and σ/(√2 ε) by noise,
    and their sum of squares is least at ε = (3σ / |D³L|)^⅓. Of a forward difference it is
    ε/2 |zᵀ∇²L z| and √2 σ/ε: 8^¼ (σ / |zᵀ∇²L z|)^½ (Moré and Wild, "Estimating derivatives of noisy
    simulations", 2012). If truncation is below a twentieth of the slope up to a larger ε, that one
    is taken, for slopes fall while a model trains and noise does not; but not one whose curvature
    outweighs the slope.

    Args:
      line: what the loss is like.
      difference: "central" or "forward".

    >>> line = Line(loss=1.0, noise=1e-7, slope=1.0, curvature=1.0, second=1.0, third=0.3, spacing=1e-3, num_evaluations=0)
    >>> round(best_epsilon(line), 3), round(best_epsilon(line._replace(slope=1e-5)), 3)
    (1.0, 0.01)
    """  # noqa: E501
    part = lambda x, y: x / y if y else math.inf
    if difference == "forward":
        least = (8**0.5 * part(line.noise, line.second)) ** 0.5
        enough = 2 * TRUNCATION * part(line.slope, line.second)
    else:
        least = part(3 * line.noise, line.third) ** (1 / 3)
        enough = (6 * TRUNCATION * part(line.slope, line.third)) ** 0.5
        enough = min(enough, part(line.slope, line.second))
    # A derivative that does not show at a spacing does no harm there.
    least = least if math.isfinite(least) else line.spacing
    return float(max(least, min(enough, _WIDEST)))


class _Tables:
    """The loss at the points of tables, float64 [directions, 7] by spacing, evaluated once."""

    def __init__(
        self,
        estimator: Estimator,
        loss_fn: Callable[..., Any],
        params: Any,
        key: jax.Array,
        batch: tuple[Any, ...],
    ):
        count = DIRECTIONS
        if estimator.batch_per_query:  # a direction has a batch of its own, and there are so many
            count = min(count, estimator.num_queries)
            batch = jax.tree.map(lambda x: x[:count], batch)
        own = dataclasses.replace(estimator, num_queries=count, epsilon=_FIRST)
        points = np.arange(-REACH, REACH + 1, dtype=np.float32)
        self._evaluate = jax.jit(
            lambda params, key, spacing, *batch: own.losses_along(
                loss_fn, params, key, spacing * points, *batch
            )
        )
        self._arguments, self._known = (params, key, batch), {}

    def at(self, spacing: float) -> np.ndarray:
        if spacing not in self._known:
            params, key, batch = self._arguments
            losses = self._evaluate(params, key, np.float32(spacing), *batch)
            self._known[spacing] = np.asarray(losses, np.float64)
            # What the loss was computed in, or better: float32.
            self.resolution = float(np.finfo(losses.dtype).eps)
        return self._known[spacing]

    @property
    def num_evaluations(self) -> int:
        return sum(table.size for table in self._known.values())


def _find_noise(tables: _Tables) -> tuple[float, float]:
    """(σ, the spacing of a table that shows it)."""
    spacing, was_flat = _FIRST, False
    for _ in range(_MOST_TABLES):
        table = tables.at(spacing)
        if not np.all(np.isfinite(table[:, REACH])):
            raise ValueError(
                f"the loss at the parameters must be finite, got {table[0, REACH]}; give "
                "others, or another batch"
            )
        noise = noise_level(table) if np.all(np.isfinite(table)) else float("nan")
        # Noise far above rounding may be a function that turns between two points.
        if noise > 100 * tables.resolution * np.max(np.abs(table)):
            finer = noise_level(tables.at(spacing / _FACTOR**2))
            noise = noise if np.isnan(finer) or finer == 0 or 4 * finer > noise else float("nan")
        if noise > 0:
            return noise, spacing
        if np.isnan(noise) and was_flat:
            # Between the two spacings steps of the loss show one by one: they are its noise.
            return float(np.max(np.abs(np.diff(table)))), spacing
        was_flat = noise == 0
        spacing *= _FACTOR if was_flat else 1 / _FACTOR
        if spacing > _WIDEST:
            raise ValueError(
                "the loss must change with the parameters, but it is the same at distances up to "
                f"{REACH * spacing / _FACTOR:.2g} along {len(table)} directions: it is constant, "
                "or constant piece by piece as an accuracy is; give one that is not, such as a "
                "cross-entropy"
            )
    return tables.resolution * float(np.max(np.abs(table[:, REACH]))), spacing


def _derivatives(tables: _Tables, spacing: float, noise: float) -> Line:
    """Central differences of a table, less what noise adds to their squares."""
    left, middle, right = np.split(tables.at(spacing), [REACH, REACH + 1], axis=1)
    odd, even = right - left[:, ::-1], right + left[:, ::-1] - 2 * middle
    first, second = odd[:, 0] / (2 * spacing), even[:, -1] / (REACH * spacing) ** 2
    third = (odd[:, 2] - 3 * odd[:, 0]) / (2 * spacing) ** 3
    # Sums of values with these squares of weights.
    of_first, of_second, of_third = (
        noise**2 * weight / spacing**power
        for weight, power in ((2 / 4, 2), (6 / REACH**4, 4), (20 / 64, 6))
    )
    seen = lambda x, variance: (
        float(np.sqrt(np.mean(x**2) - variance)) if np.mean(x**2) > 4 * variance else 0.0
    )
    return Line(
        loss=float(np.mean(middle)),
        noise=noise,
        slope=float(np.sqrt(max(np.mean(first**2) - of_first, 0.0))),
        curvature=float(np.mean(second)),
        second=seen(second, of_second),
        third=seen(third, of_third),
        spacing=spacing,
        num_evaluations=0,
    )
