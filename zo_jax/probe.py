"""Settings that find themselves: a perturbation size and a learning rate, with their reasons."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import numpy as np
import optax

from zo_jax import lines, trials
from zo_jax.estimators import Estimator, make_estimator, takes_options, typed_key
from zo_jax.trees import as_arrays
from zo_jax.update import Update

OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
# The budget is that of so many trials, one of which stands for what else there is. A trial has at
# least so many steps, and so many queries: along fewer directions curvature is a matter of luck.
_TRIALS, _FEWEST_STEPS, _FEWEST_QUERIES = 5, 16, 32
# Directions of a measurement, a part of the run's queries, and batches that tell the decrease of a
# trial, a part of its evaluations; the fewest and the most of them.
_FOR_DIRECTIONS, _DIRECTIONS = 1 / 160, (8, 1024)
_FOR_DECREASE, _BATCHES = 1 / 16, (4, 32)
# Steps after which an optimiser answers as in a long run.
_LONG = 300


class Probe(NamedTuple):
    """Proposed settings, what was measured, and why.

    Attributes:
      epsilon: the perturbation size.
      learning_rate: for the optimiser and the number of steps that were given; with a schedule its
        peak.
      noise: standard deviation of the rounding error of one loss.
      gradient_norm: ‖∇L(θ)‖ of the mean loss over batches, without minibatch noise.
      projection_rms: root of the mean square of a projection, minibatch noise included.
      curvature: the trace of the Hessian at θ.
      noise_share: of the squares of projections after the best trial, the part that is minibatch
        noise; 1 with an optimiser that brings its steps to one size.
      trial_steps: steps of a trial.
      trials: (learning rate, with a schedule its peak; decrease of the loss), by rate; the decrease
        is -inf where a trial was given up.
      num_evaluations: of the loss, all in all.
      reasons: a few lines for people.
    """

    epsilon: float
    learning_rate: float
    noise: float
    gradient_norm: float
    projection_rms: float
    curvature: float
    noise_share: float
    trial_steps: int
    trials: tuple[tuple[float, float], ...]
    num_evaluations: int
    reasons: str


@takes_options
def probe(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *batch: Any,
    num_steps: int,
    optimizer: str | Callable[[Any], Any] = "sgd",
    schedule: Callable[[Any], Any] | None = None,
    batch_fn: Callable[[int], tuple[Any, ...]] | None = None,
    budget: float = 0.1,
    report: Callable[[str], Any] = lambda text: None,
    estimator: Estimator | None = None,
    **options: Any,
) -> Probe:
    """Finds an epsilon and a learning rate for a run of so many steps.

    epsilon is that of `zo_jax.lines.best_epsilon`. For the rate, trials of n steps with the run's
    own estimator and optimiser, and its schedule in n steps, at rates that differ by factors of
    two, find the best rate η_n of n steps. Without minibatch noise it is the best of the run's T
    steps too; with nothing else η_n √(n/T) is, as for any stochastic gradient descent (Nemirovski
    et al., "Robust stochastic approximation approach to stochastic programming", 2009). In between,
    with s the fourth root of the share of minibatch noise in the squares of projections after the
    best trial (`zo_jax.trials.for_longer_run`),

        η_T = 2 η_n / ((1 - s) + √((1 - s)² + 4 s T/n)).

    Steps that an optimiser brings to one size do not shrink with the gradient, which is s = 1.

    The first trial is at the rate where a quadratic model of the loss falls most in a step,
    q ‖∇L‖² / (E[c²] tr ∇²L) for SGD, over the mean of a schedule. In ‖∇L‖² = E[c c'] the two
    projections are of different batches along the same direction, so that their minibatch noise
    leaves it alone.

    Numbers decide how it goes on, so it is called outside `jax.jit`. The same arguments give the
    same proposal. It holds the parameters three times, and the state of the optimiser once.

    Args:
      loss_fn: `loss_fn(params, *batch)` -> floating scalar, as for `Estimator.project`.
      params: pytree of arrays, where training is to start.
      key: a PRNG key of the threefry implementation.
      *batch: the batch of every step, if it is always the same.
      num_steps: T, of the run.
      optimizer: "sgd", "adam", or a function from a learning rate, a traced scalar, to an optax
        transformation or an `Update`; with a schedule it is given each step's rate anew.
      schedule: function of the step from 0, the course of the rate as parts of `learning_rate`;
        None: constant.
      batch_fn: in the place of `batch`: `batch_fn(step)` -> the batch of a step, a tuple.
      budget: the part of the run's evaluations that a probe takes, roughly; short runs, for a trial
        has at least 16 steps and 32 queries, take more.
      report: called with a line of text when something has been measured, such as `print`; a large
        model takes minutes.
      estimator: an `Estimator`; default `Estimator()`.
      **options: fields of `Estimator`, which replace those of `estimator`. An `epsilon` among them
        is kept; that of `estimator` is looked at for "jvp" alone, which has no use for it.

    Raises:
      ValueError: as `Estimator.project`; the loss is not finite at the parameters, or does not
        change with them; no trial lowers it; or an argument is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> loss_fn = lambda w: jnp.sum((w - 1) ** 2)
    >>> found = zo_jax.probe(loss_fn, jnp.zeros(64), jax.random.key(0), num_steps=99, num_queries=4)
    >>> bool(0.3 < found.learning_rate / (4 / 128) < 2)
    True
    """
    estimator = make_estimator(estimator, options)
    if estimator.exact is not None:
        raise ValueError(
            "probe measures directions, which have no part in what is exact: leave exact out, or "
            "choose epsilon and rate by hand"
        )
    if estimator.family.has_dual:
        raise ValueError(
            "probe measures slopes along the directions that it sums, and these are two with "
            f"{type(estimator.family).__name__}: leave it out, or choose epsilon and rate by hand"
        )
    _check_arguments(params, batch, num_steps, optimizer, batch_fn, budget)
    params, key = as_arrays(params), typed_key(key)
    look_key, measure_key, trial_key = jax.random.split(key, 3)
    batches = batch_fn or (lambda step: batch)

    line = lines.look_along(estimator, loss_fn, params, look_key, *batches(0))
    if options.get("epsilon") is None and estimator.difference != "jvp":
        epsilon = lines.best_epsilon(line, estimator.difference)
        estimator = dataclasses.replace(estimator, epsilon=epsilon)
        report(f"epsilon {epsilon:.2g}, by {line.num_evaluations} evaluations along a line")
    bench = trials.Bench(loss_fn, estimator, _make_update_at(optimizer), lines.best_epsilon(line))

    a_step = estimator.num_evaluations
    fewest = max(_FEWEST_STEPS, math.ceil(_FEWEST_QUERIES / estimator.num_queries))
    steps = max(fewest, round(budget * num_steps / _TRIALS))
    course = _course(schedule, num_steps, steps)
    num_directions = _between(_FOR_DIRECTIONS * num_steps * estimator.num_queries, _DIRECTIONS)
    num_groups = math.ceil(num_directions / estimator.num_queries)
    num_held_out = _between(_FOR_DECREASE * steps * a_step, _BATCHES) if batch_fn else 1
    held_out = [batches(steps + i) for i in range(num_held_out)]

    def measure(params: Any, first: int) -> trials.Measured:
        pair = lambda i: (batches(first + 2 * i), batches(first + 2 * i + 1))
        groups = [pair(i) if batch_fn else (batch,) for i in range(num_groups)]
        return bench.measure(params, measure_key, groups)

    start = measure(params, 0)
    size = math.sqrt(start.square / estimator.num_queries)  # of an entry of an estimate
    mean = sum(course) / steps
    guess, in_long_run = (bench.response(size, n).best_rate(start) / mean for n in (steps, _LONG))
    before = bench.mean_loss(params, held_out)
    report(f"slope and curvature along {num_groups * estimator.num_queries} directions")

    def run(rate: float) -> trials.Trial:
        trial = bench.trial(params, trial_key, rate, course, batches, held_out, before)
        found = f"{trial.decrease:.3g} less loss" if trial.decrease > 0 else "no less loss"
        report(f"learning rate {rate:.2g}: {found} in {steps} steps")
        return trial

    done = trials.search(run, guess)
    rate, best = trials.peak(done)

    noise_share = 1.0 if bench.normalizes(size, steps) else 0.0
    if batch_fn and not noise_share:
        noise_share = measure(best.params, steps).noise_share
    # Momentum takes some steps until it is there, so trials stand larger rates than a run. Where
    # the first steps are the noisiest, as Adam's are, trials say too little; it is left at that,
    # since too small a rate costs less than too large a one.
    rate *= min(in_long_run / guess, 1.0) * trials.for_longer_run(noise_share, num_steps / steps)
    found = Probe(
        epsilon=float(estimator.epsilon),
        learning_rate=rate,
        noise=line.noise,
        gradient_norm=math.sqrt(start.squared_norm),
        projection_rms=math.sqrt(start.square),
        curvature=start.curvature,
        noise_share=noise_share,
        trial_steps=steps,
        trials=tuple((rate, done[rate].decrease) for rate in sorted(done)),
        num_evaluations=line.num_evaluations + bench.num_evaluations,
        reasons="",
    )
    return found._replace(reasons=_reasons(found, line, estimator, num_steps))


def _check_arguments(
    params: Any, batch: Any, num_steps: Any, optimizer: Any, batch_fn: Any, budget: Any
) -> None:
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((params, batch))):
        raise ValueError("probe decides by numbers, got traced ones; call it outside jax.jit")
    if batch and batch_fn is not None:
        raise ValueError("probe takes a batch or batch_fn, got both; leave one of them out")
    if isinstance(num_steps, bool) or not hasattr(num_steps, "__index__") or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, got {num_steps!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be above 0 and at most 1, got {budget!r}")
    if not callable(optimizer) and optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer must be one of {', '.join(OPTIMIZERS)}, or a function from a learning rate "
            f"to an optax transformation; got {optimizer!r}"
        )


def _make_update_at(optimizer: str | Callable[[Any], Any]) -> Callable[[Any], Update]:
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer

    def update_at(rate: Any) -> Update:
        made = make(rate)
        return made if isinstance(made, Update) else Update(made)

    return update_at


def _between(number: float, limits: tuple[int, int]) -> int:
    return min(max(round(number), limits[0]), limits[1])


def _course(
    schedule: Callable[[Any], Any] | None, num_steps: int, num_parts: int
) -> tuple[float, ...]:
    """A schedule over a run in so many parts, the mean over four steps of each."""
    if schedule is None:
        return (1.0,) * num_parts
    steps = np.linspace(0, num_steps, 4 * num_parts, endpoint=False).astype(int)
    values = [float(schedule(int(step))) for step in steps]
    return tuple(np.reshape(values, (num_parts, 4)).mean(axis=1).tolist())


def _reasons(found: Probe, line: lines.Line, estimator: Estimator, num_steps: int) -> str:
    """A few lines for people."""
    truncation = found.epsilon**2 / 6 * line.third
    rounding = line.noise / (math.sqrt(2) * found.epsilon)
    if estimator.difference == "forward":
        truncation, rounding = found.epsilon / 2 * line.second, 2 * rounding
    part = lambda x: f"{x / max(line.slope, 1e-30):.2g}"
    best = max(found.trials, key=lambda trial: trial[1])[0]
    tried = ", ".join(f"{rate:.2g}: {decrease:.3g}" for rate, decrease in found.trials)
    run = num_steps * estimator.num_evaluations
    told = [
        f"loss {line.loss:.6g} ± {line.noise:.2g} by rounding, slope {line.slope:.3g} along a line",
        f"epsilon {found.epsilon:.2g}: {part(truncation)} of the slope is lost by truncation, "
        f"{part(rounding)} by rounding",
        f"gradient norm {found.gradient_norm:.3g}, projections {found.projection_rms:.3g}, trace "
        f"of the Hessian {found.curvature:.3g}",
        f"decrease of the loss in {found.trial_steps} steps, by learning rate: {tried}",
        f"learning_rate {found.learning_rate:.2g} for {num_steps} steps is "
        f"{found.learning_rate / best:.2g} of the best of these: a part of {found.noise_share:.2f} "
        "of the squared steps is noise that stays when the gradient falls",
        f"cost: {found.num_evaluations} evaluations; the run makes {run}",
    ]
    return "\n".join(told if estimator.difference != "jvp" else [told[0], *told[2:]])
