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
    if name == "full":
        expression = ""
    else:
        expression = {"reduced": model.reduced, "lora": "^lora/"}.get(name, name)
    found = _find(expression, name, model, "scope", "full, reduced, lora")
    return WHOLE if name == "full" else found


def make_exact(name: str, model: Any, scope: Subset) -> Subset | None:
    """The part of the trained parameters whose gradient is exact: a subset of what the scope
    selects.

    Args:
      name: "none"; "head" (the last norm and the output head); or a regular expression, searched
        for in every path.
      model: as in `make_scope`, with `output`, the expression of the head.
      scope: what is trained.

    Raises:
      ConfigError: as `make_scope`; there is no head but the embedding, or none of what is found is
        trained, or all of it.
    """
    if name == "none":
        return None
    if name == "head" and not model.output:
        raise ConfigError(
            "zo.exact=head needs an output head of its own, but the model's is its token "
            "embedding, which lies below everything; set model.tied_head=false for a model from "
            "scratch, or zo.exact to an expression that finds the last layers"
        )
    expression = model.output if name == "head" else name
    exact = _find(expression, name, model, "zo.exact", "none, head").within(scope)
    shapes = jax.eval_shape(scope.select, model.shapes())
    if not any(i is not None for i in exact.indices or ()):
        raise ConfigError(f"zo.exact={name} finds nothing of what is trained; widen scope")
    if not any(i is not None for i in exact.rest(shapes).indices or ()):
        raise ConfigError(
            f"zo.exact={name} finds all that is trained, and leaves nothing to directions; narrow "
            "it, or set mode=fo"
        )
    return exact


def _find(expression: str, name: str, model: Any, field: str, names: str) -> Subset:
    leaves = list(_leaves(model.shapes(), model.stack))
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"{field} must be {names} or a regular expression; {name!r} is none: {error}"
        ) from error
    layers = lambda leaf: (leaf.path.replace("*", str(i), 1) for i in range(leaf.num_layers))
    found = [[i for i, path in enumerate(layers(x)) if pattern.search(path)] for x in leaves]
    if not any(found):
        last = max(leaf.num_layers for leaf in leaves) - 1
        known = ", ".join(leaf.path.replace("*", f"0..{last}", 1) for leaf in leaves)
        raise ConfigError(f"{field} {name!r} matches no parameter; their paths are {known}")
    if any(leaf.is_quantized and i for leaf, i in zip(leaves, found, strict=True)):
        raise ConfigError(
            f"{field} {name!r} has quantised weights, which cannot be trained themselves: set "
            f"scope=lora, or an expression that finds norms and biases alone"
        )
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
