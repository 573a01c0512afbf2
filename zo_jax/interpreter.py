"""Run any JAX function on perturbed parameters, each perturbed where it is used.

`lazily(fn)` traces `fn` to a jaxpr, as `jax.jit` would, and evaluates that with `Perturbed` values
among its inputs. An equation with none of them runs as it stands. For the others the rules of
`zo_jax.rules` are asked, control flow is entered, and where there is no rule the value is formed:
the result is right for every function. A stack of layers that is scanned is sliced before it is
perturbed, so that one layer at a time is formed.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core, source_info_util
from jax.extend.core import primitives

from zo_jax import entries, lookups, products  # noqa: F401 (their rules)
from zo_jax.loops import CALLS, body_of, is_cheap_inside, open_jaxpr, scan_sizes
from zo_jax.rules import apply_rule, is_perturbed


class Formed(NamedTuple):
    """One place where a perturbed array had to be formed whole."""

    primitive: str
    shape: tuple[int, ...]
    kind: str
    where: str


_logs: contextvars.ContextVar[tuple[list[Formed], ...]] = contextvars.ContextVar("logs", default=())


@contextlib.contextmanager
def record_formed() -> Iterator[list[Formed]]:
    """Record where perturbed arrays are formed, for functions traced inside the context.

    Yields:
      A list of `Formed`, filled while tracing: primitive ("return" for results of the function),
      shape, kind of direction, line of the source. The body of an inner `jax.jit` is traced, and
      recorded, once for all equal calls.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> with zo_jax.record_formed() as formed:
    ...     _ = zo_jax.project(
    ...         lambda w: jnp.sum(jnp.exp(w)), jnp.ones((4, 4)), jax.random.key(0), num_queries=1,
    ...         perturbation=zo_jax.low_rank(1))
    >>> formed[0].primitive, formed[0].shape, formed[0].kind
    ('exp', (4, 4), 'LowRank')
    """
    log: list[Formed] = []
    token = _logs.set((*_logs.get(), log))
    try:
        yield log
    finally:
        _logs.reset(token)


def lazily(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, accepting pytrees with `Perturbed` leaves in its positional arguments.

    The result has plain arrays only. `fn` itself sees ordinary tracers of the perturbed arrays'
    shapes and dtypes. Derivatives are those of the function as it is written: the rules of
    `jax.custom_vjp` are left out, so that every function has them in forward mode.
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

        shapes = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in perturbed]
        closed, out_shape = jax.make_jaxpr(fn_of_perturbed, return_shape=True)(*shapes)
        jaxpr = _without_custom_vjp(closed.jaxpr, {})
        out = _Evaluation().outputs(jaxpr, closed.consts, perturbed)
        out = [_formed(x, "return", "") for x in out]
        return jax.tree.unflatten(jax.tree.structure(out_shape), out)

    return wrapped


def _formed(x: Any, primitive: str, where: str) -> Any:
    """x itself, or formed if it is perturbed, of which the record is told."""
    if not is_perturbed(x):
        return x
    for log in _logs.get():
        log.append(Formed(primitive, x.shape, x.label, where))
    return x.form()


class _Evaluation:
    """One evaluation of a jaxpr with `Perturbed` values among its inputs."""

    def __init__(self):
        # The bodies of inner jits as functions of such values, by the identity of their jaxprs,
        # which are kept alive.
        self._calls: dict[int, tuple[Any, Callable[..., Any]]] = {}

    def outputs(self, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Those of a jaxpr, some perhaps perturbed."""
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        read = lambda atom: atom.val if isinstance(atom, core.Literal) else env[atom]
        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            with eqn.ctx.manager:
                outs = self._equation(eqn, operands)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _plain_outputs(self, eqn, closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        """Those of the body of a loop or a branch: arrays."""
        return self._form_all(eqn, self.outputs(closed.jaxpr, closed.consts, args))

    def _form_all(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
        if not any(map(is_perturbed, values)):
            return list(values)
        where = source_info_util.summarize(eqn.source_info)
        return [_formed(x, eqn.primitive.name, where) for x in values]

    def _equation(self, eqn: core.JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        perturbed = [x for x in operands if is_perturbed(x)]
        if not perturbed:
            return _bind(eqn, operands)
        if eqn.primitive in CALLS:
            return self._call(eqn, operands)
        if eqn.primitive in _CONTROL_FLOW:
            return _CONTROL_FLOW[eqn.primitive](self, eqn, operands)
        # Rules are for one perturbed operand: of several the largest.
        largest = max(perturbed, key=lambda x: x.size)
        for i, x in enumerate(operands):
            if x is not largest:
                operands[i : i + 1] = self._form_all(eqn, [x])
        if sum(map(is_perturbed, operands)) == 1:
            result = apply_rule(eqn.primitive, operands, eqn.params)
            if result is not NotImplemented:
                return _checked(eqn, result)
        return _bind(eqn, self._form_all(eqn, operands))

    def _call(self, eqn: core.JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        """A call of the body with the operands as they stand; an inner jit stays one, traced once
        for all equal calls.
        """
        body = body_of(eqn)
        consts = body.consts if isinstance(body, core.ClosedJaxpr) else ()
        run = lambda *args: self.outputs(open_jaxpr(body), consts, args)
        if eqn.primitive is not primitives.jit_p or eqn.params["inline"]:
            return run(*operands)
        if id(body) not in self._calls:
            run.__name__ = eqn.params["name"]
            self._calls[id(body)] = body, jax.jit(run)
        return self._calls[id(body)][1](*operands)

    def _cond(self, eqn: core.JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        branches = [
            lambda operands, branch=branch: self._plain_outputs(eqn, branch, operands)
            for branch in eqn.params["branches"]
        ]
        return lax.switch(operands[0], branches, operands[1:])

    def _while(self, eqn: core.JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        n, m = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        cond_consts = self._before_loop(eqn, cond.jaxpr, operands[:n])
        body_consts = self._before_loop(eqn, body.jaxpr, operands[n:m])
        return lax.while_loop(
            lambda carry: self._plain_outputs(eqn, cond, [*cond_consts, *carry])[0],
            lambda carry: self._plain_outputs(eqn, body, [*body_consts, *carry]),
            self._form_all(eqn, operands[m:]),
        )

    def _scan(self, eqn: core.JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        params, body = eqn.params, eqn.params["jaxpr"]
        num_consts, num_carry = scan_sizes(params)
        n, m = num_consts, num_consts + num_carry
        consts = self._before_loop(eqn, body.jaxpr, operands[:n])
        carry = self._form_all(eqn, operands[n:m])
        # Layers: the parts of a perturbed stack are sliced by the scan, and put together again
        # inside.
        split = [x.layers() if is_perturbed(x) else None for x in operands[m:]]
        xs = [
            s[0] if s else self._form_all(eqn, [x])[0]
            for s, x in zip(split, operands[m:], strict=True)
        ]

        def step(carry, slices):
            slices = [s[1](x) if s else x for s, x in zip(split, slices, strict=True)]
            out = self._plain_outputs(eqn, body, [*consts, *carry, *slices])
            return out[: len(carry)], out[len(carry) :]

        carry, ys = lax.scan(
            step,
            carry,
            xs,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys]

    def _before_loop(
        self, eqn: core.JaxprEqn, body: core.Jaxpr, consts: Sequence[Any]
    ) -> list[Any]:
        """The constants of a loop, formed if every turn would form them again."""
        return [
            self._form_all(eqn, [x])[0]
            if is_perturbed(x) and not is_cheap_inside(x, body, var)
            else x
            for x, var in zip(consts, body.invars[: len(consts)], strict=True)
        ]


_CONTROL_FLOW = {
    primitives.cond_p: _Evaluation._cond,
    primitives.while_p: _Evaluation._while,
    primitives.scan_p: _Evaluation._scan,
}


def _bind(eqn: core.JaxprEqn, args: Sequence[Any]) -> Sequence[Any]:
    """Runs an equation as it stands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Calls have their functions apart from the rest.
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*subfuns, *args, **params)
    return out if eqn.primitive.multiple_results else [out]


def _checked(eqn: core.JaxprEqn, result: Any) -> Sequence[Any]:
    """The results of a rule, if they are those of its primitive in shape and dtype."""
    results = list(result) if eqn.primitive.multiple_results else [result]
    got = [(x.shape, x.dtype) for x in results]
    required = [(var.aval.shape, var.aval.dtype) for var in eqn.outvars]  # pyright: ignore
    if got != required:
        raise ValueError(
            f"a rule for {eqn.primitive} must return {required} (shape, dtype), got {got}; mend "
            f"the function under "
            "zo_jax.register_rule"
        )
    return results


def _without_custom_vjp(jaxpr: core.Jaxpr, done: dict[int, Any]) -> core.Jaxpr:
    """The same program with plain calls for those of `jax.custom_vjp`, which would forbid
    forward-mode differentiation.
    """
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
                jaxpr = _without_custom_vjp(value.jaxpr, done)
                done[id(value)] = (
                    value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr),
                    value,
                )
            return done[id(value)][0]
        if isinstance(value, core.Jaxpr):
            return _without_custom_vjp(value, done)
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
