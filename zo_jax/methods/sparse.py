"""Sparse MeZO: directions in the small entries of the parameters alone.

Liu et al., "Sparse MeZO: less parameters for better performance in zeroth-order LLM fine-tuning",
arXiv 2402.15751. With a threshold h of each layer, found once, and z of normal numbers,

    ẑ = [|θ| ≤ h] ∘ z,     g = c ẑ,

the mask being that of the parameters as they are in the step. h is the quantile of |θ| below which
a given share of the entries is; of a stack of matrices each has its own. A leaf whose entries begin
alike, as zeros, has all of them in the mask (not in the paper). Passes a step: 2 q. Memory beside
the parameters: h, a number a layer; the mask is made where it is used.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp

from zo_jax.estimators import Estimator
from zo_jax.family import Family
from zo_jax.methods.method import Method, require_share
from zo_jax.methods.shaped import Wrapped
from zo_jax.perturbed import Dense
from zo_jax.rules import is_perturbed, register_rule
from zo_jax.trees import is_floating


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedArray(Dense):
    """base + scale · [|base| ≤ below] ∘ z.

    Attributes:
      below: float32 [..., 1], the threshold of each row.
    """

    below: jax.Array

    def noise(self):
        return jnp.where(jnp.abs(self.base) <= self.below, super().noise(), 0)

    def on_rows(self, function):
        parts = {name: function(getattr(self, name)) for name in ("base", "words", "below")}
        return dataclasses.replace(self, **parts)

    def layers(self):
        if self.ndim < 2:
            return None
        rebuild = lambda parts: dataclasses.replace(
            self, base=parts[0], words=parts[1], below=parts[2]
        )
        return (self.base, self.words, self.below), rebuild


def _formed(primitive: core.Primitive, *operands: Any, **params: Any) -> Any:
    # Scaled entries would be compared with a threshold that is not.
    return primitive.bind(*(x.form() if is_perturbed(x) else x for x in operands), **params)


for _primitive in (lax.mul_p, lax.div_p):
    register_rule(_primitive, MaskedArray)(functools.partial(_formed, _primitive))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SmallEntries(Wrapped):
    """Directions in the entries that are at most as large as a threshold.

    Attributes:
      base: the family of z.
      below: for each leaf the thresholds, a float32 array that broadcasts to it; or None.
      params: the leaves, of which the mask is made where directions are summed.
    """

    base: Family
    below: Any
    params: Any

    def perturbed(self, i, z, scale):
        below = jnp.broadcast_to(self.below[i], (*z.shape[:-1], 1))
        return MaskedArray(z.base, z.words, scale * z.scale, z.kind, z.dtype, below)

    def total(self, i, leaf, z, weight):
        return jnp.where(jnp.abs(self.params[i]) <= self.below[i], z, 0)


@dataclasses.dataclass(frozen=True)
class SparseMezo(Method):
    """Sparse MeZO.

    Attributes:
      share: of the entries of a layer that are trained, the smallest ones.

    Raises:
      ValueError: the share is not in [0, 1].

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.SparseMezo(share=0.5).transformation(jax.random.key(0))
    >>> params = jnp.array([1.0, -2.0, 3.0, -4.0])
    >>> updates, _ = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> (updates != 0).tolist()
    [True, True, False, False]
    """

    estimator: Estimator = Estimator(num_queries=1, perturbation="gaussian")
    share: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        require_share("share", self.share)

    def init(self, params: Any) -> Any:
        """h, for each leaf; None where it is not floating."""

        def threshold(x):
            if not is_floating(x):
                return None
            size = jnp.abs(x.astype(jnp.float32))
            layer = tuple(range(-min(x.ndim, 2), 0))
            below = jnp.quantile(size, self.share, axis=layer, keepdims=True) if layer else size
            # None of a fresh bias or adapter is small: what moved first would be outside for good.
            is_alike = jnp.min(size) == jnp.max(size)
            return jnp.where(is_alike, jnp.inf, below)

        return [threshold(x) for x in jax.tree.leaves(params)]

    def family(self, params, memory, step):
        return SmallEntries(self.estimator.family, memory, jax.tree.leaves(params))
