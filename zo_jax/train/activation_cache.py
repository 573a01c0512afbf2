"""What lies below the trained part of a model, evaluated once for each batch of a run.

What no trained parameter reaches is the same whenever a batch comes again. With
`train.keep_activations` epochs have the same batches, and of each the results that the trained
part reads are kept in the host's memory (`zo_jax.programs.in_halves` says which these are): from
the second epoch on a step evaluates the trained part alone. What finds no room any more is
evaluated each time.
"""

from collections.abc import Callable
import hashlib
from typing import Any

import jax
import numpy as np

from zo_jax.programs import in_halves
from zo_jax.train import limits, processes
from zo_jax.trees import Subset

# The part of the host's memory that a function may keep: a run has one for its steps and one for
# its evaluations.
_SHARE = 1 / 4


class ActivationCache:
    """A function of (parameters, batch) that keeps what it finds below the trained part."""

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        scope: Subset,
        keep_vjp: bool = False,
        limit: int | None = None,
    ):
        """Args:
        function: (parameters, batch) -> pytree of arrays.
        scope: the part of the parameters that changes from call to call; nothing else may.
        keep_vjp: whether `above` is differentiated in reverse mode.
        limit: bytes that are kept at most; None for a quarter of the host's memory.
        """
        self._function, self._scope, self._keep_vjp = function, scope, keep_vjp
        self._kept: dict[bytes, Any] = {}
        self._room = int(limits.host_memory() * _SHARE) if limit is None else limit
        self._is_full = False
        self._below = jax.jit(lambda params, batch: self._halves(params, batch)[0](batch))
        self._call = jax.jit(lambda params, both: self.above(params, scope.select(params), both))

    def __call__(self, params: Any, batch: Any) -> Any:
        """What the function returns."""
        return self._call(params, self.of(params, batch))

    def of(self, params: Any, batch: Any) -> tuple[Any, Any]:
        """(what is kept of a batch, the batch), for `above`; evaluated if it is new."""
        key = _digest(batch)
        if key in self._kept:
            return self._kept[key], batch
        found = self._below(params, batch)
        size = sum(x.nbytes for x in jax.tree.leaves(found))
        if size <= self._room:
            self._room -= size
            self._kept[key] = found = jax.device_get(found)
        elif not self._is_full:
            self._is_full = True
            processes.say(
                f"train.keep_activations: {len(self._kept):,} batches are kept, and there is no "
                "room for more; the others are evaluated each time"
            )
        return found, batch

    def above(self, params: Any, trained: Any, both: tuple[Any, Any]) -> Any:
        """What the function returns of the parameters with `trained` in them, for use in a program:
        `both` is of `of`.
        """
        kept, batch = both
        return self._halves(params, batch)[1](kept, trained, batch)

    def _halves(self, params: Any, batch: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What is evaluated once, and the rest: two functions, of the batch and of what changes."""
        trained = self._scope.select(params)
        function = lambda trained, batch: self._function(self._scope.merge(params, trained), batch)
        is_moved = [True] * len(jax.tree.leaves(trained))
        return in_halves(function, trained, is_moved, batch, keep_vjp=self._keep_vjp)


def _digest(batch: Any) -> bytes:
    """What tells a batch from another."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(batch):
        array = np.asarray(leaf)
        digest.update(f"{array.shape} {array.dtype} ".encode() + array.tobytes())
    return digest.digest()
