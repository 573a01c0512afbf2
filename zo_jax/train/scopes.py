"""Which parameters a run trains: all of them, or those whose paths a regular expression finds.

The path of a parameter is its names joined by slashes, like "wte/embedding". The parameters of a
scanned stack of layers have one path a layer, like "blocks/3/fc/kernel", so that a scope can have
some layers of a leaf [L, ...] and leave the others.
"""

from collections.abc import Iterator
import re
from typing import Any

import jax
import numpy as np

from zo_jax.train.config import ConfigError
from zo_jax.trees import ALL, WHOLE, Subset

_STACK = "blocks"


def make_scope(name: str, params: Any) -> Subset:
    """The scope that a configuration names.

    Args:
      name: "full"; "reduced" (the last block's MLP and second LayerNorm, and the output head); or a
        regular expression, searched for in every path.
      params: pytree of arrays or their shapes.

    Raises:
      ConfigError: the expression is none, or finds nothing; the message lists the paths.
    """
    if name == "full":
        return WHOLE
    leaves = dict(_leaves(params))
    depth = max((leaf.shape[0] for path, leaf in leaves.items() if "/*/" in path), default=0)
    if name == "reduced":
        head = "head" if "head/embedding" in leaves else "wte"
        name = rf"^{_STACK}/{depth - 1}/(fc|fc_proj|ln_2)/|^{head}/"
    try:
        pattern = re.compile(name)
    except re.error as error:
        raise ConfigError(
            f"scope must be full, reduced or a regular expression; {name!r} is none: {error}"
        ) from error
    indices: list[Any] = []
    for path, leaf in leaves.items():
        num_layers = leaf.shape[0] if "/*/" in path else 1
        found = [i for i in range(num_layers) if pattern.search(path.replace("*", str(i), 1))]
        indices.append(ALL if len(found) == num_layers else np.array(found) if found else None)
    if all(i is None for i in indices):
        known = ", ".join(path.replace("*", f"0..{depth - 1}", 1) for path in leaves)
        raise ConfigError(f"scope {name!r} matches no parameter; their paths are {known}")
    return Subset(tuple(indices))


def _leaves(params: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(params):
        names = [str(getattr(part, "key", part)) for part in path]
        if names[0] == _STACK:
            names.insert(1, "*")
        yield "/".join(names), leaf
