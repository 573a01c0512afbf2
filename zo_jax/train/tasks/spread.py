"""The members of a population over devices and processes: each device writes for some of them, each
process scores what its own devices write, and nothing but scores is exchanged.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from zo_jax.layout import Layout
from zo_jax.train import processes
from zo_jax.train.settings import ConfigError


class Spread:
    """Where the members of a population are.

    Attributes:
      own: indices of those that this process writes for, in the order of its devices.
    """

    def __init__(self, population: int, layout: Layout | None = None):
        """Over the axis `query` of a layout; None for one device."""
        self.own, self._mesh = np.arange(population), None
        if layout is None:
            return
        devices = layout.mesh.devices[:, 0, 0]
        of_device = np.arange(population).reshape(len(devices), -1)
        is_here = [device.process_index == jax.process_index() for device in devices]
        self.own = of_device[is_here].reshape(-1)
        self._mesh = Mesh(devices[is_here], ("query",))

    def here(self, tree: Any) -> Any:
        """Arrays that all devices hold, as arrays of this process alone."""
        if self._mesh is None:
            return tree
        everywhere = NamedSharding(self._mesh, PartitionSpec())

        def one(x: jax.Array) -> jax.Array:
            parts = [part.data for part in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, everywhere, parts)

        return jax.tree.map(lambda x: one(x) if isinstance(x, jax.Array) else x, tree)

    def rows(self) -> NamedSharding | None:
        """The members' axis of an array, which comes first; None on one device."""
        return self._mesh and NamedSharding(self._mesh, PartitionSpec("query"))


def own_copy(tree: Any) -> Any:
    """Arrays that all devices hold, on one device of this process."""
    alone = lambda x: x.addressable_shards[0].data if len(x.sharding.device_set) > 1 else x
    return jax.tree.map(lambda x: alone(x) if isinstance(x, jax.Array) else x, tree)


def check(population: int, sizes: Any) -> None:
    """Whether members divide over a mesh of these sizes.

    Raises:
      ConfigError: they do not.
    """
    if sizes["data"] > 1 or sizes["model"] > 1:
        raise ConfigError(
            "a population is spread over mesh.query alone, with the weights whole on every device; "
            f"got mesh.data={sizes['data']}, mesh.model={sizes['model']}; set both to 1"
        )
    if population % sizes["query"]:
        raise ConfigError(
            f"the {population} members, two for each of zo.num_queries, must be divisible by the "
            f"{sizes['query']} devices of mesh.query; change zo.num_queries or mesh.query"
        )


def gather(indices: Sequence[int] | np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The scores of all processes, float64 [N, ...], from those of each, which may be nan, and
    their indices among the N.
    """
    if processes.count() == 1:
        told = [(indices, scores)]
    else:
        told = processes.exchange([np.asarray(indices).tolist(), scores.tolist()])
    where = np.concatenate([np.asarray(own, int) for own, _ in told])
    everything = np.concatenate([np.asarray(x, float) for own, x in told if len(own)])
    return everything[np.argsort(where)]
