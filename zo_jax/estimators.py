"""Zeroth-order gradient estimates of any scalar loss of a pytree.

For directions z₁..z_q with E[z zᵀ] = I and projections cᵢ ≈ ⟨∇L(θ), zᵢ⟩ the estimate is ĝ = (1/q)
Σᵢ cᵢ zᵢ. It depends on the data only through the q scalars c, so it has two halves: `project`
evaluates the loss, and `combine` sums the directions again from their keys. No direction is ever
stored.
"""

from collections.abc import Callable
import dataclasses
import difflib
import inspect
import math
import operator
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
import numpy as np

from zo_jax import exact as exactly
from zo_jax import families
from zo_jax.family import Family
from zo_jax.queries import DIFFERENCES, Queries
from zo_jax.trees import Rule, Subset, as_arrays, loss_of


class Estimate(NamedTuple):
    """A gradient estimate.

    Attributes:
      gradient: like params, Σᵢ cᵢ zᵢ over the number of queries with a finite loss.
      loss: float32 scalar (float64 of a float64 loss), the mean over those queries (central: of
        both sides).
      projections: [q] of the loss's dtype, the directional derivatives cᵢ; nan where the loss was
        not finite.
      num_failed: int32 scalar, the queries whose loss was not finite.
      num_flat: int32 scalar, the queries along which the loss did not change at all. If all did
        not, either it does not depend on the parameters, or ε is lost in the rounding of its
        arithmetic: take a larger one.
      aux: with `has_aux`, what `loss_fn` returned besides, its leaves [q, ...]: at θ + ε zᵢ (jvp:
        at θ); with `batch_chunks` [q, chunks, ...]. Otherwise None.
    """

    gradient: Any
    loss: jax.Array
    projections: jax.Array
    num_failed: jax.Array
    num_flat: jax.Array
    aux: Any = None


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How a gradient is estimated from loss evaluations alone (Spall 1992; Nesterov and Spokoiny
    2017).

    ĝ = (1/q) Σᵢ cᵢ zᵢ with, for query i and its key `jax.random.split(key, q)[i]`,

    - central: cᵢ = (L(θ + ε zᵢ) − L(θ − ε zᵢ)) / 2ε, two evaluations a query, bias O(ε²);
    - forward: cᵢ = (L(θ + ε zᵢ) − L(θ)) / ε, one evaluation a query and one more, bias O(ε)
      (one more for each query with `batch_per_query`);
    - jvp: cᵢ = ⟨∇L(θ), zᵢ⟩ by forward-mode differentiation, exact, ε unused. Of a loss that is
      constant piece by piece, such as an accuracy, that is 0; of a `jax.pure_callback` JAX knows
      none.

    Use it under `jax.jit`. The same arguments give the same directions eager, jitted, under `vmap`
    and for every `parallel_batch_size`. A query whose loss is nan or inf is left out of the mean
    and counted; if all are, the gradient is zero.

    What no direction moves and no query has a batch of its own for is evaluated once for all
    queries and both sides of the difference (with `batch_per_query` once for both sides of a
    query): the layers below the first one that is trained, if the frozen ones come from outside
    `params`. A scan over a stack of layers `stack.at[k:].set(trained)`, or a concatenation, is
    split there. Held for the rest is what it reads of products, sums, look-ups and loops: mostly
    the activations of a batch at that place. Where nothing is frozen, nothing is.

    Attributes:
      num_queries: q, the directions.
      epsilon: ε, the perturbation size; in `zeroth_order` also a schedule of the steps. Where
        parameters are used in bfloat16, 1e-2 is a good choice: numbers near 1, such as the scales
        of a norm, do not feel 1e-3.
      perturbation: family of directions, or its name: "rademacher", "gaussian", "sphere",
        "low_rank".
      difference: "central", "forward" or "jvp".
      parallel_batch_size: queries evaluated at once; memory grows with it. A `jax.pure_callback` in
        the loss then needs a `vmap_method`.
      batch_per_query: the batch leaves have a leading axis of size q, one slice a query.
      batch_chunks: parts into which the leading axis of a query's batch is cut, evaluated one after
        the other for the sake of memory; the loss is the mean of theirs.
      has_aux: `loss_fn` returns (loss, anything besides).
      mesh: devices, of which those along `query_axis` evaluate different queries. They exchange the
        losses alone; the numbers are the same, to the bit. How parameters and batch are split over
        the other axes is theirs to say (`jax.device_put`), and `perturbation.on(zo_jax.Layout(mesh,
        rules))` draws directions where the parameters live. Frozen parameters are best handed over
        in a `jax.tree_util.Partial(loss_fn, frozen)`: JAX cannot look up rows of what a function
        closes over.
      query_axis: the name of that axis.
      exact: the part of the parameters whose gradient is taken by `jax.grad`, with everything else
        held constant, while directions are drawn for the rest alone: a regular expression,
        searched for in paths like "blocks/fc/kernel"; or a function (path, leaf) -> whether all of
        a leaf is meant, or the indices of those layers of a stack [L, ...] that are. One more
        forward pass, and backward from the loss to the lowest such leaf: an output head costs its
        own products alone, the last n layers those layers (backprop above, directions below).
        `project` and `combine` are of the rest; only `estimate` has both, so a step cannot be
        taken again from its projections.

    Raises:
      ValueError: an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> estimator = zo_jax.Estimator(num_queries=4, perturbation="low_rank")
    >>> loss_fn = lambda params, x: jnp.sum((params["w"] @ x) ** 2)
    >>> est = estimator.estimate(loss_fn, {"w": jnp.ones((2, 3))}, jax.random.key(0), jnp.ones(3))
    >>> est.gradient["w"].shape, est.projections.shape
    ((2, 3), (4,))
    """

    num_queries: int = 8
    epsilon: Any = 1e-3
    perturbation: Family | str = "rademacher"
    difference: str = "central"
    parallel_batch_size: int = 1
    batch_per_query: bool = False
    batch_chunks: int = 1
    has_aux: bool = False
    mesh: Mesh | None = None
    query_axis: str = "query"
    exact: Rule | Subset | None = None

    def __post_init__(self):
        for name in ("num_queries", "parallel_batch_size", "batch_chunks"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        if self.difference not in DIFFERENCES:
            raise ValueError(f"difference must be one of {DIFFERENCES}, got {self.difference!r}")
        if not callable(self.epsilon) and not isinstance(self.epsilon, Tracer):
            # The scale is float32 inside: what underflows there is no perturbation at all.
            rounded = float(np.float32(self.epsilon))
            if not (math.isfinite(rounded) and rounded > 0):
                raise ValueError(
                    f"epsilon must be positive and finite in float32, got {self.epsilon!r}"
                )
        if self.mesh is not None and self.query_axis not in self.mesh.shape:
            raise ValueError(
                f"the mesh has no axis {self.query_axis!r}; its axes are "
                f"{', '.join(self.mesh.shape)}; name one of "
                "them as query_axis"
            )
        if self.exact is not None and not (
            isinstance(self.exact, str | Subset) or callable(self.exact)
        ):
            raise ValueError(
                "exact must be a regular expression or a function of (path, leaf), got "
                f"{self.exact!r:.80}"
            )
        if self.mesh is not None and AxisType.Explicit in self.mesh.axis_types:
            raise ValueError(
                "the mesh's axes must be Auto, and jax.make_mesh makes them Explicit; make it with "
                f"jax.sharding.Mesh(devices, {self.mesh.axis_names}), or axis_types="
            )
        if not isinstance(self.perturbation, Family | str):
            raise ValueError(
                f"perturbation must be a Family or one of {', '.join(families.NAMES)}; got "
                f"{self.perturbation!r}"
            )
        if isinstance(self.perturbation, str):
            object.__setattr__(self, "perturbation", families.by_name(self.perturbation))

    @property
    def family(self) -> Family:
        """The family of directions."""
        assert isinstance(self.perturbation, Family)
        return self.perturbation

    @property
    def num_evaluations(self) -> int:
        """Loss evaluations of one estimate (a jvp counts as one, though it costs two to three, and
        so does that of `exact`, whose derivative comes on top).
        """
        num_bases = self.num_queries if self.batch_per_query else 1
        num_exact = 0 if self.exact is None else num_bases
        return (
            num_exact
            + {
                "central": 2 * self.num_queries,
                "forward": self.num_queries + num_bases,
                "jvp": self.num_queries,
            }[self.difference]
        )

    def start(self, params: Any) -> Family:
        """The family at the first step of a run, of what has directions of these parameters."""
        if self.exact is not None:
            params = exactly.split(self.exact, params).rest.select(params)
        return self.family.start(params)

    def learn(self, params: Any, key: jax.Array, projections: jax.Array) -> Family:
        """The family at the next step, from the key and the projections of this one; itself, unless
        it learns, as `zo_jax.grouped` does.
        """
        if self.exact is not None:
            params = exactly.split(self.exact, params).rest.select(params)
        return self.family.learn(params, self.keys(key), projections)

    def keys(self, key: jax.Array) -> jax.Array:
        """The keys of the queries [q], from that of the estimate."""
        return jax.random.split(typed_key(key), self.num_queries)

    def project(
        self, loss_fn: Callable[..., Any], params: Any, key: jax.Array, *batch: Any
    ) -> tuple[jax.Array, ...]:
        """The forward passes: (loss, projections [q]), or (loss, projections, aux) with `has_aux`;
        see `Estimate`.

        Raises:
          ValueError: the loss is not a floating scalar, no leaf is floating, a batch leaf does not
            have the axes that `batch_per_query` and `batch_chunks` ask for, or the key is not a
            threefry key.
        """
        if callable(self.epsilon):
            raise ValueError(
                "epsilon is a schedule, but only zeroth_order counts steps; give its value"
            )
        loss_fn, params = self._for_directions(loss_fn, as_arrays(params))
        losses, projections, aux = self._queries.evaluate(
            loss_fn, params, self.keys(key), batch, self.family, self.epsilon
        )
        finite = jnp.isfinite(losses) & jnp.isfinite(projections)
        total = jnp.sum(jnp.where(finite, losses, 0))
        loss = jnp.where(jnp.any(finite), total / jnp.maximum(jnp.sum(finite), 1), jnp.nan)
        # Sums and quotients of int32 counts are not to widen it.
        loss, projections = (x.astype(losses.dtype) for x in (loss, projections))
        projections = jnp.where(finite, projections, jnp.nan)
        return (loss, projections, aux) if self.has_aux else (loss, projections)

    def combine(self, params: Any, key: jax.Array, projections: jax.Array) -> Any:
        """ĝ, like `params`: the directions are summed again from the key. Zero where `exact`
        is.
        """
        params, keys = as_arrays(params), self.keys(key)
        weights = mean_weights(projections)
        if self.exact is None:
            return self.family.combine(params, keys, weights)
        rest = exactly.split(self.exact, params).rest
        total = self.family.combine(rest.select(params), keys, weights)
        return rest.merge(jax.tree.map(jnp.zeros_like, params), total)

    def estimate(
        self, loss_fn: Callable[..., Any], params: Any, key: jax.Array, *batch: Any
    ) -> Estimate:
        """Both halves: `project`, then `combine`; and the gradient of the part that is `exact`."""
        loss, projections, *aux = self.project(loss_fn, params, key, *batch)
        gradient = self.combine(params, key, projections)
        if self.exact is not None:
            gradient = self._with_exact(gradient, loss_fn, as_arrays(params), batch)
        return Estimate(
            gradient=gradient,
            loss=loss,
            projections=projections,
            num_failed=jnp.sum(~jnp.isfinite(projections), dtype=jnp.int32),
            num_flat=jnp.sum(projections == 0, dtype=jnp.int32),
            aux=aux[0] if aux else None,
        )

    def losses_along(
        self, loss_fn: Callable[..., Any], params: Any, key: jax.Array, scales: Any, *batch: Any
    ) -> jax.Array:
        """The loss along the directions of `project`: [q, k] of L(θ + scaleⱼ zᵢ), float32 or better.

        Args:
          loss_fn, params, key, *batch: as of `project`.
          scales: [k], in the place of ±ε; 0 is the loss at the parameters.

        >>> import jax, jax.numpy as jnp, zo_jax
        >>> estimator = zo_jax.Estimator(num_queries=2)
        >>> estimator.losses_along(lambda w: jnp.sum(w**2), jnp.zeros(4), jax.random.key(0), [0, 1, 2]).tolist()
        [[0.0, 4.0, 16.0], [0.0, 4.0, 16.0]]
        """  # noqa: E501
        keys, scales = self.keys(key), jnp.asarray(scales, jnp.float32)
        loss_fn, params = self._for_directions(loss_fn, as_arrays(params))
        return self._queries.losses_along(loss_fn, params, keys, batch, self.family, scales)

    def _for_directions(
        self, loss_fn: Callable[..., Any], params: Any
    ) -> tuple[Callable[..., Any], Any]:
        """The loss as a function of what has directions, and that part of the parameters."""
        if self.exact is None:
            return loss_fn, params
        rest = exactly.split(self.exact, params).rest
        return loss_of(rest, loss_fn, params), rest.select(params)

    def _with_exact(
        self, gradient: Any, loss_fn: Callable[..., Any], params: Any, batch: tuple[Any, ...]
    ) -> Any:
        """The gradient with that of the exact part in its place."""
        assert self.exact is not None
        part = exactly.split(self.exact, params).exact
        loss = loss_of(part, loss_fn, params)
        count = (self.num_queries if self.batch_per_query else 1) * self.batch_chunks

        def in_parts(x: Any) -> jax.Array:
            """[count, ...]: the batches of all queries, in their chunks."""
            shape = jnp.shape(x)[1:] if self.batch_per_query else jnp.shape(x)
            own = (shape[0] // self.batch_chunks, *shape[1:]) if self.batch_chunks > 1 else shape
            return jnp.reshape(x, (count, *own))

        def loss_on(own: Any, batch: tuple[Any, ...]) -> jax.Array:
            out = loss(own, *batch)
            return out[0] if self.has_aux else out

        batches = jax.tree.map(in_parts, batch)
        new = exactly.exact_gradient(loss_on, part.select(params), batches, count)
        return part.merge(gradient, new)

    @property
    def _queries(self) -> Queries:
        names = (field.name for field in dataclasses.fields(Queries))
        return Queries(**{name: getattr(self, name) for name in names})


def takes_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the options of `Estimator` in the signature of a function that takes them as **options.

    Each is None there, "as the estimator has it", so that `optax.inject_hyperparams` takes no
    static option for a number to inject.
    """
    signature = inspect.signature(function)
    *own, options = signature.parameters.values()
    assert options.kind is inspect.Parameter.VAR_KEYWORD
    fields = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=f.type)
        for f in dataclasses.fields(Estimator)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *fields])  # pyright: ignore
    return function


def make_estimator(estimator: Estimator | None, options: dict[str, Any]) -> Estimator:
    """An estimator (default `Estimator()`) with some options replaced: those that are not None.

    Raises:
      TypeError: there is no such option.
    """
    known = [field.name for field in dataclasses.fields(Estimator)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise TypeError(f"{name!r} is no option of Estimator; {hint}")
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(estimator or Estimator(), **given)


@takes_options
def estimate_gradient(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *batch: Any,
    estimator: Estimator | None = None,
    **options: Any,
) -> Estimate:
    """Gradient estimate from loss evaluations alone: `Estimator(**options).estimate(loss_fn,
    params, key, *batch)`.

    Args:
      loss_fn: `loss_fn(params, *batch)` -> floating scalar; any JAX code.
      params: pytree of arrays; the floating leaves are perturbed, the others left alone.
      key: a PRNG key of the threefry implementation.
      *batch: pytrees handed to `loss_fn`.
      estimator: an `Estimator`; default `Estimator()`.
      **options: fields of `Estimator`, which replace those of `estimator`.

    Raises:
      ValueError: as `Estimator` and `Estimator.project`.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> loss_fn = lambda params, x: jnp.sum((params["w"] @ x) ** 2)
    >>> est = zo_jax.estimate_gradient(
    ...     loss_fn, {"w": jnp.ones((2, 3))}, jax.random.key(0), jnp.ones(3), num_queries=4)
    >>> est.gradient["w"].shape, est.projections.shape
    ((2, 3), (4,))
    """
    return make_estimator(estimator, options).estimate(loss_fn, params, key, *batch)


@takes_options
def project(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *batch: Any,
    estimator: Estimator | None = None,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """The forward passes of `estimate_gradient`, whose arguments it takes: `Estimator.project`.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> loss, c = zo_jax.project(
    ...     lambda w: jnp.sum(w), jnp.ones(3), jax.random.key(0), num_queries=2, difference="jvp")
    >>> float(loss), c.shape
    (3.0, (2,))
    """
    return make_estimator(estimator, options).project(loss_fn, params, key, *batch)


def mean_weights(projections: jax.Array) -> jax.Array:
    """The weights of the directions in the mean: cᵢ over the number of finite ones, 0 where cᵢ is
    not finite.

    Args:
      projections: floating [q].

    >>> import jax.numpy as jnp, zo_jax
    >>> zo_jax.mean_weights(jnp.array([1.0, jnp.nan, 3.0])).tolist()
    [0.5, 0.0, 1.5]
    """
    finite = jnp.isfinite(projections)
    count = jnp.maximum(jnp.sum(finite), 1).astype(projections.dtype)
    return jnp.where(finite, projections, 0) / count


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


def positive_int(name: str, value: Any) -> int:
    """A Python or NumPy integer of at least 1."""
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} must be known when the step is traced, got a traced value; make it static, as "
            f"by "
            f"static_argnames or by optax.inject_hyperparams(..., static_args=({name!r},))"
        )
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool | np.bool_) or number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return number
