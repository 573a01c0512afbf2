"""The rows of benchmarks/field.py: every method of zo_jax/methods, the plain estimate, backprop."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from field_tasks import Task
import jax
import optax

import zo_jax
from zo_jax import methods
from zo_jax.trees import matrices

# A backprop gradient costs as much as two more passes; with checkpoints one pass is made again.
PASSES_OF_A_GRADIENT, PASSES_OF_A_CHECKPOINTED = 3, 4
# MeZO-SVRG's large batch, in batches, and how often it is read.
LARGE, PERIOD = 8, 5
# Options of methods that a task's matrices bound.
RANKS = ("rank", "num_directions")
CONTROL = "plain"

Transformation = optax.GradientTransformationExtraArgs


class Method(NamedTuple):
    """A row of the tables.

    Attributes:
      label: what it is.
      passes: of a step, in the mean, forward; or (task) -> them.
      make: (task, key) -> what stands in the place of the gradient.
      rates: with which tuning begins, for each of TASKS.
      optimizer: between it and the learning rate.
      last: (key) -> what stands behind the learning rate.
      loss: the name of that function of a task.
      reads_large: whether a step is handed a large batch.
      at_equal_memory: whether the batch is halved until a step takes no more memory than one of
        the plain estimate.
    """

    label: str
    passes: float | Callable[[Task], float]
    make: Callable[[Task, jax.Array], Any]
    rates: tuple[float, float, float]
    optimizer: Callable[[], Any] = optax.identity
    last: Callable[[jax.Array], Any] = lambda key: optax.identity()
    loss: str = "loss"
    reads_large: bool = False
    at_equal_memory: bool = False


def _plain(num_queries: int, perturbation: Any = "rademacher") -> Callable[[Task, jax.Array], Any]:
    return lambda task, key: zo_jax.zeroth_order(
        key, num_queries=num_queries, epsilon=task.epsilon, perturbation=perturbation
    )


def _of(method: Any, num_queries: int = 1, **options: Any) -> Callable[[Task, jax.Array], Any]:
    """A method with its own directions and difference, the task's ε, and no higher a rank than the
    task's matrices have room for.
    """

    def make(task: Task, key: jax.Array) -> Any:
        own = dict(num_queries=num_queries, epsilon=task.epsilon)
        ranks = {name: min(r, task.width // 2) for name, r in options.items() if name in RANKS}
        estimator = dataclasses.replace(method().estimator, **own)
        return method(estimator, **options | ranks).transformation(key)

    return make


def _population(method: Any, population: int) -> Callable[[Task, jax.Array], Any]:
    return lambda task, key: method(population, task.epsilon).transformation(key)


def _grzo(task: Task, key: jax.Array) -> Any:
    return _of(methods.Grzo, task.batch_size)(task, key)


def _agzo(task: Task, key: jax.Array) -> Any:
    return _of(methods.Agzo, input_axis=task.input_axis, is_matrix=task.is_matrix)(task, key)


def _normalised_beside_matrices(
    make: Callable[[Task, jax.Array], Any],
) -> Callable[[Task, jax.Array], Any]:
    """With the updates of all that is no matrix together of norm 1, as every singular value of a
    matrix is; else their scale is another, and one rate does not fit both.
    """

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda yes: "matrix" if yes else "other", matrices(params))

    def chained(task: Task, key: jax.Array) -> Any:
        kinds = {"matrix": optax.identity(), "other": optax.normalize_by_update_norm()}
        return optax.chain(make(task, key), optax.partition(kinds, labels))

    return chained


def _gradient(task: Task, key: jax.Array) -> Transformation:
    """Backpropagation."""

    def update(updates, state, params=None, *, value_fn, batch=(), **extra_args):
        return jax.grad(value_fn)(params, *batch), state

    return Transformation(lambda params: optax.EmptyState(), update)


def _at_equal_memory(
    label: str, rates: tuple[float, float, float], optimizer: Callable[[], Any] = optax.identity
) -> Method:
    """Backprop with activation checkpointing, on as much of a batch as there is memory for."""
    return Method(
        f"{label}, at equal memory",
        PASSES_OF_A_CHECKPOINTED,
        _gradient,
        rates,
        optimizer,
        loss="checkpointed_loss",
        at_equal_memory=True,
    )


METHODS = {
    CONTROL: Method("plain, signs, q = 1", 2, _plain(1), (1e-3, 1e-2, 2e-5)),
    "plain_4": Method("plain, signs, q = 4", 8, _plain(4), (4e-3, 4e-2, 8e-5)),
    "plain_16": Method("plain, signs, q = 16", 32, _plain(16), (1e-2, 1e-1, 3e-4)),
    "low_rank": Method("plain, rank 1, q = 1", 2, _plain(1, "low_rank"), (1e-3, 1e-2, 2e-5)),
    "low_rank_16": Method("plain, rank 1, q = 16", 32, _plain(16, "low_rank"), (1e-2, 1e-1, 3e-4)),
    "plain_adam": Method(
        "plain, signs, q = 4, Adam", 8, _plain(4), (3e-3, 1e-3, 1e-5), optax.scale_by_adam
    ),
    "fzoo": Method("FZOO, q = 8", 9, _of(methods.Fzoo, 8), (1e-4, 1e-3, 1e-6)),
    "curvature": Method("1.5-SPSA, q = 16", 33, _of(methods.CurvatureSpsa, 16), (1e-2, 1e-1, 3e-4)),
    "es": Method(
        "evolution strategy, N = 30", 30, _population(methods.evolution_strategy, 30), (1e-3,) * 3
    ),
    "eggroll": Method("EGGROLL, N = 64", 64, _population(methods.eggroll, 64), (1e-3,) * 3),
    "lozo": Method("LOZO, r = 2", 2, _of(methods.Lozo, rank=2), (1e-3, 1e-2, 2e-5)),
    "lozo_m": Method("LOZO-M, r = 2", 2, _of(methods.Lozo, rank=2, decay=0.9), (1e-3, 1e-2, 2e-5)),
    "subzero": Method("SubZero, r ≤ 32", 2, _of(methods.SubZero, rank=32), (1e-3, 1e-2, 2e-5)),
    "tezo": Method("TeZO, r ≤ 24", 2, _of(methods.Tezo, rank=24), (1e-3, 1e-2, 2e-5)),
    "tezo_m": Method(
        "TeZO-m, r ≤ 24", 2, _of(methods.Tezo, rank=24, decay=0.9), (1e-3, 1e-2, 2e-5)
    ),
    "agzo": Method(
        "AGZO, r = 1",
        # Three power iterations, forward and back.
        lambda task: 3 + 2 * 3 * task.share,
        _agzo,
        (1e-3, 1e-2, 2e-5),
        loss="token_losses",
    ),
    "zo_muon": Method(
        "ZO-Muon, q = 4, r ≤ 64",
        5,
        _normalised_beside_matrices(_of(methods.ZoMuon, 4, rank=64)),
        (1e-2, 1e-2, 1e-3),
    ),
    "mopi": Method(
        "ZO-MOPI, q = 4, r ≤ 64",
        8,
        _normalised_beside_matrices(_of(methods.Mopi, 4, rank=64, num_directions=8)),
        (1e-2, 1e-2, 1e-3),
    ),
    "hizoo": Method("HiZOO, q = 1", 3, _of(methods.Hizoo), (1e-3, 1e-2, 2e-5)),
    "conmezo": Method("ConMeZO", 2, _of(methods.ConMezo), (1e-3, 1e-2, 2e-5)),
    "sparse": Method("Sparse MeZO, a quarter", 2, _of(methods.SparseMezo), (1e-3, 1e-2, 2e-5)),
    "svrg": Method(
        f"MeZO-SVRG, k = {PERIOD}, {LARGE} batches",
        (2 * LARGE + 4 * (PERIOD - 1)) / PERIOD,
        _of(methods.MezoSvrg, period=PERIOD),
        (1e-3, 1e-2, 2e-5),
        reads_large=True,
    ),
    "grzo": Method("GRZO, a direction an example", 2, _grzo, (1e-3, 1e-2, 2e-5)),
    "dizo": Method(
        "DiZO, q = 1, 5 iterations each 50 steps",
        2 + 2 * 5 / 50,
        _plain(1),
        (1e-3, 1e-2, 2e-5),
        last=methods.dizo,
    ),
    "addax": Method(
        "Addax, q = 1, with backprop",
        2 + PASSES_OF_A_GRADIENT,
        lambda task, key: methods.addax(
            key, estimator=zo_jax.Estimator(num_queries=1, epsilon=task.epsilon)
        ),
        (0.1, 0.1, 1e-2),
    ),
    "backprop_sgd": _at_equal_memory("backprop, SGD", (0.1, 0.1, 1e-2)),
    "backprop_adam": _at_equal_memory("backprop, Adam", (3e-3, 1e-3, 1e-4), optax.scale_by_adam),
    "backprop_adam_batch": Method(
        "backprop, Adam, the whole batch",
        PASSES_OF_A_GRADIENT,
        _gradient,
        (3e-3, 1e-3, 1e-4),
        optax.scale_by_adam,
    ),
}
