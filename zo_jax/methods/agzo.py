"""AGZO: directions in the subspace of what each matrix multiplies.

Lin et al., "AGZO: activation-guided zeroth-order optimization for LLM fine-tuning", arXiv
2601.17261. The gradient of a matrix lies in the span of its inputs H [tokens, n]. With A [n, r] the
leading eigenvectors of Hᵀ H of the step's own batch, from k power iterations, and R of fresh normal
numbers,

    z = R Aᵀ,     c = (L(θ + ε z) - L(θ - ε z)) / 2 ε,     g = c z.

Other leaves get normal numbers. r = 1 is near the mean activation: the change of a bias.

Inputs are found by the program of the losses (`zo_jax.sites`), of any model in which a matrix acts
linearly on the activations of tokens; k applications of Hᵀ H cost k evaluations of the products
alone and of their transposes, and there is no derivative of anything else. Passes a step: 2 q + 1,
and 2 k times the products. Memory beside the parameters: the inputs of all products while A is
found, then A. A step depends on its data through A, so numbers alone do not replay it.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.estimators import Estimator
from zo_jax.methods.method import Method, Step, require_positive
from zo_jax.methods.subspace import Subspace, keep_factors, orthonormal_columns, subspace_family
from zo_jax.sites import trace_tokens
from zo_jax.trees import is_floating, path_name


@subspace_family
class AgzoDirections(Subspace):
    """R Aᵀ with A kept; coordinates are R.

    Attributes:
      input_axis: of matrices, -2 or -1.
    """

    input_axis: int = -2

    def coordinates_shape(self, leaf):
        outputs = leaf.shape[-1 if self.input_axis == -2 else -2]
        return (*leaf.shape[:-2], outputs, self.rank)

    def factors(self, kept, x):
        return (kept, x) if self.input_axis == -2 else (x, kept)


@dataclasses.dataclass(frozen=True)
class Agzo(Method):
    """AGZO. Its `value_fn` returns the losses of tokens [B, T], whose mean is the loss.

    Attributes:
      rank: r.
      num_iterations: k.
      input_axis: the axis of matrices that is summed over in products: -2 for [in, out], -1 for
        [out, in].
      is_matrix: (path, leaf) -> whether a leaf has an A; None for every matrix with more than r
        rows and columns. Tables of embeddings should have none: their inputs are token ids.

    Raises:
      ValueError: an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.Agzo(rank=1).transformation(jax.random.key(0))
    >>> x = jax.random.normal(jax.random.key(1), (2, 4, 6))
    >>> losses = lambda w: jnp.mean((x @ w - 1) ** 2, axis=-1)
    >>> params = jnp.zeros((6, 5))
    >>> updates, _ = tx.update(None, tx.init(params), params, value_fn=losses)
    >>> int(jnp.linalg.matrix_rank(updates))
    1
    """

    estimator: Estimator = Estimator(num_queries=1)
    rank: int = 1
    num_iterations: int = 3
    input_axis: int = -2
    is_matrix: Callable[[str, Any], bool] | None = None

    replays = False

    def __post_init__(self):
        super().__post_init__()
        require_positive("rank", self.rank)
        require_positive("num_iterations", self.num_iterations)
        if self.input_axis not in (-2, -1):
            raise ValueError(f"input_axis must be -2 or -1, got {self.input_axis!r}")

    @property
    def num_evaluations(self) -> int:
        """With the pass that looks at the inputs, not the products of the power iterations."""
        return self.estimator.num_evaluations + 1

    def init(self, params: Any) -> Any:
        of = lambda key, leaf: orthonormal_columns(key, leaf, self.input_axis, self.rank)
        kept = keep_factors(params, jax.random.key(0), self.rank, of)
        if self.is_matrix is not None:
            paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
            found = zip(paths, jax.tree.leaves(params), kept, strict=True)
            kept = [a if a is not None and self.is_matrix(p, x) else None for p, x, a in found]
        return kept

    def family(self, params: Any, memory: Any, step: Step) -> AgzoDirections:
        del params, step
        return AgzoDirections(memory, self.rank, self.input_axis)

    def prepare(self, loss_fn, params, memory, step, *batch):
        evaluate, _ = trace_tokens(loss_fn, params, batch)
        values = [leaf for leaf in jax.tree.leaves(params) if is_floating(leaf)]
        taps = lambda values: [x for _, x in evaluate(values, None)[1]]
        _, products = jax.linearize(taps, values)
        transposed = jax.linear_transpose(products, values)
        is_value = [is_floating(leaf) for leaf in jax.tree.leaves(params)]
        kept = [a for a, yes in zip(memory, is_value, strict=True) if yes]
        key = step.lasting(None)

        def begin(i: int, a: jax.Array | None) -> jax.Array | None:
            return None if a is None else jax.random.normal(jax.random.fold_in(key, i), a.shape)

        found = [begin(i, a) for i, a in enumerate(kept)]
        for _ in range(self.num_iterations):
            moved = [self._put(x, a) for x, a in zip(values, found, strict=True)]
            (back,) = transposed(products(moved))
            found = [
                None if a is None else jnp.linalg.qr(self._take(x))[0]
                for x, a in zip(back, found, strict=True)
            ]
        found = iter(found)
        return [next(found) if yes else None for yes in is_value]

    def project(self, loss_fn, params, memory, step, *batch, **extra):
        mean = lambda params, *batch: jnp.mean(loss_fn(params, *batch))
        return super().project(mean, params, memory, step, *batch, **extra)

    def _put(self, leaf: jax.Array, a: jax.Array | None) -> jax.Array:
        """A matrix whose first columns (rows, with `input_axis` -1) are those of A."""
        zeros = jnp.zeros_like(leaf)
        if a is None:
            return zeros
        if self.input_axis == -2:
            return zeros.at[..., : self.rank].set(a.astype(leaf.dtype))
        return zeros.at[..., : self.rank, :].set(jnp.swapaxes(a, -1, -2).astype(leaf.dtype))

    def _take(self, leaf: jax.Array) -> jax.Array:
        """What `_put` put."""
        wide = leaf.astype(jnp.float32)
        if self.input_axis == -2:
            return wide[..., : self.rank]
        return jnp.swapaxes(wide[..., : self.rank, :], -1, -2)
