"""Groups of the parameters, and families whose directions have a size of their own in each."""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from zo_jax import families
from zo_jax.family import Family
from zo_jax.layout import Layout
from zo_jax.rules import is_perturbed
from zo_jax.tiers import Tiers
from zo_jax.trees import ALL, Subset, is_floating, path_name, stacked_leaves

# "layers", "leaves", or (path, leaf) -> a name, or the names of the layers of a stack.
Groups = str | Callable[[str, Any], Any]

_TWO_GROUPS = "groups must not name a group {name!r}, as one of the tiers of counts is called"


class OfGroups(Family):
    """Directions that are those of another family, `base`, in each group, times a factor."""

    base: Family

    def summands(
        self, params: Any, keys: jax.Array, weights: jax.Array
    ) -> Iterable[tuple[Subset, jax.Array, jax.Array]]:
        """Each group with the keys and the weights of its own directions in a sum."""
        raise NotImplementedError

    def moves(self, params: Any) -> list[bool]:
        return [is_floating(leaf) for leaf in jax.tree.leaves(params)]

    def add(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        for part, *own in self.summands(params, keys, jnp.asarray(weights, jnp.float32)):
            params = part.merge(params, self.base.add(part.select(params), *own))
        return params

    def combine_with_norm(
        self, params: Any, keys: jax.Array, weights: jax.Array
    ) -> tuple[Any, jax.Array]:
        total, squared = jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32)
        for part, *own in self.summands(params, keys, jnp.asarray(weights, jnp.float32)):
            new, norm = self.base.combine_with_norm(part.select(total), *own)
            total, squared = part.merge(total, new), squared + norm**2
        return total, jnp.sqrt(squared)

    def on(self, layout: Layout | None) -> Self:
        return dataclasses.replace(self, base=self.base.on(layout))  # pyright: ignore


def base_of(perturbation: Family | str) -> Family:
    """The family of directions inside a group.

    Raises:
      ValueError: it is one of groups itself.
    """
    base = perturbation if isinstance(perturbation, Family) else families.by_name(perturbation)
    if isinstance(base, OfGroups):
        raise ValueError("perturbation must be a family inside a group, got one of groups itself")
    return base


def check_groups(groups: Any) -> None:
    """
    Raises:
      ValueError: it is nothing that `find_groups` makes groups by.
    """
    if not (groups in ("layers", "leaves") or callable(groups)):
        raise ValueError(
            f"groups must be layers, leaves, or a function of (path, leaf); got {groups!r:.80}"
        )


def find_groups(groups: Groups, params: Any, tiers: Tiers = ()) -> list[tuple[str, Subset]]:
    """(name, leaves and layers or rows) of each group, in order of their first leaves.

    >>> import jax.numpy as jnp
    >>> params = {"blocks": {"w": jnp.zeros((2, 3, 3))}, "head": jnp.zeros((3, 4))}
    >>> [name for name, _ in find_groups("layers", params)]
    ['blocks/0', 'blocks/1', 'head']
    """
    flat = jax.tree.leaves_with_path(params)
    rows: dict[str, list[Any]] = {}
    tier_of = {path: np.frombuffer(own, np.uint8) for path, own in tiers}
    of_tiers: set[str] = set()
    for i, ((path, leaf), is_stack) in enumerate(zip(flat, stacked_leaves(params), strict=True)):
        if not is_floating(leaf):
            continue
        tier = tier_of.pop(path_name(path), None)
        if tier is not None:
            if leaf.ndim == 0 or len(tier) != leaf.shape[0]:
                raise ValueError(
                    f"counts must have a number for each row of {path_name(path)} "
                    f"{list(leaf.shape)}, got {len(tier)}"
                )
            for t in range(tier.max() + 1):
                name = f"{path_name(path)}/{t}"
                if name in rows:
                    raise ValueError(_TWO_GROUPS.format(name=name))
                of_tiers.add(name)
                rows[name] = [None] * len(flat)
                rows[name][i] = np.flatnonzero(tier == t) if tier.any() else ALL
            continue
        names = _names_of(groups, path_name(path), leaf, is_stack)
        for name in [names] if isinstance(names, str) else dict.fromkeys(names):
            if name in of_tiers:
                raise ValueError(_TWO_GROUPS.format(name=name))
            own = ALL
            if not isinstance(names, str):
                own = np.flatnonzero([other == name for other in names])
                own = ALL if len(own) == len(names) else own
            rows.setdefault(name, [None] * len(flat))[i] = own
    if tier_of:
        raise ValueError(
            f"counts must name leaves that have directions, got {min(tier_of)!r}; they are "
            f"{', '.join(path_name(p) for p, x in flat if is_floating(x)):.200}"
        )
    return [(name, Subset(tuple(own))) for name, own in rows.items()]


def sizes_of(found: list[tuple[str, Subset]], params: Any) -> np.ndarray:
    """The number of parameters of each group, float32 [G]."""
    own = [jax.eval_shape(part.select, params) for _, part in found]
    return np.array([sum(x.size for x in jax.tree.leaves(tree)) for tree in own], np.float32)


def _names_of(groups: Groups, path: str, leaf: Any, is_stack: bool) -> str | list[str]:
    """The group of a leaf, or those of its layers."""
    if callable(groups):
        names = groups(path, leaf)
        if isinstance(names, str):
            return names
        names = list(map(str, names))
        if not leaf.ndim or len(names) != leaf.shape[0]:
            raise ValueError(
                f"groups must return a name for {path}, or one for each of its layers; got "
                f"{len(names)} for the shape {leaf.shape}"
            )
        return names
    if groups == "leaves":
        return path
    top, *rest = path.split("/")
    if is_stack:
        return [f"{top}/{i}" for i in range(leaf.shape[0])]
    return f"{top}/{rest[0]}" if rest and rest[0].isdigit() else top


def put_moved(leaves: list[Any], part: Subset, moved: Any) -> None:
    """Puts a part that was moved in its place. Rows of a leaf are formed, a whole leaf need not."""
    assert part.indices is not None
    new = iter(jax.tree.leaves(moved, is_leaf=is_perturbed))
    for i, rows in enumerate(part.indices):
        if rows is ALL:
            leaves[i] = next(new)
        elif rows is not None:
            x = next(new)
            leaves[i] = leaves[i].at[rows].set(x.form() if is_perturbed(x) else x)
