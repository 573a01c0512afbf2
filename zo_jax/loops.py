"""What a loop is to form before it begins: the perturbed constants that every turn would form
again.

A constant stays as it is if each use of it in the body is cheap: a rule of `zo_jax.rules` applies,
or the product that forms it costs far more than forming it does.
"""

from collections.abc import Iterator, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from zo_jax.jaxprs import CALLS, body_of, open_jaxpr, scan_sizes
from zo_jax.perturbed import Factored, Perturbed
from zo_jax.products import MIN_BLOCKED
from zo_jax.rules import apply_rule, is_perturbed

# A product with so many vectors costs at least twenty times what the perturbation of its matrix
# does.
_MANY_VECTORS = 64


class _Scope(NamedTuple):
    """A jaxpr inside a loop's body, and the call and the scope that it is called in, if it is not
    the body itself.
    """

    jaxpr: core.Jaxpr
    call: core.JaxprEqn | None = None
    caller: Any = None


def is_cheap_inside(x: Perturbed, body: core.Jaxpr, var: core.Var) -> bool:
    """Whether a constant of a loop, the variable `var` of its body, is cheap to perturb in every
    turn.
    """
    return _all_cheap(x, var, _Scope(body), x.size)


def _all_cheap(x: Perturbed, var: core.Var, scope: _Scope, size: int) -> bool:
    return all(_is_cheap(x, eqn, i, scope, size) for eqn, i in _uses(scope.jaxpr, var)) and all(
        scope.call is not None and _all_cheap(x, scope.call.outvars[i], scope.caller, size)
        for i, out in enumerate(scope.jaxpr.outvars)
        if out is var
    )


def _uses(jaxpr: core.Jaxpr, var: core.Var) -> Iterator[tuple[core.JaxprEqn, int]]:
    for eqn in jaxpr.eqns:
        for i, atom in enumerate(eqn.invars):
            if atom is var:
                yield eqn, i


def _is_cheap(x: Perturbed, eqn: core.JaxprEqn, i: int, scope: _Scope, size: int) -> bool:
    """Whether operand i of an equation, part of a constant with so many entries, is used
    cheaply.
    """
    is_dense = not isinstance(x, Factored)
    if eqn.primitive in CALLS:
        body = open_jaxpr(body_of(eqn))
        return _all_cheap(x, body.invars[i], _Scope(body, eqn, scope), size)
    if eqn.primitive is primitives.cond_p:
        bodies = [open_jaxpr(branch) for branch in eqn.params["branches"]]
        return all(_all_cheap(x, body.invars[i - 1], _Scope(body), size) for body in bodies)
    if eqn.primitive is primitives.while_p:
        return _is_cheap_in_while(x, eqn, i, size)
    if eqn.primitive is primitives.scan_p:
        return _is_cheap_in_scan(x, eqn, i, size)
    if is_dense and eqn.primitive is lax.dot_general_p:
        contracted = eqn.params["dimension_numbers"][0][1 - i]
        shape = eqn.invars[1 - i].aval.shape  # pyright: ignore
        num_vectors = math.prod(n for a, n in enumerate(shape) if a not in contracted)
        return size >= MIN_BLOCKED and num_vectors >= _MANY_VECTORS
    if is_dense and eqn.primitive in (lax.gather_p, lax.dynamic_slice_p):
        return True
    results = _abstract_results(x, eqn, i)
    return results is not NotImplemented and all(
        _all_cheap(out, var, scope, size)
        for out, var in zip(results, eqn.outvars, strict=True)
        if is_perturbed(out)
    )


def _is_cheap_in_while(x: Perturbed, eqn: core.JaxprEqn, i: int, size: int) -> bool:
    params = eqn.params
    n = params["cond_nconsts"]
    if i >= n + params["body_nconsts"]:
        return False  # a carry
    body = params["cond_jaxpr"].jaxpr if i < n else params["body_jaxpr"].jaxpr
    return _all_cheap(x, body.invars[i if i < n else i - n], _Scope(body), size)


def _is_cheap_in_scan(x: Perturbed, eqn: core.JaxprEqn, i: int, size: int) -> bool:
    body = eqn.params["jaxpr"].jaxpr
    num_consts, num_carry = scan_sizes(eqn.params)
    if i < num_consts:
        return _all_cheap(x, body.invars[i], _Scope(body), size)
    if i < num_consts + num_carry or x.layers() is None:
        return False
    layer = jax.eval_shape(lambda x: x.layer(0), x)
    return _all_cheap(layer, body.invars[i], _Scope(body), size)


def _abstract_results(x: Perturbed, eqn: core.JaxprEqn, i: int) -> Sequence[Any]:
    """What the rules make of an equation in which x is operand i: shapes; or NotImplemented."""
    others = [
        None if j == i or isinstance(atom, core.Literal) else jax.ShapeDtypeStruct(*_shape(atom))
        for j, atom in enumerate(eqn.invars)
    ]
    applies = True

    def run(x, others):
        nonlocal applies
        literal = lambda atom, other: atom.val if isinstance(atom, core.Literal) else other
        operands = [literal(atom, other) for atom, other in zip(eqn.invars, others, strict=True)]
        operands[i] = x
        result = apply_rule(eqn.primitive, operands, eqn.params)
        applies = result is not NotImplemented
        return result if applies else ()

    with eqn.ctx.manager:
        result = jax.eval_shape(run, x, others)
    if not applies:
        return NotImplemented
    return result if eqn.primitive.multiple_results else [result]


def _shape(atom: core.Var) -> tuple[tuple[int, ...], Any]:
    return atom.aval.shape, atom.aval.dtype  # pyright: ignore
