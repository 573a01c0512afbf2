"""Learned feedback: where a parameter acts, the error that the output's error lets expect.

The error g_t of a value of token t is predicted by B e_t, e_t the error of the output, with B the
ridge regression of earlier estimates of g on e. What the prediction explains of a draw's losses is
taken out of them and added to the mean instead, so that it lowers the variance and has no part in
the mean, whatever B is. Of a prediction that is mostly noise the variance would grow: so every
place has a weight, the part of its predictions that earlier draws have confirmed. A learned form of
feedback alignment (Lillicrap et al., 2016), after Apical (an ablation of Dust, 2026). Axes: B
sequences, T tokens, E width of the output's error.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.sites import Site

# Of a sum of squares, so that nothing is divided by nothing before the first step.
_TINY = 1e-20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationFeedback:
    """What was learned: moving averages over steps, of all tokens.

    Attributes:
      squares: float32 [E, E], of e eᵀ.
      products: for each place where a parameter acts, in the order of the program, float32
        [..., E] of g eᵀ: after the lengths of the loops that it stands in the axes of a token.
      confirmed: float32 [places], of what draws had in common with the change of the losses that
        was predicted for them.
      predicted: float32 [places], of that change squared.
      error_fn: what predicts errors, of `activation_feedback`.
      memory: steps that the averages reach back.
      ridge: of the regression, relative to the mean square of the output's error.
    """

    squares: jax.Array
    products: list[jax.Array]
    confirmed: jax.Array
    predicted: jax.Array
    error_fn: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    memory: float = dataclasses.field(metadata={"static": True})
    ridge: float = dataclasses.field(metadata={"static": True})

    @property
    def weights(self) -> jax.Array:
        """What a prediction counts for, float32 [places] in [0, 1]."""
        return jnp.clip(self.confirmed / (self.predicted + _TINY), 0, 1)

    @property
    def is_finite(self) -> jax.Array:
        """Whether all of it is."""
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(self)]))

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raises ValueError if it was made for other places."""
        there, here = [x.shape[:-1] for x in self.products], [s.token_shape for s in sites]
        if there != here:
            raise ValueError(
                f"feedback was made for {len(there)} places {there}, and the losses have "
                f"{len(here)} {here}; make it by activation_feedback of the same losses, "
                "parameters and exact"
            )

    def predict(self, error_BTE: jax.Array, sites: Sequence[Site]) -> list[jax.Array]:
        """B e at every site, float32 of its shape, whatever it counts for."""
        E = len(self.squares)
        size = self.ridge * jnp.trace(self.squares) / E + _TINY
        inverse_EE = jnp.linalg.inv(self.squares + size * jnp.eye(E, dtype=jnp.float32))
        return [
            jnp.moveaxis(
                jnp.tensordot(error_BTE, product @ inverse_EE, (2, product.ndim - 1)),
                (0, 1),
                (site.loops, site.loops + 1),
            )
            for product, site in zip(self.products, sites, strict=True)
        ]

    def learn(
        self,
        error_BTE: jax.Array,
        errors: Sequence[jax.Array],
        sites: Sequence[Site],
        confirmed: jax.Array,
        predicted: jax.Array,
    ) -> "ActivationFeedback":
        """With one more step, of which the estimates of the errors at the sites are given, and what
        its draws say of the predictions.
        """
        B, T, _ = error_BTE.shape
        new = 1 / self.memory
        average = lambda old, one: (1 - new) * old + new * one
        products = [
            average(
                old,
                jnp.tensordot(g, error_BTE, ((site.loops, site.loops + 1), (0, 1))) / (B * T),
            )
            for old, g, site in zip(self.products, errors, sites, strict=True)
        ]
        squares = jnp.einsum("bte,btf->ef", error_BTE, error_BTE) / (B * T)
        return dataclasses.replace(
            self,
            squares=average(self.squares, squares),
            products=products,
            confirmed=average(self.confirmed, confirmed),
            predicted=average(self.predicted, predicted),
        )


def new_feedback(
    sites: Sequence[Site],
    E: int,
    error_fn: Callable[..., jax.Array],
    memory: float,
    ridge: float,
) -> ActivationFeedback:
    """Feedback that has learned nothing, for an output's error of width E.

    Raises:
      ValueError: memory or ridge is out of range.
    """
    if not (memory >= 1 and math.isfinite(memory)):
        raise ValueError(f"memory must be finite and at least 1 step, got {memory!r}")
    if not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be finite and above 0, got {ridge!r}")
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    # Each an array of its own, for they may be donated.
    start = zeros(E, E), [zeros(*site.token_shape, E) for site in sites]
    told = zeros(len(sites)), zeros(len(sites))
    return ActivationFeedback(*start, *told, error_fn, float(memory), float(ridge))


def output_error(
    error_fn: Callable[..., jax.Array], params: Any, batch: tuple[Any, ...], tokens: tuple[int, ...]
) -> jax.Array:
    """[B, T, E], float32.

    Raises:
      ValueError: `error_fn` returns something else.
    """
    error = error_fn(params, *batch)
    shape = getattr(error, "shape", None)
    if shape is None or len(shape) != 3 or shape[:2] != tokens:
        raise ValueError(
            f"error_fn must return an error of every token, {[*tokens, 'E']}, got "
            f"{type(error).__name__ if shape is None else list(shape)}"
        )
    return jax.lax.stop_gradient(error.astype(jnp.float32))
