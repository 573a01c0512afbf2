"""Where the arrays of a run live: which axis of which array is split over the devices of a mesh.

Three axes: `query`, groups of devices that evaluate different queries and exchange scalars alone;
`data`, parts of a batch; `model`, parts of the parameters and of the optimiser's state. Everything
is placed with `jax.sharding`, and XLA finds the collectives.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from zo_jax.trees import path_name


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a run live.

    Attributes:
      mesh: with the axes `query`, `data` and `model`.
      rules: (regular expression over paths like blocks/fc/kernel, the axis that is split over
        `model`): the first one that is found decides, and what none finds is replicated.
    """

    mesh: Mesh
    rules: tuple[tuple[str, int], ...] = ()

    def axis(self, path: tuple[Any, ...], shape: Sequence[int]) -> int | None:
        """The axis of an array that is split over `model`, counted from the end; None if it is
        replicated.
        """
        axis, divides = self._rule(path, shape)
        return axis if divides and self.mesh.shape["model"] > 1 else None

    def sharding(self, path: tuple[Any, ...], shape: Sequence[int]) -> NamedSharding:
        """Of a parameter, or of an array of the optimiser's state that is named like one."""
        return self.split(len(shape), self.axis(path, shape))

    def split(self, ndim: int, axis: int | None, name: str = "model") -> NamedSharding:
        """An array with one of its axes split over an axis of the mesh."""
        names: list[str | None] = [None] * ndim
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
        """The same array, which XLA is told to split so; also where a `shard_map` over `query` has
        taken that axis.
        """
        inside = jax.sharding.get_abstract_mesh()
        mesh = self.mesh if inside.empty else inside
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def everywhere(self, x: jax.Array) -> jax.Array:
        """The same array, which XLA is told to keep whole on every device."""
        return self.place(x, PartitionSpec())

    def words_spec(
        self, path: tuple[Any, ...], leaf: Any, words_shape: Sequence[int]
    ) -> PartitionSpec:
        """Of the random words [..., W] of a leaf [..., B] with a row of words for a row of
        entries.
        """
        axis, ndim = self.axis(path, leaf.shape), len(words_shape)
        whole = words_shape[-1] * 32 == leaf.shape[-1]
        if axis == -1 and not (whole and words_shape[-1] % self.mesh.shape["model"] == 0):
            axis = None  # a part of a row has no words of its own: all are drawn everywhere, a 32nd of the entries  # noqa: E501
        return self.split(ndim, axis).spec

    def put_blocks(self, blocks_NT: np.ndarray, indices: np.ndarray) -> jax.Array:
        """blocks_NT[indices] [..., B, T] on the devices, B split over `data`; a process reads the
        blocks of its devices alone.
        """
        shape = (*indices.shape, blocks_NT.shape[1])
        return jax.make_array_from_callback(
            shape,
            self.split(len(shape), -2, "data"),
            lambda index: blocks_NT[indices[(index or ())[:-1]]],
        )

    def put_batch(self, batch: Any, axis: int) -> Any:
        """A pytree of NumPy arrays, the same in every process, on the devices, an axis split over
        `data`.
        """
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(
                x.shape, self.split(x.ndim, axis, "data"), lambda index: x[index]
            ),
            batch,
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
                yield f"{path_name(path)} {list(x.shape)}"

    def _rule(self, path: tuple[Any, ...], shape: Sequence[int]) -> tuple[int | None, bool]:
        for pattern, axis in self.rules:
            if len(shape) >= -axis and re.search(pattern, path_name(path)):
                return axis, shape[axis] % self.mesh.shape["model"] == 0
        return None, False
