"""Directions of all parameters with a scale for each group: the least variance of `zo_jax.grouped`
by queries that move everything.

A query looks along S z and weighs S⁻¹ z with what it finds, S a scale s_g for each group g: the
estimate is unbiased, for E[S z zᵀ S⁻¹] = I. With d_g parameters and a gradient of norm n_g its
variance is (Σ s_g² n_g²) (Σ d_g / s_g²), least for s_g² ∝ √d_g / n_g, and then (Σ √d_g n_g)², where
directions of all parameters alike have Σ d_g Σ n_g².
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from zo_jax.family import Family
from zo_jax.groups import Groups, OfGroups, base_of, check_groups, find_groups, put_moved, sizes_of
from zo_jax.tiers import Tiers, sort_into_tiers
from zo_jax.trees import Subset


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(OfGroups):
    """See `scaled`.

    Attributes:
      base: the family of the directions of a group.
      norms: (name, norm) of the groups.
      groups, tiers: as in `zo_jax.grouped`.
    """

    has_dual: ClassVar[bool] = True

    base: Family
    norms: tuple[tuple[str, float], ...] = dataclasses.field(metadata={"static": True})
    groups: Groups = dataclasses.field(metadata={"static": True})
    tiers: Tiers = dataclasses.field(metadata={"static": True})

    def scales(self, params: Any) -> dict[str, float]:
        """s_g by the name of the group; Σ d_g s_g² = d, so that directions are as long as ever."""
        found, norms = find_groups(self.groups, params, self.tiers), dict(self.norms)
        names = [name for name, _ in found]
        if norms.keys() != set(names):
            raise ValueError(
                f"norms must have one for each group, {', '.join(names):.200}; got "
                f"{', '.join(norms):.200}"
            )
        sizes = sizes_of(found, params)
        squares = np.sqrt(sizes) / np.array([norms[name] for name in names])
        scales = np.sqrt(squares * sizes.sum() / (sizes @ squares))
        return dict(zip(names, map(float, scales), strict=True))

    def draw(self, params: Any, key: jax.Array) -> Any:
        return [
            self.base.draw(part.select(params), jax.random.fold_in(key, i))
            for i, (part, _) in enumerate(self._parts(params))
        ]

    def move(self, params: Any, direction: Any, scale: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        for (part, own), drawn in zip(self._parts(params), direction, strict=True):
            put_moved(leaves, part, self.base.move(part.select(params), drawn, scale * own))
        return jax.tree.unflatten(treedef, leaves)

    def _parts(self, params: Any) -> list[tuple[Subset, float]]:
        """Each group with its scale."""
        found, scales = find_groups(self.groups, params, self.tiers), self.scales(params)
        return [(part, scales[name]) for name, part in found]

    def summands(
        self, params: Any, keys: jax.Array, weights: jax.Array
    ) -> Iterator[tuple[Subset, jax.Array, jax.Array]]:
        for i, (part, scale) in enumerate(self._parts(params)):
            own = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys)
            yield part, own, weights / scale


def scaled(
    norms: Mapping[str, float],
    groups: Groups = "leaves",
    perturbation: Family | str = "rademacher",
    *,
    counts: Mapping[str, Any] | None = None,
) -> Scaled:
    """Directions of all parameters, those of a group g with a scale s_g² ∝ √d_g / n_g, d_g its
    number of parameters and n_g the norm of its gradient.

    The estimate is unbiased whatever the norms are, and of least variance if they are right: that
    of `zo_jax.grouped` with the same groups, whose queries move one group each. This one is for few
    queries a step, each of which then tells of all parameters. It learns nothing: a projection is
    a sum over the groups, which does not tell their norms. They come from a gradient, or from what
    a run with `grouped` learned (`Grouped.gradient_norms`).

    Args:
      norms: of the gradient in each group, by the group's name; only their ratios count.
      groups: as in `grouped`. Where a group has layers of a stack or rows of a table, and not all,
        the whole leaf is formed for an evaluation.
      perturbation: the family of directions inside a group, or its name.
      counts: as in `grouped`.

    Raises:
      ValueError: a norm is not finite and above 0, or `groups` or `counts` is as `grouped` refuses
        it; or, from any use, `norms` has not one for each group.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> params = {"table": jnp.zeros((50, 4)), "bias": jnp.zeros(4)}
    >>> loss_fn = lambda p: jnp.sum(p["bias"]) + 1e-3 * jnp.sum(p["table"])
    >>> norms = {"table": 1e-3 * 200**0.5, "bias": 2.0}
    >>> family = zo_jax.scaled(norms)
    >>> {name: round(scale, 2) for name, scale in family.scales(params).items()}
    {'bias': 0.03, 'table': 1.01}
    >>> est = zo_jax.estimate_gradient(
    ...     loss_fn, params, jax.random.key(0), num_queries=64, perturbation=family)
    >>> bool(jnp.allclose(est.gradient["bias"], 1.0, atol=0.5))
    True
    """
    base = base_of(perturbation)
    check_groups(groups)
    if bad := [name for name, norm in norms.items() if not 0 < norm < float("inf")]:
        raise ValueError(
            f"norms must be finite and above 0, got {norms[bad[0]]!r} of {bad[0]}; give a group "
            "without a gradient a small one"
        )
    pairs = tuple(sorted((name, float(norm)) for name, norm in norms.items()))
    return Scaled(base, pairs, groups, sort_into_tiers(counts or {}))
