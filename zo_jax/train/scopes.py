"""Which parameters a run trains: all of them, or those whose paths a regular expression finds.

The path of a parameter is its names joined by slashes, like "wte/embedding". The parameters of a
scanned stack of layers have one path a layer, like "blocks/3/fc/kernel", so that a scope can have
some layers of a leaf [L, ...] and leave the others.
"""

from collections.abc import Iterator
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from zo_jax.models.weights import is_weight
from zo_jax.train.config import ConfigError
from zo_jax.trees import ALL, WHOLE, Subset


class _Leaf(NamedTuple):
    """A leaf of the parameters.

    Attributes:
      path: with a star for the layer in a stack.
      num_layers: 1 outside.
      is_quantized: whether it is a part of a quantised weight.
    """

    path: str
    num_layers: int
    is_quantized: bool


def make_scope(name: str, model: Any) -> Subset:
    """The scope that a configuration names.

    Args:
      name: "full"; "reduced" (the last block's MLP and its norm, and the output head); "lora" (the
        factors beside the weights); or a regular expression, searched for in every path.
      model: with `shapes` of its parameters, `stack`, the name of the subtree of layers, and
        `reduced`, the expression of that scope.

    Raises:
      ConfigError: the expression is none, or finds nothing, and the message lists the paths; or it
        finds quantised weights.
    """
    leaves = list(_leaves(model.shapes(), model.stack))
    try:
        expressions = {"full": "", "reduced": model.reduced, "lora": "^lora/"}
        pattern = re.compile(expressions.get(name, name))
    except re.error as error:
        raise ConfigError(
            f"scope must be full, reduced, lora or a regular expression; {name!r} is none: {error}"
        ) from error
    layers = lambda leaf: (leaf.path.replace("*", str(i), 1) for i in range(leaf.num_layers))
    found = [[i for i, path in enumerate(layers(x)) if pattern.search(path)] for x in leaves]
    if not any(found):
        last = max(leaf.num_layers for leaf in leaves) - 1
        known = ", ".join(leaf.path.replace("*", f"0..{last}", 1) for leaf in leaves)
        raise ConfigError(f"scope {name!r} matches no parameter; their paths are {known}")
    if any(leaf.is_quantized and i for leaf, i in zip(leaves, found, strict=True)):
        raise ConfigError(
            f"scope {name!r} has quantised weights, which cannot be trained themselves: set "
            f"scope=lora, or an expression that finds norms and biases alone"
        )
    if name == "full":
        return WHOLE
    return Subset(
        tuple(
            ALL if len(i) == leaf.num_layers else np.array(i) if i else None
            for leaf, i in zip(leaves, found, strict=True)
        )
    )


def _leaves(shapes: Any, stack: str) -> Iterator[_Leaf]:
    for path, node in jax.tree.leaves_with_path(shapes, is_leaf=is_weight):
        for rest, leaf in jax.tree.leaves_with_path(node):
            names = [str(getattr(x, "key", getattr(x, "name", x))) for x in (*path, *rest)]
            is_stacked = names[0] == stack
            name = "/".join([*names[:1], *["*"] * is_stacked, *names[1:]])
            yield _Leaf(name, leaf.shape[0] if is_stacked else 1, is_weight(node))
