"""Which part of an update works on a large leaf entry by entry, and that part block by block of
rows, in place: neither the leaf's gradient nor any other array of its size need exist whole.

An update is traced, so any optax transformation is welcome: what is no such part runs as it stands.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp
import numpy as np

from zo_jax.jaxprs import CALLS, bind, body_of, consts_of, open_jaxpr
from zo_jax.row_sums import RowSum, map_rows

# Each entry of the result comes from the same entry of the operands.
_NAMES = """
    abs add and bitcast_convert_type cbrt ceil clamp convert_element_type cos div eq exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or
    pow reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sqrt square sub tan tanh xor
"""
_ENTRYWISE = frozenset(getattr(lax, f"{name}_p") for name in _NAMES.split())
_CALLS = (*CALLS, primitives.custom_jvp_call_p, primitives.custom_vjp_call_p)


def apply(
    function: Callable[[list[jax.Array], Any], Any],
    sums: Sequence[Any],
    state: Any,
    is_wanted: jax.Array,
) -> tuple[Any, jax.Array]:
    """`function(sums, state)`, a new state, if it is wanted; otherwise the old one.

    Args:
      function: (arrays in the place of the sums, state) -> a state of the same shapes and dtypes.
      sums: arrays and `RowSum`s.
      state: pytree of arrays.
      is_wanted: bool.

    Returns:
      The state, and the sum of the squares of the entries of the `RowSum`s, float32.
    """
    old, treedef = jax.tree.flatten(state)
    flat = lambda sums, old: jax.tree.leaves(function(sums, jax.tree.unflatten(treedef, old)))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums]
    program = _without_calls(flat, shapes, old)
    jaxpr, num_sums = program.jaxpr, len(sums)
    is_lazy = [isinstance(x, RowSum) for x in sums]
    parts = _parts(jaxpr, [i for i in range(num_sums) if is_lazy[i]])
    env = dict(zip(jaxpr.constvars, program.consts, strict=True))
    env.update(zip(jaxpr.invars[num_sums:], old, strict=True))
    squared = jnp.zeros((), jnp.float32)
    for i, x in enumerate(sums):
        if is_lazy[i] and i not in parts:
            x = x.added_to(jnp.zeros(x.shape, x.dtype), is_wanted)
            squared += jnp.sum(jnp.square(x))
        env[jaxpr.invars[i]] = x
    _run(jaxpr, env, set().union(*(part.depends for part in parts.values())))
    keep = lambda x, old: jnp.where(is_wanted, x, old).astype(old.dtype)
    outs = zip(jaxpr.outvars, old, strict=True)
    new = [None if _in(atom, parts) else keep(_read(env, atom), x) for atom, x in outs]
    for i, part in parts.items():
        carried = {jaxpr.invars[num_sums + k]: old[k] for k in part.outs}
        arrays, of_part = part.run(sums[i], carried, env, is_wanted)
        squared += of_part
        for k, x in zip(part.outs, arrays, strict=True):
            new[k] = x
    return jax.tree.unflatten(treedef, new), squared


@dataclasses.dataclass(eq=False)
class _Part:
    """What a program does with one sum, entry by entry.

    Attributes:
      var: the variable of the sum.
      eqns: those that depend on it, and of those that they need the ones that go entry by entry.
      depends: the variables that depend on it.
      outs: the program's results among them, by index.
    """

    var: core.Var
    eqns: list[core.JaxprEqn]
    depends: set[core.Var]
    outs: dict[int, core.Var]

    def run(
        self,
        rows: RowSum,
        carried: dict[core.Var, jax.Array],
        env: dict[core.Var, Any],
        is_wanted: jax.Array,
    ) -> tuple[list[jax.Array], jax.Array]:
        """(its results, the sum of the squares of the sum's entries).

        Args:
          rows: the sum.
          carried: for each result the array in whose place it is put, by its variable.
          env: the values of the other variables.
          is_wanted: bool.
        """
        made = {self.var, *(eqn.outvars[0] for eqn in self.eqns)}
        reads = {x for eqn in self.eqns for x in _variables(eqn.invars)} - made - carried.keys()
        shape = rows.shape
        flat = lambda x: x.reshape(-1, shape[-1]) if x.shape == shape else x
        others = {var: flat(env[var]) for var in reads}

        def of_rows(parts: list[jax.Array], first: Any) -> tuple[list[jax.Array], jax.Array]:
            count = len(parts[0])
            block = lambda: rows.block(first, count)
            # A branch again, so that it is made once for its two uses.
            total = lax.cond(is_wanted, block, lambda: jax.tree.map(jnp.zeros_like, block()))
            cut = lambda x: lax.dynamic_slice_in_dim(x, first, count) if x.ndim else x
            local = {var: cut(x) for var, x in others.items()}
            local.update(zip(carried, parts, strict=True))
            local[self.var] = total
            for eqn in self.eqns:
                operands = [_read(local, atom) for atom in eqn.invars]
                local[eqn.outvars[0]] = _on_rows(eqn, operands, shape, first, count)
            return [local[var] for var in self.outs.values()], jnp.sum(jnp.square(total))

        return map_rows(of_rows, list(carried.values()), is_wanted)


def _parts(jaxpr: core.Jaxpr, indices: list[int]) -> dict[int, _Part]:
    """The parts of those inputs that are worked on entry by entry alone."""
    found = {i: _part(jaxpr, jaxpr.invars[i]) for i in indices}
    parts = {i: part for i, part in found.items() if part is not None and part.outs}
    # What depends on two sums is no part of either.
    count = collections.Counter(var for part in parts.values() for var in part.depends)
    return {i: part for i, part in parts.items() if all(count[var] == 1 for var in part.depends)}


def _part(jaxpr: core.Jaxpr, var: core.Var) -> _Part | None:
    """What is done with a variable; None if not all of it is done entry by entry."""
    shape = var.aval.shape  # pyright: ignore
    depends = {var}
    for eqn in jaxpr.eqns:
        if not depends.isdisjoint(_variables(eqn.invars)):
            if not _is_entrywise(eqn, shape):
                return None
            depends.update(eqn.outvars)
    eqns, needed = [], set()
    for eqn in reversed(jaxpr.eqns):
        is_needed = not needed.isdisjoint(eqn.outvars) and _is_entrywise(eqn, shape)
        if is_needed or not depends.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            needed.update(_variables(eqn.invars))
    outs = {k: x for k, x in enumerate(jaxpr.outvars) if isinstance(x, core.Var) and x in depends}
    return _Part(var, eqns[::-1], depends, outs)


def _is_entrywise(eqn: core.JaxprEqn, shape: tuple[int, ...]) -> bool:
    """Whether an equation makes an array of a shape entry by entry of others and of scalars."""
    shape_of = lambda atom: getattr(atom.aval, "shape", None)
    if [shape_of(var) for var in eqn.outvars] != [shape]:
        return False
    shapes = list(map(shape_of, eqn.invars))
    if eqn.primitive in (lax.broadcast_in_dim_p, lax.iota_p):
        return all(x == () for x in shapes) and len(shapes) <= 1
    return eqn.primitive in _ENTRYWISE and all(x in ((), shape) for x in shapes)


def _on_rows(
    eqn: core.JaxprEqn, operands: list[Any], shape: tuple[int, ...], first: Any, count: int
) -> jax.Array:
    """The rows of what such an equation makes, from those of its operands."""
    of_rows = count, shape[-1]
    if eqn.primitive is lax.broadcast_in_dim_p:
        return jnp.broadcast_to(operands[0], of_rows)
    if eqn.primitive is not lax.iota_p:
        return bind(eqn, operands)[0]
    dtype, axis = eqn.params["dtype"], eqn.params["dimension"]
    if axis == len(shape) - 1:
        return lax.broadcasted_iota(dtype, of_rows, 1)
    row = first + lax.broadcasted_iota(jnp.uint32, of_rows, 0)
    index = row // np.uint32(math.prod(shape[axis + 1 : -1])) % np.uint32(shape[axis])
    return index.astype(dtype)


def _run(jaxpr: core.Jaxpr, env: dict[core.Var, Any], left_out: set[core.Var]) -> None:
    """Evaluates the equations, but for those that make what is left out."""
    for eqn in jaxpr.eqns:
        if left_out.isdisjoint(eqn.outvars):
            with eqn.ctx.manager:
                outs = bind(eqn, [_read(env, atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))


def _without_calls(function: Callable[..., Any], *args: Any) -> core.ClosedJaxpr:
    """The program of a function, with the bodies of calls in their places."""
    program = jax.make_jaxpr(function)(*args)
    entered = lambda *args: _enter(program.jaxpr, program.consts, args)
    return jax.make_jaxpr(entered)(*jax.tree.leaves(args))


def _enter(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        operands = [_read(env, atom) for atom in eqn.invars]
        if eqn.primitive in _CALLS:
            body = body_of(eqn)
            outs = _enter(open_jaxpr(body), consts_of(body), operands)
        else:
            with eqn.ctx.manager:
                outs = bind(eqn, operands)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [_read(env, atom) for atom in jaxpr.outvars]


def _read(env: dict[core.Var, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else env[atom]


def _variables(atoms: Sequence[Any]) -> list[core.Var]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _in(atom: Any, parts: dict[int, _Part]) -> bool:
    return any(atom is var for part in parts.values() for var in part.outs.values())
