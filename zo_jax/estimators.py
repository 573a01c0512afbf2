"""Zeroth-order gradient estimates of any scalar loss of a pytree.

For directions z₁..z_q with E[z zᵀ] = I and projections cᵢ ≈ ⟨∇L(θ), zᵢ⟩ the estimate is ĝ = (1/q) Σᵢ cᵢ zᵢ. It depends on
the data only through the q scalars c, so it has two halves: `project` evaluates the loss, and
`Family.combine` sums the directions again from their keys. No direction is ever stored.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from zo_jax.families import rademacher
from zo_jax.family import Family
from zo_jax.interpreter import lazily

DIFFERENCES = ("central", "forward", "jvp")


class Estimate(NamedTuple):
    """A gradient estimate.

    Attributes:
      gradient: like params, Σᵢ cᵢ zᵢ over the number of queries with a finite loss.
      loss: float32 scalar, the mean over those queries (central: of both sides).
      projections: float32 [q], the directional derivatives cᵢ; nan where the loss was not finite.
      num_failed: int32 scalar, the queries whose loss was not finite.
    """

    gradient: Any
    loss: jax.Array
    projections: jax.Array
    num_failed: jax.Array


def estimate_gradient(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    *batch: Any,
    num_queries: int = 8,
    epsilon: float = 1e-3,
    perturbation: Family | None = None,
    difference: str = "central",
    parallel_batch_size: int = 1,
    batch_per_query: bool = False,
    mesh: Mesh | None = None,
    query_axis: str = "query",
) -> Estimate:
    """Gradient estimate from loss evaluations alone (Spall 1992; Nesterov and Spokoiny 2017).

    ĝ = (1/q) Σᵢ cᵢ zᵢ with, for query i and its key `jax.random.split(key, q)[i]`,

    - central: cᵢ = (L(θ + ε zᵢ) − L(θ − ε zᵢ)) / 2ε, two evaluations a query, bias O(ε²);
    - forward: cᵢ = (L(θ + ε zᵢ) − L(θ)) / ε, one evaluation a query and one more, bias O(ε)
      (one more for each query with `batch_per_query`);
    - jvp: cᵢ = ⟨∇L(θ), zᵢ⟩ by forward-mode differentiation, exact, ε unused.

    Use it under `jax.jit`. The same arguments give the same directions eager, jitted, under `vmap` and for every
    `parallel_batch_size`.

    Args:
      loss_fn: `loss_fn(params, *batch)` -> floating scalar; any JAX code.
      params: pytree of arrays; the floating leaves are perturbed, the others left alone.
      key: a PRNG key of the threefry implementation.
      *batch: pytrees handed to `loss_fn`.
      num_queries: q, the directions.
      epsilon: ε, the perturbation size. With bfloat16 arithmetic inside the loss, 1e-2 is a good choice.
      perturbation: family of directions; default `rademacher()`.
      difference: "central", "forward" or "jvp".
      parallel_batch_size: queries evaluated at once; memory grows with it.
      batch_per_query: the batch leaves have a leading axis of size q, one slice a query.
      mesh: devices, of which those along `query_axis` evaluate different queries. They exchange the losses alone; the
        numbers are the same, to the bit. How parameters and batch are split over the other axes is theirs to say
        (`jax.device_put`), and `perturbation.on(zo_jax.layout.Layout(mesh))` draws directions where the parameters live.
      query_axis: the name of that axis.

    Returns:
      An `Estimate`. A query whose loss is nan or inf is left out of the mean and counted; if all are,
      the gradient is zero.

    Raises:
      ValueError: an argument is out of range, the loss is not a floating scalar, no leaf is floating, a
        batch leaf does not have the leading axis q, or the key is not a threefry key.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> loss_fn = lambda params, x: jnp.sum((params["w"] @ x) ** 2)
    >>> est = zo_jax.estimate_gradient(
    ...     loss_fn, {"w": jnp.ones((2, 3))}, jax.random.key(0), jnp.ones(3), num_queries=4)
    >>> est.gradient["w"].shape, est.projections.shape
    ((2, 3), (4,))
    """
    perturbation = perturbation or rademacher()
    loss, projections = project(
        loss_fn,
        params,
        key,
        *batch,
        num_queries=num_queries,
        epsilon=epsilon,
        perturbation=perturbation,
        difference=difference,
        parallel_batch_size=parallel_batch_size,
        batch_per_query=batch_per_query,
        mesh=mesh,
        query_axis=query_axis,
    )
    keys = jax.random.split(typed_key(key), num_queries)
    gradient = perturbation.combine(params, keys, mean_weights(projections))
    num_failed = jnp.sum(~jnp.isfinite(projections), dtype=jnp.int32)
    return Estimate(gradient, loss, projections, num_failed)


def project(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    *batch: Any,
    num_queries: int = 8,
    epsilon: float = 1e-3,
    perturbation: Family | None = None,
    difference: str = "central",
    parallel_batch_size: int = 1,
    batch_per_query: bool = False,
    batch_in_chunks: bool = False,
    mesh: Mesh | None = None,
    query_axis: str = "query",
) -> tuple[jax.Array, jax.Array]:
    """The forward passes of `estimate_gradient`, whose arguments it takes: (loss, projections).

    With `batch_in_chunks` the leaves of a query's batch have one more leading axis, of chunks, which are evaluated one after the
    other for the sake of memory; the loss is the mean of theirs.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> loss, c = zo_jax.project(
    ...     lambda w: jnp.sum(w), jnp.ones(3), jax.random.key(0), num_queries=2, difference="jvp")
    >>> float(loss), c.shape
    (3.0, (2,))
    """
    perturbation = perturbation or rademacher()
    key = typed_key(key)
    _check(params, batch, num_queries, epsilon, difference, parallel_batch_size, batch_per_query)
    keys = jax.random.split(key, num_queries)
    if mesh is not None and query_axis not in mesh.shape:
        raise ValueError(
            f"the mesh has no axis {query_axis!r}; its axes are {', '.join(mesh.shape)}; name one of them as query_axis"
        )
    devices = _Devices(mesh, query_axis)
    lazy_loss = lazily(lambda p, b: _float32_scalar(loss_fn(p, *b)))

    # What `shard_map` hands to its devices must be among its arguments: all that is below is a function of these.
    epsilon = jnp.float32(epsilon)
    operands = params, batch, keys, perturbation, epsilon

    def evaluator(operands, query):
        """The direction of a query is drawn; the loss along it is then a function of the scale."""
        params, batch, keys, perturbation, _ = operands
        b = jax.tree.map(lambda x: x[query], batch) if batch_per_query else batch
        direction = perturbation.draw(params, keys[query])
        loss = lambda scale, b: lazy_loss(perturbation.move(params, direction, scale), b)
        if batch_in_chunks:
            return lambda scale: jnp.mean(lax.map(lambda chunk: loss(scale, chunk), b))
        return lambda scale: loss(scale, b)

    evaluate_all = lambda function, *xs: _map(function, operands, xs, parallel_batch_size, devices)
    if difference == "jvp":
        slope = lambda operands, query: jax.jvp(
            evaluator(operands, query), (jnp.float32(0),), (jnp.float32(1),)
        )
        losses, projections = evaluate_all(slope, np.arange(num_queries))
        return _masked(losses, projections)

    if difference == "central":
        # A loop over the two sides, so that the loss is compiled once.
        two_sides = lambda operands, query: lax.map(
            evaluator(operands, query), jnp.stack([operands[-1], -operands[-1]])
        )
        sides = evaluate_all(two_sides, np.arange(num_queries))
        return _masked(jnp.mean(sides, axis=1), (sides[:, 0] - sides[:, 1]) / (2 * epsilon))
    # One list of evaluations: the queries after the unperturbed ones (scale 0).
    num_bases = num_queries if batch_per_query else 1
    i = np.arange(num_bases + num_queries)
    query = np.where(i < num_bases, i, i - num_bases)
    moved = (i >= num_bases).astype(np.float32)
    evaluate = lambda operands, query, moved: evaluator(operands, query)(moved * operands[-1])
    losses = evaluate_all(evaluate, query, moved)
    base = jnp.broadcast_to(losses[:num_bases], (num_queries,))
    return _masked(base, (losses[num_bases:] - base) / epsilon)


def mean_weights(projections: jax.Array) -> jax.Array:
    """The weights of the directions in the mean: cᵢ over the number of finite ones, 0 where cᵢ is not finite.

    Args:
      projections: float32 [q].

    >>> import jax.numpy as jnp, zo_jax
    >>> zo_jax.mean_weights(jnp.array([1.0, jnp.nan, 3.0])).tolist()
    [0.5, 0.0, 1.5]
    """
    finite = jnp.isfinite(projections)
    return jnp.where(finite, projections, 0) / jnp.maximum(jnp.sum(finite), 1).astype(jnp.float32)


def num_evaluations(num_queries: int, difference: str, batch_per_query: bool = False) -> int:
    """Loss evaluations of one estimate (a jvp counts as one, though it costs two to three)."""
    num_bases = num_queries if batch_per_query else 1
    return {
        "central": 2 * num_queries,
        "forward": num_queries + num_bases,
        "jvp": num_queries,
    }[difference]


def _masked(losses: jax.Array, projections: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean loss of the queries that are finite, projections with nan for the others)."""
    finite = jnp.isfinite(losses) & jnp.isfinite(projections)
    total = jnp.sum(jnp.where(finite, losses, 0))
    loss = jnp.where(jnp.any(finite), total / jnp.maximum(jnp.sum(finite), 1), jnp.nan)
    return loss.astype(jnp.float32), jnp.where(finite, projections, jnp.nan).astype(jnp.float32)


class _Devices(NamedTuple):
    mesh: Mesh | None
    axis: str


def _map(
    function: Callable[..., Any],
    operands: Any,
    xs: tuple[np.ndarray, ...],
    batch_size: int,
    devices: _Devices,
) -> Any:
    """`function(operands, *x)` of each of `xs`, some at once, on all devices of the query axis."""
    here = lambda operands, *xs: _map_here(lambda *x: function(operands, *x), xs, batch_size)
    if devices.mesh is None:
        return here(operands, *map(jnp.asarray, xs))
    n = len(xs[0])
    # The last groups evaluate the last query again where they have none of their own.
    pad = -n % devices.mesh.shape[devices.axis]
    split = PartitionSpec(devices.axis)
    out = jax.shard_map(
        here,
        mesh=devices.mesh,
        in_specs=(PartitionSpec(), *(split for _ in xs)),
        out_specs=split,
        axis_names={devices.axis},
        check_vma=False,
    )(operands, *(jnp.asarray(np.pad(x, (0, pad), "edge")) for x in xs))
    everywhere = NamedSharding(devices.mesh, PartitionSpec())
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, everywhere)[:n], out)


def _map_here(function: Callable[..., Any], xs: tuple[jax.Array, ...], batch_size: int) -> Any:
    if batch_size == 1 or xs[0].shape[0] == 1:
        return lax.map(lambda x: function(*x), xs)
    if xs[0].shape[0] <= batch_size:
        return jax.vmap(function)(*xs)
    return lax.map(lambda x: function(*x), xs, batch_size=batch_size)


def _float32_scalar(loss: Any) -> jax.Array:
    shape, dtype = jnp.shape(loss), jnp.result_type(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"loss_fn must return a floating scalar, got shape {shape} and dtype {dtype}; return "
            "the mean of the losses of the batch"
        )
    return jnp.asarray(loss, jnp.float32)


def typed_key(key: jax.Array) -> jax.Array:
    """A typed threefry key, from one or from the raw words of one."""
    is_typed = jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key)
    if not is_typed and jnp.shape(key) == (2,) and jnp.result_type(key) == jnp.uint32:
        return jax.random.wrap_key_data(key, impl="threefry2x32")
    if not is_typed or jnp.shape(key) != ():
        raise ValueError(
            f"key must be one PRNG key, as of jax.random.key(seed); got shape {jnp.shape(key)} "
            f"and dtype {jnp.result_type(key)}"
        )
    implementation = str(jax.random.key_impl(key))
    if "threefry2x32" not in implementation:
        raise ValueError(
            f"key must be of the threefry2x32 implementation, got {implementation}: its noise is "
            "not the same under vmap; use jax.random.key(seed, impl='threefry2x32')"
        )
    return key


def _check(
    params, batch, num_queries, epsilon, difference, parallel_batch_size, batch_per_query
) -> None:
    leaves = jax.tree.leaves(params)
    if not any(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves):
        raise ValueError(f"params must have a floating leaf to perturb, got {len(leaves)} leaves")
    for name, value in (("num_queries", num_queries), ("parallel_batch_size", parallel_batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if difference not in DIFFERENCES:
        raise ValueError(f"difference must be one of {DIFFERENCES}, got {difference!r}")
    if not isinstance(epsilon, jax.core.Tracer):
        # The scale is float32 inside: what underflows there is no perturbation at all.
        rounded = float(np.float32(epsilon))
        if not (math.isfinite(rounded) and rounded > 0):
            raise ValueError(f"epsilon must be positive and finite in float32, got {epsilon!r}")
    if batch_per_query:
        for leaf in jax.tree.leaves(batch):
            if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != num_queries:
                raise ValueError(
                    "with batch_per_query every leaf of the batch needs a leading axis of size "
                    f"num_queries = {num_queries}, got shape {jnp.shape(leaf)}"
                )
