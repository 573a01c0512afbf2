"""Where parameters act on activations: the places of a program at which noise is added to a value
of every token, and at which the gradient of parameters is formed from what goes in.

A site is an equation with an operand that is linear in parameters, another that is not made of
parameters, and a result [B, T, ...]: a product with a weight, a look-up in a table, a scale, a
bias. Loops over stacks of layers are entered; a bias that is added to the result of a site has
that site's error, and no noise of its own.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp

from zo_jax.jaxprs import (
    CALLS,
    bind,
    body_of,
    consts_of,
    open_jaxpr,
    scan_sizes,
    without_custom_vjp,
)
from zo_jax.trees import is_floating

# Results of these are linear in each operand, or in the one that is made of parameters.
_LINEAR = frozenset(
    """add add_any broadcast_in_dim convert_element_type copy copy_p dot_general dynamic_slice
    expand_dims gather mul name neg reduce_sum reshape rev slice squeeze sub transpose""".split()
)
# Those that hand on the error of their result to an operand as it is.
_SUMS = ("add", "add_any")
# Calls that are entered where a parameter goes in.
_ENTERED = (*CALLS, primitives.custom_jvp_call_p, primitives.custom_vjp_call_p)


class Site(NamedTuple):
    """A place where noise is added.

    Attributes:
      shape: of the value: [B, T, ...], after the lengths of the loops that it stands in.
      loops: their number.
      dtype: of the value.
      leaves: the parameters that act there, as indices.
    """

    shape: tuple[int, ...]
    loops: int
    dtype: Any
    leaves: frozenset[int]

    @property
    def token_shape(self) -> tuple[int, ...]:
        """What one token has there, after the lengths of the loops."""
        return (*self.shape[: self.loops], *self.shape[self.loops + 2 :])


class _Info(NamedTuple):
    """What is known of a value: the leaves that it is a linear function of (none: it is an
    activation), and the site that it is the result of.
    """

    leaves: frozenset[int] = frozenset()
    site: int | None = None


_PLAIN = _Info()
_Path = tuple[int, ...]


class Sites:
    """The sites of a program, and its evaluation with noise at them.

    Attributes:
      sites: in the order of evaluation.
      uncovered: leaves with a use that is no site.
      tokens: (B, T).
    """

    def __init__(self, jaxpr: core.Jaxpr, is_param: Sequence[bool], tokens: tuple[int, int]):
        """Finds them.

        Args:
          jaxpr: the program.
          is_param: for each input whether it is a parameter.
          tokens: (B, T).
        """
        self._jaxpr, self.tokens = jaxpr, tokens
        self.sites: list[Site] = []
        self.uncovered: set[int] = set()
        # Of an equation, by the indices of it and of those that it stands in: "site", "tap" (at
        # the site of an operand), "derive", "call", or of a scan the sites in its body.
        self._actions: dict[_Path, Any] = {}
        # The site of each tap.
        self._taps: dict[_Path, int] = {}
        infos = [_Info(frozenset([i])) if yes else _PLAIN for i, yes in enumerate(is_param)]
        for info in self._look(jaxpr, infos, (), ()):
            self.uncovered |= info.leaves

    def evaluate(
        self, consts: Sequence[Any], args: Sequence[Any], noises: Sequence[Any] | None = None
    ) -> tuple[list[Any], list[tuple[int, Any]]]:
        """(results, taps): a tap is a site and what parameters make there of their other operand.
        Without noise that is the only part of all this that is differentiable; with it the results
        are, by the noise too.

        Args:
          consts, args: of the program.
          noises: for each site what is added to the value there; None for nothing.
        """
        own = None if noises is None else dict(enumerate(noises))
        outs, taps = self._run(self._jaxpr, consts, args, own, ())
        held = _held(own)
        return list(map(held, outs)), [(self._taps[path], x) for path, x in taps]

    def _look(
        self, jaxpr: core.Jaxpr, infos: Sequence[_Info], path: _Path, loops: tuple[int, ...]
    ) -> list[_Info]:
        env = dict.fromkeys(jaxpr.constvars, _PLAIN)
        env.update(zip(jaxpr.invars, infos, strict=True))
        uses = collections.Counter(x for x in jaxpr.outvars if not isinstance(x, core.Literal))
        for eqn in jaxpr.eqns:
            uses.update(x for x in eqn.invars if not isinstance(x, core.Literal))

        def of(atom: Any) -> _Info:
            if isinstance(atom, core.Literal):
                return _PLAIN
            # What is read elsewhere too has another error than a sum that it is in.
            return env[atom] if uses[atom] == 1 else env[atom]._replace(site=None)

        for i, eqn in enumerate(jaxpr.eqns):
            outs = self._look_at(eqn, [of(atom) for atom in eqn.invars], (*path, i), loops)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    def _look_at(
        self, eqn: core.JaxprEqn, operands: list[_Info], path: _Path, loops: tuple[int, ...]
    ) -> list[_Info]:
        leaves = frozenset().union(*(x.leaves for x in operands))
        plain = [_PLAIN] * len(eqn.outvars)
        if not leaves:
            return plain
        if eqn.primitive in _ENTERED:
            self._actions[path] = "call"
            return self._look(open_jaxpr(body_of(eqn)), operands, path, loops)
        if eqn.primitive is primitives.scan_p:
            return self._look_at_scan(eqn, operands, path, loops)
        name, aval = eqn.primitive.name, eqn.outvars[0].aval
        is_data = any(
            not x.leaves and not isinstance(atom, core.Literal)
            for x, atom in zip(operands, eqn.invars, strict=True)
        )
        is_linear = name in _LINEAR and not (
            name in ("mul", "dot_general") and sum(bool(x.leaves) for x in operands) > 1
        )
        shape = aval.shape  # pyright: ignore
        if is_linear and is_data and shape[:2] == self.tokens and len(shape) > 2:
            shared = next((x.site for x in operands if x.site is not None), None)
            if name in _SUMS and shared is not None and self._fits(shared, shape, loops):
                self._actions[path], site = "tap", shared
                old = self.sites[site]
                self.sites[site] = old._replace(leaves=old.leaves | leaves)
            else:
                self._actions[path], site = "site", len(self.sites)
                self.sites.append(Site((*loops, *shape), len(loops), aval.dtype, leaves))  # pyright: ignore
            self._taps[path] = site
            return [_Info(site=site)]
        if is_linear:
            self._actions[path] = "derive"
            return [_Info(leaves)] * len(eqn.outvars)
        self.uncovered |= leaves
        return plain

    def _fits(self, site: int, shape: tuple[int, ...], loops: tuple[int, ...]) -> bool:
        return self.sites[site].shape == (*loops, *shape)

    def _look_at_scan(self, eqn, operands, path, loops):
        n, num_carry = scan_sizes(eqn.params)
        carry = operands[n : n + num_carry]
        for info in carry:
            self.uncovered |= info.leaves
        first = len(self.sites)
        inside = [
            *(x._replace(site=None) for x in operands[:n]),
            *[_PLAIN] * num_carry,
            *(x._replace(site=None) for x in operands[n + num_carry :]),
        ]
        body = eqn.params["jaxpr"].jaxpr
        for info in self._look(body, inside, path, (*loops, eqn.params["length"])):
            self.uncovered |= info.leaves
        self._actions[path] = range(first, len(self.sites))
        return [_PLAIN] * len(eqn.outvars)

    def _run(self, jaxpr, consts, args, noises, path):
        """(results, [(path of a tap, its value)])."""
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        held = _held(noises)
        read = lambda atom: atom.val if isinstance(atom, core.Literal) else env[atom]
        taps: list[tuple[_Path, Any]] = []
        for i, eqn in enumerate(jaxpr.eqns):
            own, operands = (*path, i), [read(atom) for atom in eqn.invars]
            action = self._actions.get(own)
            with eqn.ctx.manager:
                if action == "call":
                    body = body_of(eqn)
                    outs, more = self._run(open_jaxpr(body), consts_of(body), operands, noises, own)
                elif isinstance(action, range):
                    outs, more = self._run_scan(eqn, operands, noises, own, action)
                elif action == "derive":
                    outs, more = bind(eqn, operands), []
                else:
                    # Nothing is differentiated but what taps have of parameters.
                    outs = bind(eqn, list(map(held, operands)))
                    more = [(own, bind(eqn, operands)[0])] if action in ("site", "tap") else []
                    if action == "site" and noises is not None:
                        outs = [outs[0] + noises[self._taps[own]]]
            taps += more
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars], taps

    def _run_scan(self, eqn, operands, noises, path, inside):
        params, body = eqn.params, eqn.params["jaxpr"]
        n, num_carry = scan_sizes(params)
        consts, layers = operands[:n], operands[n + num_carry :]
        held = _held(noises)
        carry = list(map(held, operands[n : n + num_carry]))
        own = None if noises is None else {site: noises[site] for site in inside}
        paths: list[_Path] = []

        def step(carry, slices):
            layer, own = slices
            args = [*consts, *carry, *layer]
            outs, taps = self._run(body.jaxpr, body.consts, args, own, path)
            paths[:] = [tap for tap, _ in taps]
            outs = list(map(held, outs))
            return outs[:num_carry], (outs[num_carry:], [x for _, x in taps])

        carry, (ys, values) = lax.scan(
            step,
            carry,
            (layers, own),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys], list(zip(paths, values, strict=True))


def _held(noises: Any) -> Callable[[Any], Any]:
    """Of values that parameters have no part in: constants, where no noise is added."""
    return lax.stop_gradient if noises is None else lambda x: x


def trace_tokens(
    losses_of: Callable[..., Any], params: Any, batch: tuple[Any, ...]
) -> tuple[Callable[..., Any], Sites]:
    """((floating leaves, noises) -> (losses [B, T], taps), the sites) of `losses_of(params,
    *batch)`.

    Raises:
      ValueError: it does not return the floating losses of tokens [B, T].
    """
    leaves, treedef = jax.tree.flatten(params)
    fixed = [None if is_floating(leaf) else leaf for leaf in leaves]

    def run(values, batch):
        values = iter(values)
        own = [next(values) if x is None else x for x in fixed]
        return losses_of(jax.tree.unflatten(treedef, own), *batch)

    values = [leaf for leaf in leaves if is_floating(leaf)]
    closed, out = jax.make_jaxpr(lambda values: run(values, batch), return_shape=True)(values)
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if dtype is None or shape is None or len(shape) != 2 or not jnp.issubdtype(dtype, jnp.floating):
        got = type(out).__name__ if shape is None else f"shape {shape} and dtype {dtype}"
        raise ValueError(
            f"token_loss_fn must return the floating loss of every token [B, T], got {got}; leave "
            "out the mean"
        )
    jaxpr = without_custom_vjp(closed.jaxpr)
    sites = Sites(jaxpr, [True] * len(values), shape)
    sites.uncovered |= _elsewhere(run, values, batch, sites)

    def evaluate(values, noises):
        (losses_BT,), taps = sites.evaluate(closed.consts, values, noises)
        return losses_BT, taps

    return evaluate, sites


def _elsewhere(
    run: Callable[..., Any], values: list[Any], batch: tuple[Any, ...], sites: Sites
) -> set[int]:
    """The leaves with a use that is no site of a batch with other numbers of sequences and tokens:
    where the two of them, or one and another axis, are equal, shapes alone do not tell which axis
    is which.
    """
    B, T = sites.tokens
    if B != T and not any({B, T} & set(site.token_shape) for site in sites.sites):
        return set()
    fewer = T - 1 if T > 1 else T + 1
    more = B + 1 if B + 1 != fewer else B + 2

    def resized(x: Any) -> jax.ShapeDtypeStruct:
        shape = list(jnp.shape(x))
        if shape and shape[0] == B:
            shape[0] = more
        if len(shape) > 1 and shape[1] in (T, T + 1):
            shape[1] += fewer - T
        return jax.ShapeDtypeStruct(shape, jnp.result_type(x))

    try:
        others = jax.tree.map(resized, batch)
        closed, out = jax.make_jaxpr(run, return_shape=True)(values, others)
    except Exception:  # whatever a model raises that is of these shapes alone
        return set()
    if getattr(out, "shape", None) != (more, fewer):
        return set()
    is_param = [i < len(values) for i in range(len(closed.jaxpr.invars))]
    other = Sites(without_custom_vjp(closed.jaxpr), is_param, (more, fewer))
    return {i for i in other.uncovered if i < len(values)}
