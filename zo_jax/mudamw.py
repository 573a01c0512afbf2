"""MuDaMW: Muon's orthogonalisation of AdamW's direction, as an optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zo_jax import trees

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al., "Muon", 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def matrices(params: Any, embeddings: bool = True) -> Any:
    """Which leaves are matrices or stacks of them, a pytree of bools; biases and scales are not,
    stacked or single.

    Args:
      params: pytree of arrays.
      embeddings: whether leaves named "embedding" count.
    """

    def counts(path: Any, is_matrix: bool) -> bool:
        return is_matrix and (embeddings or not trees.path_name(path).endswith("embedding"))

    return jax.tree.map_with_path(counts, trees.matrices(params))


class MudamwState(NamedTuple):
    """State of `mudamw`.

    Attributes:
      count: int32, steps taken.
      mu: like the parameters, the first moment, not bias-corrected.
      nu: like the parameters, the second moment, not bias-corrected.
    """

    count: jax.Array
    mu: Any
    nu: Any


def mudamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    cautious: bool = False,
    mask: Any = None,
    *,
    matrix_mask: Any = matrices,
) -> optax.GradientTransformation:
    """Muon's orthogonalisation of AdamW's direction, for matrices; AdamW for the rest.

    With η' = η √(1 - b2ᵗ) / (1 - b1ᵗ) and u = m / (√v + ε), a matrix [A, B] moves by -η' · 0.2
    √max(A, B) · NS(u), anything else by -η' u; both by -η λ θ besides. NS is five quintic
    Newton-Schulz iterations (Jordan et al., "Muon", 2024). The reference script of "Zeroth Order
    Optimization for Pretraining Language Models" (ICPRAM 2025) defines the rest.

    Args:
      learning_rate: η, or a schedule of the steps counted from 0.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: ε.
      weight_decay: λ, decoupled.
      cautious: drop the entries of m whose sign is not the gradient's (Liang et al., "Cautious
        optimizers", 2024).
      mask: which leaves decay: pytree of bools, or a function from parameters to one; None: all.
      matrix_mask: which leaves are orthogonalised, likewise; [..., A, B] is a stack of matrices.

    Returns:
      The transformation; its state is a `MudamwState`.

    >>> import jax.numpy as jnp, optax, zo_jax
    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    >>> tx = zo_jax.mudamw(1e-2)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["kernel"].shape, round(float(updates["bias"][0]), 4)
    ((2, 3), -0.01)
    """
    as_tree = lambda tree_or_function, params: (
        tree_or_function(params) if callable(tree_or_function) else tree_or_function
    )

    def init_fn(params: Any) -> MudamwState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return MudamwState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, MudamwState]:
        if params is None:
            raise ValueError(
                "mudamw needs the parameters, for their decay and their names: "
                "tx.update(updates, state, params)"
            )
        average = lambda decay: lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype)
        mu = jax.tree.map(average(b1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: average(b2)(v, g**2), state.nu, updates)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = jnp.asarray(optax.safe_increment(state.count))
        t = count.astype(jnp.float32)
        corrected = rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)

        def move(g, m, v, p, is_matrix, decays):
            if cautious:
                agrees = (m * g > 0).astype(m.dtype)
                m = m * agrees * (agrees.size / (jnp.sum(agrees) + 1))
            u, step_size = m / (jnp.sqrt(v) + eps), corrected
            if is_matrix:
                u, step_size = orthogonalize(u), corrected * 0.2 * max(p.shape[-2:]) ** 0.5
            decay = rate * weight_decay * p if decays else 0
            return (-step_size * u - decay).astype(p.dtype)

        all_decay = mask is None
        new = jax.tree.map(
            move,
            updates,
            mu,
            nu,
            params,
            as_tree(matrix_mask, params),
            jax.tree.map(lambda _: True, params) if all_decay else as_tree(mask, params),
        )
        return new, MudamwState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def orthogonalize(x: jax.Array) -> jax.Array:
    """Five quintic Newton-Schulz iterations towards the nearest semi-orthogonal matrix, of each
    matrix of [..., A, B].
    """
    a, b, c = _NEWTON_SCHULZ
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = jnp.swapaxes(x, -1, -2)
    y = x.astype(jnp.float32)
    y = y / (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = y @ jnp.swapaxes(y, -1, -2)
        y = a * y + (b * gram + c * gram @ gram) @ y
    y = y.astype(x.dtype)
    return jnp.swapaxes(y, -1, -2) if transposed else y
