"""Jaxprs evaluated with perturbed values among their inputs, each perturbed where it is used.

An equation with none of them runs as it stands. For the others the rules of `zo_jax.rules` are
asked, control flow is entered, and where there is no rule the value is formed: the result is right
for every program. A stack of layers that is scanned is sliced before it is perturbed, so that one
layer at a time is formed.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core, source_info_util
from jax.extend.core import primitives
import jax.numpy as jnp
import numpy as np

from zo_jax import entries, lookups, products  # noqa: F401 (their rules)
from zo_jax.jaxprs import (
    CALLS,
    bind,
    body_of,
    consts_of,
    open_jaxpr,
    scan_sizes,
)
from zo_jax.loops import is_cheap_inside
from zo_jax.plans import Kept, Plan, Turns, layer
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


def plain(x: Any, primitive: str, where: str) -> Any:
    """x itself, or formed if it is perturbed, of which the record is told."""
    if not is_perturbed(x):
        return x
    for log in _logs.get():
        log.append(Formed(primitive, x.shape, x.label, where))
    return x.form()


class Evaluation:
    """One evaluation of a jaxpr with `Perturbed` values among its inputs."""

    def __init__(self):
        # The bodies of inner jits as functions of such values, by the identity of their jaxprs and
        # plans, which are kept alive.
        self._calls: dict[tuple[int, int], tuple[Any, Callable[..., Any]]] = {}

    def outputs(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Any],
        plan: Plan | None = None,
        kept: Kept | None = None,
    ) -> list[Any]:
        """Those of a jaxpr, some perhaps perturbed; with a plan the second half of it, where the
        results of the first are None unless they were handed over.
        """
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        read = lambda atom: atom.val if isinstance(atom, core.Literal) else env.get(atom)
        equations = range(len(jaxpr.eqns)) if plan is None else plan.second
        if plan is not None and kept is not None:
            env.update(zip(plan.kept, kept.values, strict=True))
            env.update(plan.static)
        for i in equations:
            eqn = jaxpr.eqns[i]
            operands = [read(atom) for atom in eqn.invars]
            with eqn.ctx.manager:
                if plan is not None and kept is not None and i in plan.parts:
                    outs = self._rest_of(eqn, operands, plan.parts[i], kept.parts[i])
                else:
                    outs = self._equation(eqn, operands)
            env.update((v, x) for v, x in zip(eqn.outvars, outs, strict=True) if x is not None)
        return [read(atom) for atom in jaxpr.outvars]

    def _rest_of(
        self, eqn: core.JaxprEqn, operands: list[Any], part: Plan | Turns, kept: Kept
    ) -> Sequence[Any]:
        """The second half of a call or a scan."""
        if isinstance(part, Plan):
            return self._call(eqn, operands, part, kept)
        return self._later_turns(eqn, operands, part, kept)

    def _plain_outputs(self, eqn, closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        """Those of the body of a loop or a branch: arrays."""
        return self._form_all(eqn, self.outputs(closed.jaxpr, closed.consts, args))

    def _form_all(self, eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
        if not any(map(is_perturbed, values)):
            return list(values)
        where = source_info_util.summarize(eqn.source_info)
        return [plain(x, eqn.primitive.name, where) for x in values]

    def _equation(self, eqn: core.JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        perturbed = [x for x in operands if is_perturbed(x)]
        if not perturbed:
            return bind(eqn, operands)
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
        return bind(eqn, self._form_all(eqn, operands))

    def _call(
        self,
        eqn: core.JaxprEqn,
        operands: list[Any],
        plan: Plan | None = None,
        kept: Kept | None = None,
    ) -> Sequence[Any]:
        """A call of the body with the operands as they stand; an inner jit stays one, traced once
        for all equal calls.
        """
        body = body_of(eqn)
        run = lambda kept, *args: self.outputs(open_jaxpr(body), consts_of(body), args, plan, kept)
        if eqn.primitive is not primitives.jit_p or eqn.params["inline"]:
            return run(kept, *operands)
        key = id(body), id(plan)
        if key not in self._calls:
            run.__name__ = eqn.params["name"]
            self._calls[key] = (body, plan), jax.jit(run)
        return self._calls[key][1](kept, *operands)

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

    def _later_turns(
        self, eqn: core.JaxprEqn, operands: list[Any], part: Turns, kept: Kept
    ) -> Sequence[Any]:
        """A scan from its first turn on that is not known."""
        params, body = eqn.params, eqn.params["jaxpr"]
        n, num_carry = scan_sizes(params)
        first, length = part.count, params["length"]
        consts, layers = operands[:n], operands[n + num_carry :]
        carry, ys = kept.values[:num_carry], kept.values[num_carry:]
        turns = [self._layers_from(eqn, x, first) for x in layers]
        arguments = lambda carry, i: [*consts, *carry, *(at(i) for at in turns)]

        def step(carry, i):
            out = self._plain_outputs(eqn, body, arguments(carry, i))
            return out[:num_carry], out[num_carry:]

        if part.last is None:
            carry, later = lax.scan(
                step,
                carry,
                np.arange(first, length),
                unroll=min(params["unroll"], length - first),
            )
        else:
            known, inner = kept.parts[0]
            args = arguments(carry, first)
            out = self.outputs(body.jaxpr, body.consts, args, part.last, inner)
            out = [y if y is not None else x for x, y in zip(known, out, strict=True)]
            out = self._form_all(eqn, out)
            carry, later = out[:num_carry], [jnp.expand_dims(y, 0) for y in out[num_carry:]]
        return [*carry, *(jnp.concatenate(pair) for pair in zip(ys, later, strict=True))]

    def _layers_from(self, eqn: core.JaxprEqn, x: Any, first: int) -> Callable[[jax.Array], Any]:
        """What is layer i of a stack, for i from `first` on."""
        if not is_perturbed(x):
            return lambda i: layer([x], i)[0]
        own = x.rows_from(first)
        if own is not None:
            at = self._layers_from(eqn, own, 0)
            return lambda i: at(i - first)
        if x.layers() is None:
            return self._layers_from(eqn, self._form_all(eqn, [x])[0], first)
        return x.layer

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
    primitives.cond_p: Evaluation._cond,
    primitives.while_p: Evaluation._while,
    primitives.scan_p: Evaluation._scan,
}


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
