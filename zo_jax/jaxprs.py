"""Programs as data: what JAX's jaxprs are made of, and how an equation of one is run."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import primitives

# Calls whose body is entered with the operands as they stand.
CALLS = (primitives.jit_p, primitives.closed_call_p, primitives.remat_p, primitives.call_p)


def body_of(call: core.JaxprEqn) -> core.ClosedJaxpr | core.Jaxpr:
    return call.params["jaxpr" if "jaxpr" in call.params else "call_jaxpr"]


def open_jaxpr(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def consts_of(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Sequence[Any]:
    return jaxpr.consts if isinstance(jaxpr, core.ClosedJaxpr) else ()


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(consts), len(carry)


def bind(eqn: core.JaxprEqn, args: Sequence[Any]) -> Sequence[Any]:
    """Runs an equation as it stands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Calls have their functions apart from the rest.
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*subfuns, *args, **params)
    return out if eqn.primitive.multiple_results else [out]


def without_custom_vjp(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The same program with plain calls for those of `jax.custom_vjp`, which would forbid
    forward-mode differentiation.
    """
    return _rewritten(jaxpr, {})


def _rewritten(jaxpr: core.Jaxpr, done: dict[int, Any]) -> core.Jaxpr:
    if id(jaxpr) not in done:
        eqns = [_plain_call(eqn, done) for eqn in jaxpr.eqns]
        is_same = all(new is old for new, old in zip(eqns, jaxpr.eqns, strict=True))
        # The old one is kept too, so that its identity stays its own.
        done[id(jaxpr)] = jaxpr if is_same else jaxpr.replace(eqns=eqns), jaxpr
    return done[id(jaxpr)][0]


def _plain_call(eqn: core.JaxprEqn, done: dict[int, Any]) -> core.JaxprEqn:
    def rewritten(value):
        if isinstance(value, core.ClosedJaxpr):
            if id(value) not in done:
                jaxpr = _rewritten(value.jaxpr, done)
                done[id(value)] = (
                    value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr),
                    value,
                )
            return done[id(value)][0]
        if isinstance(value, core.Jaxpr):
            return _rewritten(value, done)
        if type(value) is tuple:
            new = tuple(map(rewritten, value))
            return value if all(map(lambda a, b: a is b, new, value)) else new
        return value

    if eqn.primitive is primitives.custom_vjp_call_p:
        body = rewritten(eqn.params["call_jaxpr"])
        return eqn.replace(primitive=primitives.closed_call_p, params=dict(call_jaxpr=body))
    params = {name: rewritten(value) for name, value in eqn.params.items()}
    is_same = all(params[name] is value for name, value in eqn.params.items())
    return eqn if is_same else eqn.replace(params=params)
