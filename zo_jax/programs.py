"""Functions on perturbed arrays: traced to a jaxpr, then evaluated whole, or in two halves.

`lazily(fn)` is `fn` for arguments some of which are perturbed. `in_halves(fn, ...)` is for a
function that is evaluated with many parameters, of which some leaves stay the same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

from zo_jax.interpreter import Evaluation, plain
from zo_jax.jaxprs import without_custom_vjp
from zo_jax.plans import Known, evaluate_known, is_known
from zo_jax.prefix import plan_of
from zo_jax.rules import is_perturbed


def lazily(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, accepting pytrees with `Perturbed` leaves in its positional arguments.

    The result has plain arrays only. `fn` itself sees ordinary tracers of the perturbed arrays'
    shapes and dtypes. Derivatives are those of the function as it is written: the rules of
    `jax.custom_vjp` are left out, so that every function has them in forward mode.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> w, family = jnp.ones((2, 3)), zo_jax.low_rank(1)
    >>> moved = family.perturb(w, jax.random.key(0), 0.5)  # not formed
    >>> y = zo_jax.lazily(lambda w: w @ jnp.ones(3))(moved)  # nor here
    >>> z = family.direction(w, jax.random.key(0))
    >>> bool(jnp.allclose(y, (w + 0.5 * z) @ jnp.ones(3)))
    True
    """

    def wrapped(*args):
        leaves, treedef = jax.tree.flatten(args, is_leaf=is_perturbed)
        perturbed = [leaf for leaf in leaves if is_perturbed(leaf)]

        def fn_of_perturbed(*arrays):
            arrays = iter(arrays)
            return fn(
                *jax.tree.unflatten(
                    treedef, [next(arrays) if is_perturbed(leaf) else leaf for leaf in leaves]
                )
            )

        program = _trace(fn_of_perturbed, *perturbed)
        out = Evaluation().outputs(program.jaxpr, program.consts, perturbed)
        return program.results(out)

    return wrapped


def in_halves(
    fn: Callable[..., Any],
    params: Any,
    is_moved: Sequence[bool],
    *known: Any,
    keep_vjp: bool = False,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`fn(params, *known)` as two functions, of which the first is evaluated once for many
    parameters.

    `second(first(*known), moved, *known)` is `fn(moved, *known)` for parameters `moved` that differ
    from `params` in the leaves that `is_moved` names, perturbed ones among them. What the first
    returns is held while the second is in use: of what depends on no moved leaf the results of
    products, sums, look-ups and loops that others read, and nothing where there are none.

    Args:
      fn: any JAX code; what it closes over is known.
      params: pytree of arrays.
      is_moved: for each leaf whether it is another in `moved`.
      *known: pytrees of arrays or their shapes.
      keep_vjp: whether the rules of `jax.custom_vjp` stay, for reverse mode (then no leaf of
        `moved` is perturbed).
    """
    leaves, treedef = jax.tree.flatten(params)
    pick = lambda leaves: [x for x, moved in zip(leaves, is_moved, strict=True) if moved]

    def fn_of_moved(moved, *known):
        moved = iter(moved)
        of = [next(moved) if is_in else x for x, is_in in zip(leaves, is_moved, strict=True)]
        return fn(jax.tree.unflatten(treedef, of), *known)

    program = _trace(fn_of_moved, pick(leaves), *known, keep_vjp=keep_vjp)
    num_moved, num_known = sum(is_moved), len(jax.tree.leaves(known))
    statuses = [Known.NOT] * num_moved + [Known.CHEAP] * num_known
    plan = plan_of(program.jaxpr, program.consts, statuses)

    def first(*known):
        if plan is None:
            return ()
        args = [*[None] * num_moved, *jax.tree.leaves(known)]
        outs, kept = evaluate_known(plan, program.consts, args)
        return [x if is_known(y) else None for x, y in zip(outs, plan.outs, strict=True)], kept

    def second(kept, moved, *known):
        new, _ = jax.tree.flatten(moved, is_leaf=is_perturbed)
        for x, old, is_in in zip(new, leaves, is_moved, strict=True):
            if x is not old and not is_in:
                raise ValueError(
                    f"move must leave a leaf {jnp.shape(old)} as it is, which the moves of the "
                    "family leave out, and returned another; mend one of the two"
                )
        args = [*pick(new), *jax.tree.leaves(known)]
        run = Evaluation().outputs
        if plan is None:
            return program.results(run(program.jaxpr, program.consts, args))
        known_outs, handed_over = kept
        outs = run(program.jaxpr, program.consts, args, plan, handed_over)
        return program.results(
            [
                x if is_known(status) else y
                for x, y, status in zip(known_outs, outs, plan.outs, strict=True)
            ]
        )

    return first, second


class _Program(NamedTuple):
    """A function that was traced, and the shapes of what it returns."""

    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    out_shape: Any

    def results(self, outs: Sequence[Any]) -> Any:
        """The results of the jaxpr as those of the function: arrays."""
        outs = [plain(x, "return", "") for x in outs]
        return jax.tree.unflatten(jax.tree.structure(self.out_shape), outs)


def _trace(fn: Callable[..., Any], *args: Any, keep_vjp: bool = False) -> _Program:
    """`fn` of arrays of the shapes and dtypes of `args`."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    shapes = jax.tree.map(shape, args, is_leaf=is_perturbed)
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    jaxpr = closed.jaxpr if keep_vjp else without_custom_vjp(closed.jaxpr)
    return _Program(jaxpr, closed.consts, out_shape)
