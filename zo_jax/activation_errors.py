"""Losses with noise on activations, and the errors of activations that they tell.

Axes: B sequences, T tokens, S sites (`zo_jax.sites`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import exact as exactly
from zo_jax.sites import Site, Sites, trace_tokens
from zo_jax.trees import is_floating, loss_of, path_name


class Clean(NamedTuple):
    """Losses without noise, and what follows from errors.

    Attributes:
      sites: where noise is added.
      losses_BT: without any.
      losses_with: of noise at the sites.
      gradient_of: errors at the sites, in the sum of the losses -> gradient of their mean by all
        parameters.
    """

    sites: list[Any]
    losses_BT: jax.Array
    losses_with: Callable[[Any], jax.Array]
    gradient_of: Callable[[list[jax.Array]], Any]


def evaluate_clean(token_loss_fn: Any, whole: Any, batch: Any, exact: Any) -> Clean:
    """The losses of all parameters without noise; what is `exact` has none, and its own gradient.

    Raises:
      ValueError: as `zo_jax.activation_gradient`.
    """
    parts, noisy, evaluate, found = trace(token_loss_fn, whole, batch, exact)
    values = [x for x in jax.tree.leaves(noisy) if is_floating(x)]

    def clean(values):
        losses_BT, taps = evaluate(values, None)
        return [x for _, x in taps], (losses_BT, [site for site, _ in taps])

    taps, pull, (losses_BT, of_tap) = jax.vjp(clean, values, has_aux=True)

    def gradient_of(errors: list[jax.Array]) -> Any:
        pairs = zip(of_tap, taps, strict=True)
        (own,) = pull([(errors[site] / losses_BT.size).astype(tap.dtype) for site, tap in pairs])
        own = iter(own)
        gradient = jax.tree.map(
            lambda p: next(own).astype(p.dtype) if is_floating(p) else jnp.zeros_like(p), noisy
        )
        if parts is None:
            return gradient
        gradient = parts.rest.merge(jax.tree.map(jnp.zeros_like, whole), gradient)
        losses_of_exact = loss_of(parts.exact, token_loss_fn, whole)
        mean = lambda own, batch: jnp.mean(losses_of_exact(own, *batch))
        one = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
        part = exactly.exact_gradient(mean, parts.exact.select(whole), one, 1)
        return parts.exact.merge(gradient, part)

    losses_with = lambda noises: evaluate(values, noises)[0]
    return Clean(found.sites, losses_BT, losses_with, gradient_of)


def trace(
    token_loss_fn: Any, params: Any, batch: Any, exact: Any
) -> tuple[Any, Any, Callable[..., Any], Sites]:
    """(the two parts or None, what has noise, its evaluation, its sites)."""
    parts, losses_of, noisy = None, token_loss_fn, params
    if exact is not None:
        parts = exactly.split(exact, params)
        noisy, losses_of = parts.rest.select(params), loss_of(parts.rest, token_loss_fn, params)
    evaluate, found = trace_tokens(losses_of, noisy, batch)
    _check_covered(found.uncovered, noisy, found.tokens)
    return parts, noisy, evaluate, found


def _check_covered(uncovered: set[int], params: Any, tokens: tuple[int, ...]) -> None:
    if uncovered:
        paths = [p for p, x in jax.tree.leaves_with_path(params) if is_floating(x)]
        names = ", ".join(path_name(paths[i]) or "params" for i in sorted(uncovered))
        raise ValueError(
            f"parameters must act linearly on activations {list(tokens)} + [...], but {names} are "
            "used in another way too; name them in exact"
        )


def find_errors(
    losses_with: Callable[[Any], jax.Array],
    sites: list[Site],
    sigma: float,
    key: jax.Array,
    num_draws: int,
    discount: float,
    guess: tuple[list[jax.Array], jax.Array] | None,
) -> tuple[list[jax.Array], jax.Array, tuple[jax.Array, jax.Array]]:
    """(for each site the error of its value in the losses' sum, the number of draws that are not
    left out, and what these say of a guess: see `ActivationFeedback.learn`).

    Args:
      guess: (for each site the errors that are expected, the weight of each site), or None.
    """
    predicted, weights = guess or ([], _zeros(0))

    def signs(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(sites))
        return [
            jax.random.rademacher(k, site.shape, jnp.float32)
            for k, site in zip(keys, sites, strict=True)
        ]

    def add_draw(carry, key):
        totals, told, count = carry
        draws = signs(key)
        noise = lambda side: [
            (side * a).astype(site.dtype) for a, site in zip(draws, sites, strict=True)
        ]
        # A loop over the two sides, so that the program is compiled once.
        both_2BT = lax.map(lambda side: losses_with(noise(side)), jnp.float32([sigma, -sigma]))
        change_BT = (both_2BT[0] - both_2BT[1]).astype(jnp.float32) / (2 * sigma)
        is_finite = jnp.all(jnp.isfinite(change_BT))
        # Without a guess there is nothing predicted of any site.
        of_sites = [_by_token(a * p, s) for a, p, s in zip(draws, predicted, sites, strict=False)]
        expected_SBT = jnp.stack(of_sites) if of_sites else _zeros(0, *change_BT.shape)
        change_BT -= jnp.einsum("s,sbt->bt", weights, expected_SBT)
        credit_TT = _credit(change_BT.shape[1], discount)
        credit_BT = jnp.where(is_finite, jnp.einsum("tu,bu->bt", credit_TT, change_BT), 0)
        new = [
            total + a * _along(credit_BT, site)
            for total, a, site in zip(totals, draws, sites, strict=True)
        ]
        squares_S = jnp.where(is_finite, jnp.sum(jnp.square(expected_SBT), axis=(1, 2)), 0)
        # Of the rest of the change, and of what was taken out of it.
        common_S = jnp.einsum("bt,sbt->s", credit_BT, expected_SBT) + weights * squares_S
        told = told[0] + common_S, told[1] + squares_S
        return (new, told, count + is_finite), None

    zeros = [_zeros(*site.shape) for site in sites]
    start = zeros, (_zeros(len(predicted)), _zeros(len(predicted))), jnp.int32(0)
    keys = jax.random.split(key, num_draws)
    (totals, told, count), _ = lax.scan(add_draw, start, keys)
    mean = [total / jnp.maximum(count, 1) for total in totals]
    if guess is not None:  # whose share of the draws' credit was taken out
        pairs = zip(mean, weights, predicted, strict=True)
        mean = [jnp.where(count > 0, m + w * p, 0) for m, w, p in pairs]
    return mean, count, told


def mean_errors(
    losses_with: Callable[[Any], jax.Array], sites: list[Site], discount: float
) -> list[jax.Array]:
    """The mean of `find_errors`, but for O(sigma²), by a backward pass from every token's loss."""
    losses_BT, pull = jax.vjp(losses_with, [jnp.zeros(site.shape, site.dtype) for site in sites])
    T = losses_BT.shape[1]

    def add_token(totals: list[jax.Array], token: Any) -> tuple[list[jax.Array], None]:
        """The errors of all tokens in the losses of token u."""
        u, weight_T = token
        of_u_BT = jnp.broadcast_to(jnp.arange(T)[None] == u, losses_BT.shape)
        (errors,) = pull(of_u_BT.astype(losses_BT.dtype))
        weight_BT = jnp.broadcast_to(weight_T[None], losses_BT.shape)
        pairs = zip(totals, errors, sites, strict=True)
        return [t + e.astype(jnp.float32) * _along(weight_BT, site) for t, e, site in pairs], None

    start = [_zeros(*site.shape) for site in sites]
    # The transpose: a row has the weights of a token's loss in the credit of all.
    errors, _ = lax.scan(add_token, start, (jnp.arange(T), _credit(T, discount).T))
    return errors


def _zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def _credit(T: int, discount: float) -> jax.Array:
    """[t, u]: discount^(u - t), the weight of the loss of token u in the credit of t; 0 before."""
    ahead_TT = jnp.arange(T)[None] - jnp.arange(T)[:, None]
    return jnp.where(ahead_TT >= 0, jnp.float32(discount) ** jnp.maximum(ahead_TT, 0), 0)


def _by_token(values: jax.Array, site: Any) -> jax.Array:
    """The sum of a site's values over all but the tokens, [B, T]."""
    own = (site.loops, site.loops + 1)
    return jnp.sum(values, axis=[i for i in range(values.ndim) if i not in own])


def _along(credit_BT: jax.Array, site: Any) -> jax.Array:
    """The credit of tokens, shaped to go with a site's values."""
    first, last = site.loops, len(site.shape)
    return lax.expand_dims(credit_BT, (*range(first), *range(first + 2, last)))
