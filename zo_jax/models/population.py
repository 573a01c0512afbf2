"""Many perturbed models at once: one copy of the weights for all of them, and two thin factors a
member.

x (W + s u vᵀ)ᵀ = x Wᵀ + s (x v) uᵀ: the product with W is one for the whole population, as in
Sarkar et al., "Evolution strategies at the hyperscale", 2025 (EGGROLL). Rows of a batch are the
members' one after the other, each with its own prompts.

Axes: M members, P prompts of each, L layers, r rank, C width.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo_jax.family import Family
from zo_jax.models.generate import Generated, Prompt, generate
from zo_jax.models.model import Model
from zo_jax.models.weights import Weight, is_weight, product, rows
from zo_jax.perturbed import LowRank, Perturbed
from zo_jax.trees import ALL, WHOLE, Subset, is_floating, path_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Members(Weight):
    """A weight of which every member has its own low-rank change.

    Attributes:
      weight: [..., out, in], of all.
      u: float32 [..., M, out, r].
      v: float32 [..., M, in, r].
      scale: float32 [..., M].
    """

    weight: Any
    u: jax.Array
    v: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def product(self, x: jax.Array, out_dtype: Any) -> jax.Array:
        y = product(x, self.weight, out_dtype)
        x_MNI = x.reshape(len(self.u), -1, x.shape[-1]).astype(jnp.float32)
        inner_MNR = jnp.einsum("mni,mir->mnr", x_MNI, self.v) * self.scale[:, None, None]
        return y + self._outer(inner_MNR).reshape(y.shape).astype(y.dtype)

    def rows(self, indices: jax.Array) -> jax.Array:
        found = rows(self.weight, indices, jnp.float32)
        of_member = indices.reshape(len(self.u), -1, 1)
        u_MNR = jnp.take_along_axis(self.u, of_member, axis=1) * self.scale[:, None, None]
        change = jnp.einsum("mnr,mir->mni", u_MNR, self.v)
        return found + change.reshape(found.shape)

    def _outer(self, inner_MNR: jax.Array) -> jax.Array:
        if inner_MNR.shape[-1] == 1:  # fused with the sum that it goes into
            return inner_MNR * self.u[:, None, :, 0]
        return jnp.einsum("mnr,mor->mno", inner_MNR, self.u)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Separate(Weight):
    """A small array, a vector or a matrix that no low rank is worth it for, once for every member.

    Attributes:
      values: [..., M, C] or [..., M, out, in].
    """

    values: jax.Array

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def product(self, x: jax.Array, out_dtype: Any) -> jax.Array:
        x_MNI = x.reshape(len(self.values), -1, x.shape[-1])
        y_MNO = jnp.einsum(
            "mni,moi->mno", x_MNI, self.values.astype(x.dtype), preferred_element_type=out_dtype
        )
        return y_MNO.reshape(*x.shape[:-1], -1)

    def rows(self, indices: jax.Array) -> jax.Array:
        of_member = indices.reshape(len(self.values), -1, 1)
        found = jnp.take_along_axis(self.values, of_member, axis=1)
        return found.reshape(*indices.shape, -1)

    def along_last(self, like: jax.Array) -> jax.Array:
        of_row = jnp.repeat(self.values, like.shape[0] // len(self.values), axis=0)
        return of_row.astype(like.dtype).reshape(len(of_row), *(1,) * (like.ndim - 2), -1)


def populate(
    params: Any, family: Family, keys: jax.Array, scales: jax.Array, subset: Subset = WHOLE
) -> Any:
    """The parameters of many members, for the functions of a model: member i is `params` moved
    along the direction of key i by scale i.

    What a member has for itself is small if the family is of low rank; of other families it is a
    copy of everything.

    Args:
      params: of a model, or a part of them; leaves that are quantised or not floating stay.
      family: of directions.
      keys: [M] typed PRNG keys.
      scales: float32 [M].
      subset: the part of the parameters that members are moved in.
    """
    if subset is not WHOLE:
        part = subset.floating(params)
        return _in_place(params, populate(part.select(params), family, keys, scales), part)
    moves = lambda x: not is_weight(x) and is_floating(x)
    moved = jax.tree.map(lambda x: x if moves(x) else None, params, is_leaf=is_weight)

    def changes_of(key: jax.Array, scale: jax.Array) -> Any:
        perturbed = family.perturb(moved, key, scale)
        return jax.tree.map(_change, perturbed, is_leaf=lambda x: isinstance(x, Perturbed))

    changes = jax.vmap(changes_of)(keys, scales)
    flat, treedef = jax.tree.flatten_with_path(params, is_leaf=is_weight)
    pairs = zip(flat, treedef.flatten_up_to(changes), strict=True)
    return treedef.unflatten(
        [x if change is None else _together(path, x, change) for (path, x), change in pairs]
    )


def _in_place(params: Any, populated: Any, subset: Subset) -> Any:
    """The parameters with those of members in the place of a part of them."""
    leaves, treedef = jax.tree.flatten(params)
    indices = (ALL,) * len(leaves) if subset.indices is None else subset.indices
    new = treedef.flatten_up_to(populated)
    put = lambda leaf, x, i: x if i is ALL else leaf if i is None else _some_layers(leaf, x, i)
    return treedef.unflatten([put(*one) for one in zip(leaves, new, indices, strict=True)])


def _some_layers(leaf: jax.Array, x: "Members | Separate", layers: Any) -> Weight:
    """Members of some layers of a stack, in a stack of all: the others are moved by nothing."""
    L = len(leaf)
    if isinstance(x, Separate):
        alike = jnp.broadcast_to(leaf[:, None], (L, x.values.shape[1], *leaf.shape[1:]))
        return Separate(alike.at[layers].set(x.values.astype(leaf.dtype)))
    spread = lambda part: jnp.zeros((L, *part.shape[1:]), part.dtype).at[layers].set(part)
    return Members(leaf, spread(x.u), spread(x.v), spread(x.scale))


def _change(moved: Any) -> Any:
    """(u, v, scale) of a low-rank direction; a formed array of any other."""
    if isinstance(moved, LowRank):
        return moved.u, moved.v, moved.scale
    return moved.form() if isinstance(moved, Perturbed) else moved


def _together(path: tuple[Any, ...], x: jax.Array, change: Any) -> Weight:
    """A leaf with the changes [M, ...] of all members, behind the axis of the layers if it has
    one.
    """
    is_stacked = re.search(r"(^|/)(layers|h)/", path_name(path)) is not None
    behind = lambda part: jnp.moveaxis(part, 0, 1 if is_stacked else 0)
    if not isinstance(change, tuple):
        return Separate(behind(change))
    u, v, scale = change
    scale = jnp.broadcast_to(scale, (*x.shape[: 1 if is_stacked else 0], len(scale)))
    return Members(x, behind(u), behind(v), scale)


def generate_all(
    model: Model,
    params: Any,
    prompts: Sequence[Prompt],
    family: Family,
    keys: jax.Array,
    scales: jax.Array,
    **options: Any,
) -> list[Generated]:
    """What every member of a population writes to the same prompts, all at once.

    Prompt i draws from the same stream of random numbers in every member. A member's texts are, up
    to rounding, those of the perturbed model alone.

    Args:
      model: with a tokenizer, unless all prompts are token ids.
      params: like `model.params`.
      prompts: as of `generate`.
      family, keys, scales: as of `populate`.
      **options: of `generate`.

    Returns:
      For each member what it wrote; the tokens a second are those of all together.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> from zo_jax import models
    >>> m = models.create(dict(model_type="gpt2", vocab_size=11, n_embd=8, n_head=2, n_layer=2), jax.random.key(0))
    >>> keys = jax.random.split(jax.random.key(1), 3)
    >>> members = generate_all(
    ...     m, m.params, [[1, 2]], zo_jax.low_rank(), keys, jnp.full(3, 0.1), max_tokens=4)
    >>> [member.tokens[0].shape for member in members]
    [(4,), (4,), (4,)]
    """  # noqa: E501
    M, P = len(keys), len(prompts)
    members = jax.jit(populate, static_argnums=1)(params, family, keys, scales)
    streams = np.tile(np.arange(P), M)
    out = generate(model, members, list(prompts) * M, streams=streams, **options)
    return [
        Generated(out.texts[i : i + P], out.tokens[i : i + P], out.tokens_per_second)
        for i in range(0, M * P, P)
    ]
