"""A program in two halves, of which the first is evaluated once for many evaluations of the second:
how it is cut, and the first half.

`zo_jax.prefix` makes the cut, `zo_jax.interpreter` evaluates the second half.
"""

from collections.abc import Sequence
import dataclasses
import enum
from typing import Any, NamedTuple

from jax import lax
from jax.extend import core
import numpy as np

from zo_jax.jaxprs import bind, body_of, consts_of, scan_sizes


class Known(enum.Enum):
    """What is known of a value: nothing; all of it, and it costs nothing to make from inputs; or
    all of it, at a cost.
    """

    NOT = 0
    CHEAP = 1
    DEAR = 2


class Rows(NamedTuple):
    """Of a stack so many leading rows are known."""

    count: int


Status = Known | Rows


class Turns(NamedTuple):
    """A scan whose first `count` turns are known; `last` is the plan of the only other one, if
    there is one other and something of it is known.
    """

    count: int
    last: "Plan | None"


class Kept(NamedTuple):
    """What the first half hands to the second: a pytree.

    Attributes:
      values: of `Plan.kept`.
      parts: by the index of an equation in both halves, what it hands over itself.
    """

    values: list[Any]
    parts: dict[int, Any]


@dataclasses.dataclass(eq=False)
class Plan:
    """A jaxpr in two halves.

    Attributes:
      jaxpr: the program.
      first, second: indices of the equations evaluated in each half, in order.
      kept: the variables whose values are handed over.
      static: variables that are indices known while tracing.
      parts: the equations in both halves: calls, and scans.
      stacks: those in the first half that put together a stack of which only leading rows are
        known, which are those of the first operand.
      outs: what is known of the results; those that are known come from the first half.
      reads_first, reads_second: which inputs each half reads.
    """

    jaxpr: core.Jaxpr
    first: list[int]
    second: list[int]
    kept: list[core.Var]
    static: dict[core.Var, np.ndarray]
    parts: "dict[int, Plan | Turns]"
    stacks: set[int]
    outs: list[Status]
    reads_first: list[bool]
    reads_second: list[bool]

    @property
    def saves(self) -> bool:
        """Whether anything that costs something is in the first half."""
        parts = self.parts.values()
        has_dear = bool(self.kept) or Known.DEAR in self.outs
        return has_dear or any(isinstance(x, Turns) or x.saves for x in parts)


def is_known(status: Status) -> bool:
    return status in (Known.CHEAP, Known.DEAR)


def evaluate_known(
    plan: Plan, consts: Sequence[Any], args: Sequence[Any]
) -> tuple[list[Any], Kept]:
    """The first half: (results, None where nothing is known of one; what is handed over).

    Args:
      plan: the halves.
      consts: of its jaxpr.
      args: None where one is not known; of a stack whose leading rows are known, any array with
        those.
    """
    jaxpr = plan.jaxpr
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else env.get(atom)
    parts, is_later = {}, set(plan.second)
    for i in plan.first:
        eqn, part = jaxpr.eqns[i], plan.parts.get(i)
        operands = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            if part is not None:
                if isinstance(part, Turns):
                    outs, rest = _first_turns(part, eqn, operands)
                else:
                    outs, rest = evaluate_known(part, consts_of(body_of(eqn)), operands)
                if i in is_later:
                    parts[i] = rest
            elif i in plan.stacks:
                outs = operands[:1]
            else:
                outs = bind(eqn, operands)
        env.update(zip(eqn.outvars, outs, strict=True))
    outs = [read(atom) for atom in jaxpr.outvars]
    return outs, Kept([env[var] for var in plan.kept], parts)


def _first_turns(
    part: Turns, eqn: core.JaxprEqn, operands: Sequence[Any]
) -> tuple[list[Any], Kept]:
    """Of a scan: (what is known of its results; the carry after the known turns and what they put
    out, then what the last turn hands over).
    """
    nothing = [None] * len(eqn.outvars)
    params, body = eqn.params, eqn.params["jaxpr"]
    n, num_carry = scan_sizes(params)
    m = n + num_carry
    consts, carry, layers = operands[:n], operands[n:m], operands[m:]
    run = core.jaxpr_as_fun(body)

    def step(carry, i):
        outs = run(*consts, *carry, *layer(layers, i))
        return outs[:num_carry], outs[num_carry:]

    carry, ys = lax.scan(
        step, list(carry), np.arange(part.count), unroll=min(params["unroll"], part.count)
    )
    if part.last is None:
        return nothing, Kept([*carry, *ys], {})
    args = [*consts, *carry, *layer(layers, part.count)]
    needed = [
        x if is_read else None for x, is_read in zip(args, part.last.reads_first, strict=True)
    ]
    outs, kept = evaluate_known(part.last, body.consts, needed)
    reads = part.last.reads_second[n:m]
    carry = [x if is_read else None for x, is_read in zip(carry, reads, strict=True)]
    known = [x if is_known(y) else None for x, y in zip(outs, part.last.outs, strict=True)]
    results = [*known[:num_carry], *nothing[num_carry:]]
    return results, Kept([*carry, *ys], {0: (outs, kept)})


def layer(layers: Sequence[Any], i: Any) -> list[Any]:
    """Layer i of each stack."""
    return [lax.dynamic_index_in_dim(x, i, keepdims=False) for x in layers]
