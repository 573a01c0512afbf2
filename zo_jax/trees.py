"""Pytrees of parameters: which leaves count, what they are called, and a part of them as a tree of
its own.
"""

from collections.abc import Callable
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# All of a leaf.
ALL = ...


class Subset(NamedTuple):
    """A part of parameters: whole leaves, or layers of a stack.

    Attributes:
      indices: for each leaf the indices of its chosen layers, or ALL of it, or None for none of it;
        None for all leaves.
    """

    indices: tuple[Any, ...] | None

    def select(self, params: Any) -> Any:
        """The part: `params` with None for a leaf outside; of a stack in part the chosen layers [k,
        ...].
        """
        if self.indices is None:
            return params
        leaves, treedef = jax.tree.flatten(params)
        pick = lambda leaf, i: leaf if i is ALL else None if i is None else leaf[i]
        picked = [pick(leaf, i) for leaf, i in zip(leaves, self.indices, strict=True)]
        return jax.tree.unflatten(treedef, picked)

    def merge(self, params: Any, part: Any) -> Any:
        """`params` with the part in its place."""
        if self.indices is None:
            return part
        leaves, treedef = jax.tree.flatten(params)
        new = treedef.flatten_up_to(part)
        put = lambda leaf, x, i: x if i is ALL else leaf if i is None else leaf.at[i].set(x)
        merged = [put(*x) for x in zip(leaves, new, self.indices, strict=True)]
        return jax.tree.unflatten(treedef, merged)

    def floating(self, params: Any) -> "Subset":
        """Less the leaves that are not floating."""
        leaves = jax.tree.leaves(params)
        if all(map(is_floating, leaves)):
            return self
        indices = (ALL,) * len(leaves) if self.indices is None else self.indices
        pairs = zip(leaves, indices, strict=True)
        return Subset(tuple(i if is_floating(leaf) else None for leaf, i in pairs))

    def rest(self, params: Any) -> "Subset":
        """What is outside: the other leaves, and the other layers of stacks."""
        leaves = jax.tree.leaves(params)
        indices = (ALL,) * len(leaves) if self.indices is None else self.indices
        others = lambda leaf, i: (
            ALL if i is None else None if i is ALL else np.setdiff1d(np.arange(len(leaf)), i)
        )
        return Subset(tuple(others(*pair) for pair in zip(leaves, indices, strict=True)))

    def within(self, outer: "Subset") -> "Subset":
        """What this and another have in common, as a subset of what the other selects."""
        if outer.indices is None:
            return self
        own = (ALL,) * len(outer.indices) if self.indices is None else self.indices
        pairs = zip(own, outer.indices, strict=True)
        return Subset(tuple(_places(i, there) for i, there in pairs if there is not None))


WHOLE = Subset(None)


def _places(rows: Any, among: Any) -> Any:
    """Where the chosen layers are among others that are chosen, as `Subset` has it."""
    if among is ALL or rows is ALL or rows is None:
        return rows
    places = np.flatnonzero(np.isin(among, rows))
    return None if not places.size else ALL if places.size == len(among) else places


def loss_of(part: Subset, loss_fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """(part, *batch) -> loss_fn of `params` with the part in its place, as a pytree if the loss is
    one.
    """
    if isinstance(loss_fn, jax.tree_util.Partial):
        merged = lambda loss_fn, params, own, *batch: loss_fn(part.merge(params, own), *batch)
        return jax.tree_util.Partial(merged, loss_fn, params)
    merged = lambda params, own, *batch: loss_fn(part.merge(params, own), *batch)
    return jax.tree_util.Partial(merged, params)


# A regular expression, searched for in the paths of leaves; or (path, leaf) -> whether all of it is
# meant, or the indices of those of its layers that are.
Rule = str | Callable[[str, Any], Any]


def subset_by(rule: Rule, params: Any, name: str) -> Subset:
    """The floating leaves, or layers of stacks, that a rule finds.

    Args:
      rule: see `Rule`.
      params: pytree of arrays or their shapes.
      name: of the option, for messages.

    Raises:
      ValueError: it finds nothing, is no regular expression, or names layers that are not there.

    >>> import jax.numpy as jnp
    >>> params = {"blocks": jnp.ones((3, 2, 2)), "head": jnp.ones((2, 4))}
    >>> subset_by("^head$", params, "exact").indices
    (None, Ellipsis)
    >>> last_two = lambda path, leaf: [1, 2] if path == "blocks" else False
    >>> subset_by(last_two, params, "exact").select(params)["blocks"].shape
    (2, 2, 2)
    """
    if isinstance(rule, str):
        try:
            pattern = re.compile(rule)
        except re.error as error:
            raise ValueError(
                f"{name} must be a regular expression over paths, or a function of (path, leaf); "
                f"{rule!r} is none: {error}"
            ) from error
        rule = lambda path, leaf: pattern.search(path) is not None
    flat = [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    indices = tuple(
        _found(rule(path, leaf), path, leaf, name) if is_floating(leaf) else None
        for path, leaf in flat
    )
    if all(i is None for i in indices):
        known = ", ".join(path for path, leaf in flat if is_floating(leaf))
        raise ValueError(f"{name} must find a floating leaf of params; their paths are {known}")
    return Subset(indices)


def _found(answer: Any, path: str, leaf: Any, name: str) -> Any:
    """What a rule says of a leaf, as `Subset` has it."""
    if isinstance(answer, bool | np.bool_) or answer is None:
        return ALL if answer else None
    rows, length = np.unique(np.asarray(answer)), leaf.shape[0] if leaf.ndim else 0
    if rows.size and (rows.dtype.kind not in "iu" or rows[0] < 0 or rows[-1] >= length):
        raise ValueError(
            f"{name} must return True, False or indices of layers from 0 to {length - 1} for "
            f"{path}, got {answer!r:.80}"
        )
    return None if not rows.size else ALL if rows.size == length else rows


def path_name(path: tuple[Any, ...]) -> str:
    """The names of a leaf's path joined by slashes, like "blocks/fc/kernel"; of indices their
    numbers.
    """
    return "/".join(_names(path))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", "")))) for p in path)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf has a real floating dtype."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def as_arrays(params: Any) -> Any:
    """Parameters with numbers and NumPy arrays as JAX arrays.

    Raises:
      ValueError: a leaf is no array, or is complex, or none is floating.
    """
    flat, treedef = jax.tree.flatten_with_path(params)
    for path, leaf in flat:
        where = path_name(path) or "params"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise ValueError(
                f"params must hold arrays alone, got {type(leaf).__name__} at {where}; split off "
                f"what is none, as by "
                "eqx.partition(model, eqx.is_inexact_array) or nnx.split(model, nnx.Param, ...)"
            )
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"params must be real, got {jnp.result_type(leaf)} at {where}; hand in its real "
                f"and imaginary parts, "
                "and put them together in loss_fn"
            )
    if not any(is_floating(leaf) for _, leaf in flat):
        raise ValueError(f"params must have a floating leaf to perturb, got {len(flat)} leaves")
    return jax.tree.unflatten(treedef, [jnp.asarray(leaf) for _, leaf in flat])


def matrices(params: Any) -> Any:
    """Which leaves are matrices [A, B] or stacks of them [..., A, B], by shape: a pytree of bools.

    A leaf [L, B] is a stack of vectors if it stands in a subtree in which every leaf is a stack of
    L and some leaf has three axes or more: then the subtree is a stack of layers, as a scan over
    them or a vmapped constructor makes it.

    Args:
      params: pytree of arrays or their shapes.

    >>> import jax.numpy as jnp
    >>> fc = {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5))}
    >>> blocks = {"fc": fc, "norm": jnp.ones((3, 4))}
    >>> matrices({"blocks": blocks, "head": jnp.ones((4, 7))})
    {'blocks': {'fc': {'bias': False, 'kernel': True}, 'norm': False}, 'head': True}
    """
    flat, treedef = jax.tree.flatten_with_path(params)
    stacked = stacked_leaves(params)
    is_matrix = [
        leaf.ndim >= 3 or (leaf.ndim == 2 and not x)
        for (_, leaf), x in zip(flat, stacked, strict=True)
    ]
    return jax.tree.unflatten(treedef, is_matrix)


def stacked_leaves(params: Any) -> list[bool]:
    """For each leaf whether it is a stack of layers, by the rule of `matrices`."""
    flat = jax.tree.leaves_with_path(params)
    subtrees: dict[tuple[str, ...], list[Any]] = {}
    for path, leaf in flat:
        names = _names(path)
        for depth in range(len(names)):
            subtrees.setdefault(names[:depth], []).append(leaf)

    def is_stack(leaves: list[Any]) -> bool:
        sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
        return len(sizes) == 1 and any(leaf.ndim >= 3 for leaf in leaves)

    stacks = {prefix for prefix, leaves in subtrees.items() if is_stack(leaves)}

    def is_stacked(path: tuple[Any, ...]) -> bool:
        names = _names(path)
        return any(names[:depth] in stacks for depth in range(len(names)))

    return [is_stacked(path) for path, _ in flat]


def tree_dot(a: Any, b: Any) -> jax.Array:
    """⟨a, b⟩ over all leaves, float32."""
    products = jax.tree.map(lambda x, y: _sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return sum(jax.tree.leaves(products), jnp.zeros(()))


def _sum(x: jax.Array) -> jax.Array:
    """A sum by rows: of 10⁸ float32 numbers one after the other the last would be lost."""
    return jnp.sum(jnp.sum(x, axis=-1)) if x.ndim else x
