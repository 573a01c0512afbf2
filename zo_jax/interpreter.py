"""Run any JAX function on perturbed parameters, each perturbed where it is used.

`lazily(fn)` traces `fn` to a jaxpr, as `jax.jit` would, and evaluates that with `Perturbed` values among its
inputs. An equation with none of them runs as it stands. For the others the value's own rule is asked, control flow
is entered, and where there is no rule the value is formed: the result is right for every function. A stack of layers
that is scanned is sliced before it is perturbed, so that one layer at a time is formed.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

from zo_jax.perturbed import MIN_BLOCKED, LowRank, Perturbed, Stack, scatter_layers

# A product with so many vectors costs at least twenty times what the perturbation of its matrix does.
_MANY_VECTORS = 64


class Formed(NamedTuple):
    """One place where a perturbed array had to be formed whole."""

    primitive: str
    shape: tuple[int, ...]
    kind: str
    where: str


_formed_logs: list[list[Formed]] = []


@contextlib.contextmanager
def record_formed() -> Iterator[list[Formed]]:
    """Record where perturbed arrays are formed, for functions traced inside the context.

    Yields:
      A list of `Formed`, filled while tracing: primitive, shape, kind of direction, line of the source.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> with zo_jax.record_formed() as formed:
    ...     _ = zo_jax.project(
    ...         lambda w: jnp.sum(jnp.exp(w)), jnp.ones((4, 4)), jax.random.key(0), num_queries=1,
    ...         perturbation=zo_jax.low_rank(1))
    >>> formed[0].primitive, formed[0].shape, formed[0].kind
    ('exp', (4, 4), 'LowRank')
    """
    log: list[Formed] = []
    _formed_logs.append(log)
    try:
        yield log
    finally:
        _formed_logs.remove(log)


def is_perturbed(x: Any) -> bool:
    return isinstance(x, Perturbed)


def lazily(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, accepting pytrees with `Perturbed` leaves in its positional arguments.

    The result has plain arrays only. `fn` itself sees ordinary tracers of the perturbed arrays' shapes and dtypes.
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
        jaxpr, out_shape = jax.make_jaxpr(fn_of_perturbed, return_shape=True)(*shapes)
        out = _evaluate(jaxpr.jaxpr, jaxpr.consts, perturbed)
        return jax.tree.unflatten(jax.tree.structure(out_shape), [_plain(x) for x in out])

    return wrapped


def _plain(x: Any) -> Any:
    return x.form() if is_perturbed(x) else x


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr, `Perturbed` values among the inputs and perhaps among the outputs."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else env[atom]
    for eqn in jaxpr.eqns:
        outs = _apply(eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_plain(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    return [_plain(x) for x in _evaluate(jaxpr, consts, args)]


def _apply(eqn: core.JaxprEqn, args: list[Any]) -> Sequence[Any]:
    """The outputs of one equation."""
    name = eqn.primitive.name
    if name in _CUSTOM_VJP:
        # Its rule is for backpropagation, and would forbid forward-mode differentiation.
        return _call(eqn.params, args)
    if not any(is_perturbed(arg) for arg in args):
        return _bind(eqn, args)
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](eqn.params, args)
    out = _rule(name, eqn.params, args)
    if out is not None:
        return [out]
    for arg in args:
        if is_perturbed(arg):
            for log in _formed_logs:
                where = jax.extend.source_info_util.summarize(eqn.source_info)
                log.append(Formed(name, arg.shape, type(arg).__name__, where))
    return _bind(eqn, [_plain(arg) for arg in args])


def _rule(name: str, params: dict[str, Any], args: list[Any]) -> Any:
    """The result from the perturbed operand's own rule, or None."""
    if name == "dot_general":
        lhs, rhs = args
        if is_perturbed(rhs):
            rule, other = rhs.rules.get(name), _plain(lhs)
            return rule and rule(rhs, params, other, True)
        return lhs.rules[name](lhs, params, rhs, False) if name in lhs.rules else None
    if name == "scatter" and not any(is_perturbed(x) for x in args[:2]):
        return scatter_layers(params, *args)
    first, *others = args
    if not is_perturbed(first) or any(is_perturbed(x) for x in others):
        return None
    rule = first.rules.get(name)
    return rule and rule(first, params, *others)


def _bind(eqn: core.JaxprEqn, args: Sequence[Any]) -> Sequence[Any]:
    """Runs an equation as it stands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Before JAX 0.10, functions among the parameters came apart from the rest.
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*subfuns, *args, **params)
    return out if eqn.primitive.multiple_results else [out]


def _call(params: dict[str, Any], args: list[Any]) -> Sequence[Any]:
    """jit, checkpoint and other calls: their body is entered."""
    jaxpr = params.get("jaxpr", params.get("call_jaxpr"))
    consts = jaxpr.consts if isinstance(jaxpr, core.ClosedJaxpr) else ()
    return _evaluate(_body(params), consts, args)


def _body(params: dict[str, Any]) -> core.Jaxpr:
    """What a call calls."""
    jaxpr = params.get("jaxpr", params.get("call_jaxpr"))
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _cond(params: dict[str, Any], args: list[Any]) -> Sequence[Any]:
    index, *operands = args
    branches = [
        lambda operands, branch=branch: _evaluate_plain(branch.jaxpr, branch.consts, operands)
        for branch in params["branches"]
    ]
    return lax.switch(_plain(index), branches, operands)


def _while(params: dict[str, Any], args: list[Any]) -> Sequence[Any]:
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = args[:n], args[n:m]
    return lax.while_loop(
        lambda carry: _evaluate_plain(cond.jaxpr, cond.consts, [*cond_consts, *carry])[0],
        lambda carry: _evaluate_plain(body.jaxpr, body.consts, [*body_consts, *carry]),
        [_plain(x) for x in args[m:]],
    )


def _scan(params: dict[str, Any], args: list[Any]) -> Sequence[Any]:
    body = params["jaxpr"]
    num_consts, num_carry = _scan_sizes(params)
    n, m = num_consts, num_consts + num_carry
    # A dense table that every iteration uses whole is formed once, before the loop.
    consts = [
        x.form() if is_perturbed(x) and not _stays_lazy(x, body.jaxpr, var) else x
        for x, var in zip(args[:n], body.jaxpr.invars[:n], strict=True)
    ]
    carry = [_plain(x) for x in args[n:m]]
    # Layers: the parts of a perturbed stack are sliced by the scan, and put together again inside.
    split = [x.layers() if is_perturbed(x) else None for x in args[m:]]
    xs = [s[0] if s else _plain(x) for s, x in zip(split, args[m:], strict=True)]

    def step(carry, slices):
        slices = [s[1](x) if s else x for s, x in zip(split, slices, strict=True)]
        out = _evaluate_plain(body.jaxpr, body.consts, [*consts, *carry, *slices])
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


def _scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(consts), len(carry)


def _stays_lazy(x: Perturbed, jaxpr: core.Jaxpr, var: core.Var) -> bool:
    """Whether a constant of a loop is cheap to perturb in every iteration.

    It is if it is low rank, or if it is only sliced there, or multiplied with so many vectors that the product
    costs far more than the perturbation.
    """
    if isinstance(x, LowRank | Stack):
        return isinstance(x, LowRank)
    return all(_is_cheap_use(eqn, use) for eqn, use in _uses(jaxpr, var))


def _is_cheap_use(eqn: core.JaxprEqn, var: core.Var) -> bool:
    if eqn.primitive.name == "dot_general":
        table_size = math.prod(var.aval.shape)
        other_size = sum(math.prod(atom.aval.shape) for atom in eqn.invars if atom is not var)
        contracted = math.prod(
            eqn.invars[0].aval.shape[i] for i in eqn.params["dimension_numbers"][0][0]
        )
        num_vectors = other_size // max(contracted, 1)
        return var.aval.ndim == 2 and table_size >= MIN_BLOCKED and num_vectors >= _MANY_VECTORS
    return eqn.primitive.name in ("gather", "dynamic_slice")


def _uses(jaxpr: core.Jaxpr, var: core.Var) -> Iterator[tuple[core.JaxprEqn, core.Var]]:
    """The equations that use a variable, also in the bodies of calls and loops; casts and transposes are seen through."""
    for eqn in jaxpr.eqns:
        for i, atom in enumerate(eqn.invars):
            if atom is var:
                if eqn.primitive.name in ("convert_element_type", "transpose"):
                    yield from _uses(jaxpr, eqn.outvars[0])
                elif (body := _body_for(eqn, i)) is not None:
                    yield from _uses(body, body.invars[i])
                else:
                    yield eqn, var


def _body_for(eqn: core.JaxprEqn, i: int) -> core.Jaxpr | None:
    """The body of a call or a scan that has operand i whole, as its input i."""
    name = eqn.primitive.name
    if _CONTROL_FLOW.get(name) is _call or name in _CUSTOM_VJP:
        return _body(eqn.params)
    if name == "scan" and i < _scan_sizes(eqn.params)[0]:
        return eqn.params["jaxpr"].jaxpr
    return None


_CUSTOM_VJP = ("custom_vjp_call", "custom_vjp_call_jaxpr")

_CONTROL_FLOW = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
    "checkpoint": _call,
    "remat2": _call,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
