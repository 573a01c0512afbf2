"""Meshes of devices, and which axis of which array is split over them.

Three axes: `query`, groups of devices that evaluate different queries and exchange scalars alone; `data`, parts of a batch;
`model`, parts of the parameters and of the optimiser's state. Everything is placed with `jax.sharding`, and XLA finds the
collectives.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ("query", "data", "model")

# (regular expression over paths like blocks/fc/kernel, the axis that is split over `model`): the first one that is found
# decides, and what none finds is replicated. Of an MLP the hidden width is split, of other products the inputs,
# and of embeddings the width, for vocabularies are seldom even.
RULES = ((r"(^|/)fc/(kernel|bias)$", -1), (r"kernel$", -2), (r"embedding$", -1))


class MeshError(ValueError):
    """The devices cannot be arranged as asked; the message says what to change."""


def make_mesh(
    query: int = -1, data: int = 1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of all devices.

    Args:
      query, data, model: sizes of its axes; one of them may be -1, what is left.
      devices: default all, of all processes.

    Raises:
      MeshError: the sizes do not multiply to the number of devices.

    >>> import jax
    >>> make_mesh(devices=jax.devices()[:1]).shape["query"]
    1
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (query, data, model), strict=True))
    text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise MeshError(f"mesh sizes must be at least 1, or -1 for one of them; got {text}")
    product = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = max(1, len(devices) // product)
    if math.prod(sizes.values()) != len(devices):
        raise MeshError(
            f"the mesh sizes must multiply to the {len(devices)} devices; got {text}; set one of them to -1 for what is left"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a run live.

    Attributes:
      mesh: with the axes `query`, `data` and `model`.
      rules: as `RULES`.
    """

    mesh: Mesh
    rules: tuple[tuple[str, int], ...] = RULES

    def axis(self, path: tuple[Any, ...], shape: Sequence[int]) -> int | None:
        """The axis of an array that is split over `model`, counted from the end; None if it is replicated."""
        axis, divides = self._rule(path, shape)
        return axis if divides and self.mesh.shape["model"] > 1 else None

    def sharding(self, path: tuple[Any, ...], shape: Sequence[int]) -> NamedSharding:
        """Of a parameter, or of an array of the optimiser's state that is named like one."""
        return self.split(len(shape), self.axis(path, shape))

    def split(self, ndim: int, axis: int | None, name: str = "model") -> NamedSharding:
        """An array with one of its axes split over an axis of the mesh."""
        names = [None] * ndim
        if axis is not None:
            names[axis] = name
        return NamedSharding(self.mesh, PartitionSpec(*names))

    def shardings(self, tree: Any) -> Any:
        """Of every array of a pytree, or of their shapes."""
        return jax.tree.map_with_path(lambda path, x: self.sharding(path, x.shape), tree)

    def constrain(self, tree: Any) -> Any:
        """The same arrays, which XLA is told to place so."""
        return jax.tree.map_with_path(
            lambda path, x: self.place(x, self.sharding(path, x.shape).spec), tree
        )

    def place(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """The same array, which XLA is told to split so; also where a `shard_map` over `query` has taken that axis."""
        inside = jax.sharding.get_abstract_mesh()
        mesh = self.mesh if inside.empty else inside
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def words_spec(
        self, path: tuple[Any, ...], leaf: Any, words_shape: Sequence[int]
    ) -> PartitionSpec:
        """Of the random words [..., W] of a leaf [..., B] with a row of words for a row of entries."""
        axis, ndim = self.axis(path, leaf.shape), len(words_shape)
        whole = words_shape[-1] * 32 == leaf.shape[-1]
        if axis == -1 and not (whole and words_shape[-1] % self.mesh.shape["model"] == 0):
            axis = None  # a part of a row has no words of its own: all are drawn everywhere, a 32nd of the entries
        return self.split(ndim, axis).spec

    def put_blocks(self, blocks_NT: np.ndarray, indices: np.ndarray) -> jax.Array:
        """blocks_NT[indices] [..., B, T] on the devices, B split over `data`; a process reads the blocks of its devices alone."""
        shape = (*indices.shape, blocks_NT.shape[1])
        return jax.make_array_from_callback(
            shape,
            self.split(len(shape), -2, "data"),
            lambda index: blocks_NT[indices[index[:-1]]],
        )

    def put_everywhere(self, x: Any) -> Any:
        """Arrays that are the same in every process, on all devices."""
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(
                np.shape(x), self.split(np.ndim(x), None), lambda index: np.asarray(x)[index]
            ),
            x,
        )

    def replicated(self, tree: Any) -> Iterable[str]:
        """The paths of arrays that a rule finds, but whose axis does not divide."""
        for path, x in jax.tree.leaves_with_path(tree):
            axis, divides = self._rule(path, x.shape)
            if axis is not None and not divides:
                yield f"{_name(path)} {list(x.shape)}"

    def _rule(self, path: tuple[Any, ...], shape: Sequence[int]) -> tuple[int | None, bool]:
        for pattern, axis in self.rules:
            if len(shape) >= -axis and re.search(pattern, _name(path)):
                return axis, shape[axis] % self.mesh.shape["model"] == 0
        return None, False


def _name(path: tuple[Any, ...]) -> str:
    names = (str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", "")))) for p in path)
    return "/".join(names)
