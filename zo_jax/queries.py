"""The losses of queries: each along a line through the parameters, on both sides of a difference.

What no direction moves is evaluated once for all queries, or with a batch for every query once for
both sides of one (`zo_jax.programs.in_halves`). Of a family whose directions move one part of the
parameters each, that is what lies below the part.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from zo_jax.family import Family
from zo_jax.programs import in_halves
from zo_jax.trees import loss_of

DIFFERENCES = ("central", "forward", "jvp")

# (scale) -> (loss, aux): the loss along a direction.
Line = Callable[[jax.Array], tuple[jax.Array, Any]]
# (query) -> the loss along its direction.
Lines = Callable[[jax.Array], Line]


class _Part(NamedTuple):
    """A loss as a function of a part of the parameters, and the family of its directions."""

    loss_fn: Callable[..., Any]
    params: Any
    family: Family


class _Operands(NamedTuple):
    """What evaluations read: `shard_map` hands its devices nothing but arguments.

    Attributes:
      shared: the loss and the family, where they are pytrees.
      scales: ε, or all scales of a line [k].
    """

    params: Any
    batch: tuple[Any, ...]
    keys: jax.Array
    shared: dict[str, Any]
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class Queries:
    """How the losses of queries are evaluated: the options of an `Estimator`."""

    num_queries: int
    difference: str
    parallel_batch_size: int
    batch_per_query: bool
    batch_chunks: int
    has_aux: bool
    mesh: Mesh | None
    query_axis: str

    def evaluate(
        self,
        loss_fn: Callable[..., Any],
        params: Any,
        keys: jax.Array,
        batch: tuple[Any, ...],
        family: Family,
        epsilon: Any,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """(losses [q], projections [q], aux [q, ...])."""
        epsilon, queries = jnp.float32(epsilon), np.arange(self.num_queries)
        begun = self._begin(loss_fn, params, keys, batch, family, epsilon)

        def both_sides(line, scales):
            """A loop over the two sides of each query, so that the loss is compiled once."""
            return lambda query: lax.map(line(query), jnp.stack(scales))

        def central(operands, line):
            sides = both_sides(line, [operands.scales, -operands.scales])

            def of_query(query):
                losses, aux = sides(query)
                slope = (losses[0] - losses[1]) / (2 * operands.scales)
                return jnp.mean(losses), slope, jax.tree.map(lambda x: x[0], aux)

            return of_query

        def jvp(operands, line):
            zero, one = jnp.float32(0), jnp.float32(1)
            return lambda query: jax.jvp(line(query), (zero,), (one,), has_aux=True)

        def forward_on_own_batches(operands, line):
            sides = both_sides(line, [jnp.float32(0), operands.scales])

            def of_query(query):
                (base, moved), aux = sides(query)
                return base, (moved - base) / operands.scales, jax.tree.map(lambda x: x[1], aux)

            return of_query

        def forward(operands, line):
            return lambda query, is_moved: line(query)(is_moved * operands.scales)

        if self.difference == "central":
            return self._map(central, begun, queries)
        if self.difference == "jvp":
            return self._map(jvp, begun, queries)
        if self.batch_per_query:
            return self._map(forward_on_own_batches, begun, queries)
        # One list of evaluations: the queries after the unperturbed one (scale 0).
        query = np.concatenate([queries[:1], queries])
        is_moved = np.concatenate([np.zeros(1, np.float32), np.ones(len(queries), np.float32)])
        losses, aux = self._map(forward, begun, query, is_moved)
        base = jnp.broadcast_to(losses[:1], queries.shape)
        return base, (losses[1:] - base) / epsilon, jax.tree.map(lambda x: x[1:], aux)

    def losses_along(
        self,
        loss_fn: Callable[..., Any],
        params: Any,
        keys: jax.Array,
        batch: tuple[Any, ...],
        family: Family,
        scales: jax.Array,
    ) -> jax.Array:
        """The losses at all scales [k] of every query's line, [q, k]."""
        begun = self._begin(loss_fn, params, keys, batch, family, scales)

        def on_line(operands, line):
            return lambda query: lax.map(line(query), operands.scales)[0]

        return self._map(on_line, begun, np.arange(self.num_queries))

    def _begin(
        self,
        loss_fn: Callable[..., Any],
        params: Any,
        keys: jax.Array,
        batch: tuple[Any, ...],
        family: Family,
        scales: jax.Array,
    ) -> tuple[_Operands, Callable[[_Operands], tuple[Any, list[Lines]]]]:
        """What evaluations read, and `_lines` of it."""
        self._check_batch(batch)
        # What is no pytree of arrays is closed over.
        is_array = lambda x: isinstance(x, jax.Array | np.ndarray)
        own: dict[str, Any] = dict(loss_fn=loss_fn, family=family)
        shared = {k: v for k, v in own.items() if all(map(is_array, jax.tree.leaves(v)))}
        operands = _Operands(params, batch, keys, shared, scales)
        return operands, lambda operands: self._lines(operands, **own | operands.shared)

    def _lines(
        self, operands: _Operands, loss_fn: Callable[..., Any], family: Family
    ) -> tuple[Callable[[jax.Array], jax.Array] | None, list[Lines]]:
        """(query -> which part of the parameters it moves, the lines of each part); (None, the only
        lines) of a family without parts.
        """
        params = operands.params
        parts = family.parts(params) if self._can_branch else None
        if parts is None:
            share = not self.batch_per_query
            return None, [self._lines_of(operands, _Part(loss_fn, params, family), share)]
        # What lies below each part costs an evaluation or less: it is shared where there are many.
        share = not self.batch_per_query and self.num_queries >= 2 * len(parts)
        of_parts = [
            _Part(loss_of(part, loss_fn, params), part.select(params), family.on_part(params, i))
            for i, part in enumerate(parts)
        ]
        which = lambda query: family.part_of(params, operands.keys[query])
        return which, [self._lines_of(operands, part, share) for part in of_parts]

    @property
    def _can_branch(self) -> bool:
        """Whether queries may take branches of their own: of those that are mapped at once all
        branches would be evaluated, and devices that share an evaluation meet in its collectives,
        while those of another query wait elsewhere.
        """
        sizes = {} if self.mesh is None else dict(self.mesh.shape)
        return self.parallel_batch_size == 1 and all(
            size == 1 for axis, size in sizes.items() if axis != self.query_axis
        )

    def _lines_of(self, operands: _Operands, part: _Part, share: bool) -> Lines:
        """(query) -> the loss along its direction.

        What all evaluations share is evaluated here, what those of a query share with the query.
        """
        loss_fn, params, family = part
        rest_of = functools.partial(self._rest, loss_fn, params, family.moves(params))
        shared = rest_of(operands.batch) if share else None

        def line(query: jax.Array) -> Line:
            direction = family.draw(params, operands.keys[query])
            pick = (lambda x: x[query]) if self.batch_per_query else (lambda x: x)
            rest = shared or rest_of(jax.tree.map(pick, operands.batch))
            return lambda scale: rest(family.move(params, direction, scale))

        return line

    def _rest(
        self, loss_fn: Callable[..., Any], params: Any, is_moved: list[bool], batch: tuple[Any, ...]
    ) -> Callable[[Any], tuple[jax.Array, Any]]:
        """(moved parameters) -> (loss, aux) on a batch, once what depends on no moved leaf is
        evaluated.
        """
        loss_and_aux = functools.partial(_loss_and_aux, loss_fn, self.has_aux)
        if self.batch_chunks == 1:
            first, second = in_halves(lambda p: loss_and_aux(p, batch), params, is_moved)
            kept = first()
            return lambda moved: second(kept, moved)
        in_chunks = lambda x: x.reshape(self.batch_chunks, -1, *x.shape[1:])
        chunks = jax.tree.map(in_chunks, batch)
        a_chunk = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], chunks))
        first, second = in_halves(loss_and_aux, params, is_moved, a_chunk)
        kept = lax.map(first, chunks)

        def rest(moved: Any) -> tuple[jax.Array, Any]:
            losses, aux = lax.map(lambda pair: second(pair[0], moved, pair[1]), (kept, chunks))
            return jnp.mean(losses), aux

        return rest

    def _map(
        self,
        function: Callable[..., Any],
        begun: tuple[_Operands, Callable[[_Operands], tuple[Any, list[Lines]]]],
        *xs: np.ndarray,
    ) -> Any:
        """`function(operands, lines)(*x)` of each of `xs`, a query and more, some at once, on all
        devices of the query axis.
        """
        operands, lines = begun
        mesh, axis = self.mesh, self.query_axis
        at_once = min(self.parallel_batch_size, self.num_queries)

        def here(operands, *xs):
            which, of_parts = lines(operands)
            functions = [function(operands, of_part) for of_part in of_parts]
            if which is None:
                return _map_here(functions[0], xs, at_once)
            of_query = lambda query, *x: lax.switch(which(query), functions, query, *x)
            return _map_here(of_query, xs, at_once)

        if mesh is None:
            return here(operands, *map(jnp.asarray, xs))
        n = len(xs[0])
        # The last groups evaluate the last query again where they have none of their own.
        pad = -n % mesh.shape[axis]
        split = PartitionSpec(axis)
        out = jax.shard_map(
            here,
            mesh=mesh,
            in_specs=(PartitionSpec(), *(split for _ in xs)),
            out_specs=split,
            axis_names={axis},
            check_vma=False,
        )(operands, *(jnp.asarray(np.pad(x, (0, pad), "edge")) for x in xs))
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, everywhere)[:n], out)

    def _check_batch(self, batch: tuple[Any, ...]) -> None:
        """Whether the leaves of a batch have the axes that the options ask for."""
        q, chunks = self.num_queries, self.batch_chunks
        for leaf in jax.tree.leaves(batch):
            shape = jnp.shape(leaf)
            if self.batch_per_query and shape[:1] != (q,):
                raise ValueError(
                    "with batch_per_query every leaf of the batch needs a leading axis of size "
                    f"num_queries = {q}, got shape {shape}"
                )
            own = shape[1:] if self.batch_per_query else shape
            if chunks > 1 and (not own or own[0] % chunks):
                raise ValueError(
                    f"with batch_chunks={chunks} the leading axis of every leaf of a query's batch "
                    f"must be divisible by it, got shape {own}"
                )


def _map_here(function: Callable[..., Any], xs: tuple[jax.Array, ...], at_once: int) -> Any:
    if at_once == 1 or xs[0].shape[0] == 1:
        return lax.map(lambda x: function(*x), xs)
    if xs[0].shape[0] <= at_once:
        return jax.vmap(function)(*xs)
    return lax.map(lambda x: function(*x), xs, batch_size=at_once)


def _loss_and_aux(
    loss_fn: Callable[..., Any], has_aux: bool, params: Any, batch: tuple[Any, ...]
) -> tuple[jax.Array, Any]:
    """(loss in float32 or better, aux or None), of a loss that is what it should be."""
    out = loss_fn(params, *batch)
    if has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(
                f"with has_aux loss_fn must return (loss, aux), got {type(out).__name__}; return a "
                f"tuple of the two"
            )
        loss, aux = out
    else:
        loss, aux = out, None
    if isinstance(loss, tuple):
        raise ValueError(
            f"loss_fn must return a floating scalar, got a tuple of {len(loss)}; if it is (loss, "
            f"aux), set has_aux=True"
        )
    if loss is None:
        raise ValueError("loss_fn must return a floating scalar, got None; return the loss")
    shape, dtype = jnp.shape(loss), jnp.result_type(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"loss_fn must return a floating scalar, got shape {shape} and dtype {dtype}; return "
            "the mean of the losses of the batch"
        )
    return jnp.asarray(loss, jnp.promote_types(dtype, jnp.float32)), aux
