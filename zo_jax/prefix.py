"""What of a program is known before its unknown inputs are: evaluated once, it serves many
evaluations of the rest.

`plan_of(jaxpr, ...)` says which equations are known because no operand of theirs comes from an
unknown input, and which of their results the rest reads; `evaluate_known` computes these. Calls
are entered, and a scan over a stack of layers whose leading ones are known is run up to the first
that is not. The rest is for `zo_jax.interpreter` to evaluate.

Between the two halves only what costs something is kept: results of products, sums, look-ups and
loops, and what is made of them. What is cast, broadcast or computed entry by entry from inputs
alone (masks, positions, weights in another dtype) is made again where it is used, and so is what
is larger than that which it is made of: nothing is held that the program did not hold.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.extend import core
from jax.extend.core import primitives
import numpy as np

from zo_jax.jaxprs import CALLS, bind, body_of, consts_of, open_jaxpr, scan_sizes
from zo_jax.plans import Known, Plan, Rows, Status, Turns, is_known

# Primitives that compute entry by entry, or move entries about: XLA fuses them into their uses.
_CHEAP = frozenset(
    """abs acos acosh add and asin asinh atan atan2 atanh bitcast_convert_type broadcast_in_dim cbrt
    ceil clamp clz complex concatenate conj convert_element_type copy copy_p cos cosh device_put
    digamma div dynamic_slice eq erf erf_inv erfc exp exp2 expand_dims expm1 floor ge gt imag
    integer_pow iota is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter
    not optimization_barrier or pad population_count pow random_bits random_fold_in random_seed
    random_split random_unwrap random_wrap real reduce_precision rem reshape rev round rsqrt
    select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh slice split sqrt square squeeze stop_gradient sub tan tanh threefry2x32 transpose
    xor""".split()
)
# Primitives of one operand that leave the rows of a stack what they are.
_ROWWISE = ("convert_element_type", "copy", "copy_p", "name")
# Entries of an index that is looked at while tracing.
_MAX_STATIC = 2**16


def plan_of(jaxpr: core.Jaxpr, consts: Sequence[Any], statuses: Sequence[Status]) -> Plan | None:
    """The halves of a program, or None if there is nothing that the first one would save.

    Args:
      jaxpr: the program; its constants are known.
      consts: their values.
      statuses: what is known of each input.
    """
    whole = _plan(jaxpr, consts, statuses, {})
    return whole if whole.saves else None


def _plan(
    jaxpr: core.Jaxpr, consts: Sequence[Any], statuses: Sequence[Status], done: dict[Any, Any]
) -> Plan:
    """The halves of a jaxpr; equal calls have the same ones, which are in `done`."""
    key = id(jaxpr), *map(id, consts), *statuses
    if key not in done:
        # What is known by its identity is kept.
        done[key] = _Analysis(jaxpr, consts, statuses, done).plan(), jaxpr, consts
    return done[key][0]


class _Analysis:
    """What is known of each variable of a jaxpr, from the inputs on; then what each half needs,
    from the results back.
    """

    def __init__(self, jaxpr, consts, statuses, done):
        self.jaxpr, self.done = jaxpr, done
        self.status: dict[core.Var, Status] = dict.fromkeys(jaxpr.constvars, Known.CHEAP)
        self.status.update(zip(jaxpr.invars, statuses, strict=True))
        self.consts = dict(zip(jaxpr.constvars, consts, strict=True))
        self.source: dict[core.Var, core.JaxprEqn] = {}
        self.static: dict[core.Var, np.ndarray] = {}
        self.parts: dict[int, Plan | Turns] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            self.status.update(zip(eqn.outvars, self._results(i, eqn), strict=True))
            self.source.update(dict.fromkeys(eqn.outvars, eqn))

    def of(self, atom: Any) -> Status:
        return Known.CHEAP if isinstance(atom, core.Literal) else self.status[atom]

    def _results(self, i: int, eqn: core.JaxprEqn) -> list[Status]:
        operands = [self.of(atom) for atom in eqn.invars]
        unknown: list[Status] = [Known.NOT] * len(eqn.outvars)
        if eqn.effects and eqn.primitive not in CALLS:
            return unknown
        if all(map(is_known, operands)) and not eqn.effects:
            is_dear = Known.DEAR in operands or not _is_cheap(eqn)
            return [Known.DEAR if is_dear else Known.CHEAP] * len(eqn.outvars)
        if eqn.primitive in CALLS:
            body = body_of(eqn)
            inner = _plan(open_jaxpr(body), consts_of(body), operands, self.done)
            if inner.saves or any(status is not Known.NOT for status in inner.outs):
                self.parts[i] = inner
                return [Known.DEAR if is_known(x) else x for x in inner.outs]
            return unknown
        if eqn.primitive is primitives.scan_p:
            if turns := self._turns(eqn, operands):
                self.parts[i] = turns
                # Of the only turn that is left some results may be known too.
                num_carry = scan_sizes(eqn.params)[1]
                outs = turns.last.outs[:num_carry] if turns.last else []
                carry = [Known.DEAR if is_known(x) else Known.NOT for x in outs]
                return [*carry, *unknown[len(carry) :]]
            return unknown
        count = self._known_rows(eqn, operands)
        return [Rows(count)] if count else unknown

    def _known_rows(self, eqn: core.JaxprEqn, operands: Sequence[Status]) -> int:
        """How many leading rows of a result are known: of a stack with layers put in, or of parts
        one after the other.
        """
        name, first = eqn.primitive.name, operands[0]
        if name in _ROWWISE and isinstance(first, Rows):
            return first.count
        if name == "concatenate" and eqn.params["dimension"] == 0 and is_known(first):
            return eqn.invars[0].aval.shape[0]  # pyright: ignore
        if name != "scatter" or not is_known(first) or not is_known(operands[1]):
            return 0
        numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape  # pyright: ignore
        indices = self._static(eqn.invars[1])
        if indices is None or indices.size == 0 or numbers.scatter_dims_to_operand_dims != (0,):
            return 0
        if numbers.operand_batching_dims:
            return 0
        if isinstance(eqn.invars[1], core.Var):
            self.static[eqn.invars[1]] = indices
        # One that is out of bounds, or counts from the end, is moved or left out.
        return max(0, int(indices.min())) if indices.max() < shape[0] else 0

    def _static(self, atom: Any) -> np.ndarray | None:
        """The value of an atom that is made of constants alone."""
        if isinstance(atom, core.Literal):
            return np.asarray(atom.val)
        if atom in self.consts:
            value = self.consts[atom]
            is_small = not isinstance(value, Tracer) and np.size(value) <= _MAX_STATIC
            return np.asarray(value) if is_small else None
        eqn = self.source.get(atom)
        if eqn is None or eqn.primitive.name not in _CHEAP or atom.aval.size > _MAX_STATIC:
            return None
        operands = [self._static(x) for x in eqn.invars]
        if any(x is None for x in operands):
            return None
        with jax.ensure_compile_time_eval():
            results = bind(eqn, operands)
        return np.asarray(results[eqn.outvars.index(atom)])

    def _turns(self, eqn: core.JaxprEqn, operands: Sequence[Status]) -> Turns | None:
        """Of a scan over layers, those before the first one that is not known."""
        n, num_carry = scan_sizes(eqn.params)
        m, length = n + num_carry, eqn.params["length"]
        layers = operands[m:]
        counts = [x.count if isinstance(x, Rows) else length * is_known(x) for x in layers]
        count = min(counts, default=0)
        if eqn.params["reverse"] or not count or not all(map(is_known, operands[:m])):
            return None
        if count < length - 1:
            return Turns(count, None)
        layer = [x if is_known(x) else Known.NOT for x in layers]
        statuses = [*operands[:n], *[Known.DEAR] * num_carry, *layer]
        body = eqn.params["jaxpr"]
        last = _plan(body.jaxpr, body.consts, statuses, self.done)
        return Turns(count, last if last.saves else None)

    def plan(self) -> Plan:
        jaxpr = self.jaxpr
        # What each half needs: the first its own results, the second those that are not known.
        first, second = _Needs(), _Needs()
        for atom in jaxpr.outvars:
            status = self.of(atom)
            if status is not Known.NOT:
                first.add([atom])
            if not is_known(status):
                second.add([atom])
        kept: list[core.Var] = []
        stacks: set[int] = set()
        for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
            outs, part = eqn.outvars, self.parts.get(i)
            if part is not None:
                if eqn.effects or first.has_any(outs) or second.has_any(outs):
                    self._take_both(i, eqn, part, first, second, kept)
            elif not eqn.effects and all(is_known(self.status[out]) for out in outs):
                if second.has_any(outs):
                    self._hand_over(i, eqn, first, second, kept)
                if first.has_any(outs):
                    first.take(i, eqn.invars)
            else:
                if eqn.effects or second.has_any(outs):
                    second.take(i, [x for x in eqn.invars if not self._is_static(x)])
                if first.has_any(outs):
                    first.take(i, eqn.invars[:1])
                    if eqn.primitive.name not in _ROWWISE:
                        stacks.add(i)
        return Plan(
            jaxpr=jaxpr,
            first=first.equations[::-1],
            second=second.equations[::-1],
            kept=kept,
            static=self.static,
            parts=self.parts,
            stacks=stacks,
            outs=[self.of(atom) for atom in jaxpr.outvars],
            reads_first=[var in first.variables for var in jaxpr.invars],
            reads_second=[var in second.variables for var in jaxpr.invars],
        )

    def _is_static(self, atom: Any) -> bool:
        return isinstance(atom, core.Var) and atom in self.static

    def _hand_over(self, i, eqn, first, second, kept):
        """A known result that the second half reads: kept, or made again."""
        size = sum(_num_bytes(out) for out in eqn.outvars)
        source = sum(_num_bytes(x) for x in eqn.invars if self.of(x) is Known.DEAR)
        is_dear = Known.DEAR in map(self.of, eqn.outvars)
        if is_dear and not (_is_cheap(eqn) and size > source):
            read = [out for out in eqn.outvars if out in second.variables]
            kept.extend(read)
            first.add(read)
        else:
            second.take(i, eqn.invars)

    def _take_both(self, i, eqn, part, first, second, kept):
        """A call or a scan of which a part is known."""
        if isinstance(part, Turns):
            n, num_carry = scan_sizes(eqn.params)
            of_first = [x for x in eqn.invars if self.of(x) is not Known.NOT]
            of_second = [*eqn.invars[:n], *eqn.invars[n + num_carry :]]
        else:
            of_first, of_second = (
                [x for x, is_read in zip(eqn.invars, reads, strict=True) if is_read]
                for reads in (part.reads_first, part.reads_second)
            )
        known = [out for out in eqn.outvars if is_known(self.status[out])]
        kept.extend(out for out in known if out in second.variables)
        first.take(i, of_first)
        if eqn.effects or second.has_any([out for out in eqn.outvars if out not in known]):
            second.take(i, of_second)


class _Needs:
    """The variables and the equations, last first, that a half needs."""

    def __init__(self):
        self.variables: set[Any] = set()
        self.equations: list[int] = []

    def add(self, atoms: Sequence[Any]) -> None:
        self.variables.update(x for x in atoms if isinstance(x, core.Var))

    def take(self, i: int, operands: Sequence[Any]) -> None:
        self.equations.append(i)
        self.add(operands)

    def has_any(self, variables: Sequence[Any]) -> bool:
        return any(x in self.variables for x in variables)


def _is_cheap(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive in CALLS or eqn.primitive is primitives.custom_jvp_call_p:
        return all(map(_is_cheap, open_jaxpr(body_of(eqn)).eqns))
    return eqn.primitive.name in _CHEAP


def _num_bytes(atom: Any) -> int:
    return getattr(atom.aval, "size", 0) * getattr(atom.aval.dtype, "itemsize", 8)
