"""The mesh of a run's devices.

Three axes: `query`, groups of devices that evaluate different queries and exchange scalars alone;
`data`, parts of a batch; `model`, parts of the parameters and of the optimiser's state.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES = ("query", "data", "model")


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
    sizes: dict[str, int] = dict(zip(AXES, (query, data, model), strict=True))
    text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise MeshError(f"mesh sizes must be at least 1, or -1 for one of them; got {text}")
    product = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = max(1, len(devices) // product)
    if math.prod(sizes.values()) != len(devices):
        raise MeshError(
            f"the mesh sizes must multiply to the {len(devices)} devices; got {text}; set one of "
            f"them to -1 for what is left"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
