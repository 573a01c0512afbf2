"""DiZO: how far each layer has gone from where it began, corrected every k steps.

Tan et al., "Harmony in divergence: towards fast, accurate, and memory-efficient zeroth-order LLM
fine-tuning", arXiv 2502.03304. Every k steps a scale s_l of each layer is sought for its change
from the start θ₀, by zeroth-order descent on the loss L(θ₀ + s ∘ (θ - θ₀)), and kept near 1:

    s ← clip(s - γ c n, 1 - τ, 1 + τ),   c = (L(.. s + δ n ..) - L(.. s - δ n ..)) / 2 δ,

with n of normal numbers, one a layer, for some iterations that begin at s = 1; then
θ ← θ₀ + s ∘ (θ - θ₀). A layer is a leaf, and each matrix of a stack of them. The paper searches
s_l ‖θ_l - θ₀_l‖ in the place of s_l, with steps of that norm: the same but for the unit of s. Its
τ is 0.1 to 0.3 and k some tens to hundreds.

It stands last in a chain, behind any optimiser, since it moves what the others have moved. Passes
every k steps: 2 an iteration; else none. Memory beside the parameters: θ₀, as large as they.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from zo_jax.estimators import typed_key
from zo_jax.methods.method import Step, require_positive, require_share
from zo_jax.methods.shaped import add_rounded
from zo_jax.noise import key_words, own_words
from zo_jax.trees import as_arrays, is_floating, matrices


class DizoState(NamedTuple):
    """State of `dizo`.

    Attributes:
      key: uint32 [2], the words of the key that was given.
      count: int32, steps taken.
      start: θ₀.
      numbers: float32 [n], the projections of the last search; those and the key replay it.
      scales: for each leaf its scales, float32, after the last search; None if not floating.
    """

    key: jax.Array
    count: jax.Array
    start: Any
    numbers: jax.Array
    scales: Any


def dizo(
    key: jax.Array,
    period: int = 50,
    num_iterations: int = 5,
    clip: float = 0.2,
    delta: float = 0.05,
    rate: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """DiZO's projections, for the end of a chain.

    `update(updates, state, params, value_fn=..., batch=())` adds to the updates what brings each
    layer to its scale. With `numbers=...`, those of a state, no loss is evaluated.

    Args:
      key: a PRNG key of the threefry implementation.
      period: k; the first search is after k steps.
      num_iterations: n, iterations of a search.
      clip: τ, in [0, 1].
      delta: δ.
      rate: γ.

    Raises:
      ValueError: an option is out of range; or, from `update`, `params`, or `value_fn` and
        `numbers`, are missing.

    >>> import jax, jax.numpy as jnp, optax, zo_jax
    >>> key = jax.random.key(0)
    >>> tx = optax.chain(zo_jax.zeroth_order(key), optax.sgd(1e-3), zo_jax.methods.dizo(key, 2))
    >>> loss_fn = lambda p: jnp.sum((p - 1) ** 2)
    >>> params = jnp.zeros(4)
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(None, state, params, value_fn=loss_fn)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(state[2].scales[0] > 1)  # the way is right, and long
    True
    """
    words = key_words(typed_key(key))
    require_positive("period", period)
    require_positive("num_iterations", num_iterations)
    require_share("clip", clip)
    if not (delta > 0 and math.isfinite(delta)):
        raise ValueError(f"delta must be positive and finite, got {delta!r}")

    def init_fn(params: Any) -> DizoState:
        params = as_arrays(params)
        zero, numbers = jnp.zeros((), jnp.int32), jnp.zeros(num_iterations, jnp.float32)
        start = jax.tree.map(jnp.copy, params)
        return DizoState(own_words(words), zero, start, numbers, _ones(params))

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value_fn: Callable[..., jax.Array] | None = None,
        batch: tuple[Any, ...] = (),
        numbers: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Any, DizoState]:
        del extra_args
        if params is None or (value_fn is None and numbers is None):
            raise ValueError(
                "dizo evaluates the loss of scaled changes: pass both to update, as "
                "tx.update(updates, state, params, value_fn=lambda params: loss)"
            )
        moved = optax.apply_updates(as_arrays(params), updates)
        loss_of = lambda scales: value_fn(_scaled(state.start, moved, scales), *batch)  # pyright: ignore
        step_key = Step(state.key, state.count).key

        def iterate(scales, given):
            i, c = given
            n = _normals(jax.random.fold_in(step_key, i), scales)
            if c is None:
                plus, minus = (loss_of(_sum(scales, s * delta, n)) for s in (1, -1))
                c = ((plus - minus) / (2 * delta)).astype(jnp.float32)
            change = jnp.where(jnp.isfinite(c), -rate * c, 0)
            near = lambda x: jnp.clip(x, 1 - clip, 1 + clip)
            return jax.tree.map(near, _sum(scales, change, n)), c

        def search():
            scales, c = lax.scan(iterate, _ones(params), (jnp.arange(num_iterations), numbers))
            return scales, c, _scaled(state.start, moved, scales)

        count = jnp.asarray(optax.safe_increment(state.count))
        is_due = count % period == 0
        scales, c, after = lax.cond(is_due, search, lambda: (state.scales, state.numbers, moved))
        difference = lambda new, old, update: (
            jnp.where(is_due, new - old, update).astype(update.dtype)
            if is_floating(old)
            else update
        )
        updates = jax.tree.map(difference, after, params, updates)
        return updates, DizoState(state.key, count, state.start, c, scales)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _ones(params: Any) -> list[jax.Array | None]:
    """A scale for each layer, which broadcasts to it."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(matrices(params)), strict=True)

    def of_leaf(x: Any, is_matrix: bool) -> jax.Array | None:
        stack = x.shape[:-2] if is_matrix else ()
        return jnp.ones(stack + (1,) * (x.ndim - len(stack))) if is_floating(x) else None

    return [of_leaf(*pair) for pair in pairs]


def _normals(key: jax.Array, like: list[Any]) -> list[jax.Array | None]:
    draw = lambda i, x: (
        None if x is None else jax.random.normal(jax.random.fold_in(key, i), x.shape)
    )
    return [draw(i, x) for i, x in enumerate(like)]


def _sum(scales: list[Any], factor: Any, n: list[Any]) -> list[Any]:
    return jax.tree.map(lambda s, x: s + factor * x, scales, n)


def _scaled(start: Any, moved: Any, scales: list[Any]) -> Any:
    """start + scales ∘ (moved - start), summed in float32 or better."""
    leaves, treedef = jax.tree.flatten(moved)
    olds = jax.tree.leaves(start)
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def of_leaf(old: jax.Array, new: jax.Array, scale: Any) -> jax.Array:
        return new if scale is None else add_rounded(old, scale * (wide(new) - wide(old)))

    return jax.tree.unflatten(treedef, map(of_leaf, olds, leaves, scales))
