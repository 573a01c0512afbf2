"""Gradients from noise on activations: node perturbation with the loss of every token.

Where a parameter acts on an activation (`zo_jax.sites`) noise is added to the result y of every
token, and the losses tell how much it mattered. With signs a and the size s of the noise, the error
of y at token t is the mean over draws of

    a_t (C_t(s) - C_t(-s)) / 2s,    C_t(s) = Σ_{u >= t} γ^(u - t) loss_u(y + s a),

the credit of token t: its own loss, and those of later tokens, discounted. All sites have noise at
once, so that a draw costs two evaluations; the noise of other sites and tokens is zero in the mean.
The gradient of the parameters follows from the error and from what goes into the site, in closed
form. Williams, "Simple statistical gradient-following algorithms", 1992; credit by token after
Dust (Q Labs, 2026). Axes: B sequences, T tokens.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from zo_jax import exact as exactly
from zo_jax.activation_feedback import ActivationFeedback, check_feedback, output_error
from zo_jax.estimators import typed_key
from zo_jax.noise import key_words, own_words
from zo_jax.sites import trace_tokens
from zo_jax.trees import Rule, Subset, as_arrays, is_floating, loss_of, path_name


class ActivationEstimate(NamedTuple):
    """A gradient estimate.

    Attributes:
      gradient: like params.
      loss: float32 scalar, the mean loss of all tokens without noise.
      num_failed: int32 scalar, the draws with a loss that was not finite, which are left out.
      feedback: that was given, with what these draws taught it; None if none was.
    """

    gradient: Any
    loss: jax.Array
    num_failed: jax.Array
    feedback: ActivationFeedback | None = None


def activation_gradient(
    token_loss_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    *batch: Any,
    num_draws: int = 8,
    sigma: float = 0.05,
    discount: float = 1.0,
    exact: Rule | Subset | None = None,
    feedback: ActivationFeedback | None = None,
) -> ActivationEstimate:
    """An estimate of the gradient of the mean of all tokens' losses by noise on activations.

    Unbiased, but for O(sigma²), with `discount` 1, if no loss depends on later tokens or on those
    of another sequence. With a smaller one the mean is the gradient under truncated credit: biased,
    of less variance. The variance grows with the activations of a token that have noise, not with
    the parameters.
    Memory: what goes into every site, as backprop holds it, and noise of the size of all sites'
    results. Cost: two evaluations a draw, and the products of one backward pass in the end.

    Args:
      token_loss_fn: `token_loss_fn(params, *batch)` -> floating [B, T], the loss of each token. Any
        JAX code; scans over layers are entered. Parameters must act on activations [B, T, ...].
      params: pytree of arrays; leaves that are not floating have the gradient 0.
      key: a PRNG key of the threefry implementation.
      *batch: pytrees handed to `token_loss_fn`.
      num_draws: of noise, two evaluations each.
      sigma: size of the noise, in the units of the activations.
      discount: γ in [0, 1]; 0 gives each token its own loss alone, 1 all that come after.
      exact: parameters with an exact gradient instead, as of `Estimator`: those of an output head
        that is not applied token by token, such as a cross-entropy in chunks of tokens.
      feedback: of `activation_feedback`, what earlier draws tell of the errors; the mean of the
        estimate is the same with it, and the variance less, if it predicts anything.

    Raises:
      ValueError: an argument is out of range, the losses are not floating [B, T], or parameters
        are used in another way; the message names them.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 4, 3))
    >>> losses = lambda params, x: jnp.sum((x @ params["w"]) ** 2, axis=-1)
    >>> est = zo_jax.activation_gradient(
    ...     losses, params, jax.random.key(0), x, num_draws=64, discount=0.0)
    >>> bool(jnp.allclose(est.gradient["w"], 6, atol=1.5)), float(est.loss)
    (True, 18.0)
    """
    _check(num_draws, sigma, discount)
    whole, key = as_arrays(params), typed_key(key)
    clean = _evaluate(token_loss_fn, whole, batch, exact)
    guess, error_BTE = None, None
    if feedback is not None:
        _check_fits(feedback, clean.sites)
        error_BTE = output_error(feedback.error_fn, whole, batch, clean.losses_BT.shape)
        is_usable = jnp.all(jnp.isfinite(error_BTE))
        error_BTE = jnp.where(is_usable, error_BTE, 0)
        guess = feedback.predict(error_BTE, clean.sites), feedback.weights
    errors, count, told = _errors(
        clean.losses_with, clean.sites, sigma, key, num_draws, discount, guess
    )
    if feedback is not None and error_BTE is not None:
        new = feedback.learn(error_BTE, errors, clean.sites, *told)
        # A step that tells nothing teaches nothing.
        told_something = is_usable & (count > 0) & new.is_finite
        feedback = jax.tree.map(lambda a, b: jnp.where(told_something, a, b), new, feedback)
    num_failed = num_draws - count
    loss = jnp.mean(clean.losses_BT.astype(jnp.float32))
    return ActivationEstimate(clean.gradient_of(errors), loss, num_failed, feedback)


def mean_activation_gradient(
    token_loss_fn: Callable[..., jax.Array],
    params: Any,
    *batch: Any,
    discount: float = 1.0,
    exact: Rule | Subset | None = None,
) -> Any:
    """What `activation_gradient` is in the mean, but for O(sigma²): the ceiling of what draws can
    give under a discount, by backpropagation.

    It takes T backward passes, and is so where no loss depends on another sequence, or on a
    `stop_gradient`, of which draws know nothing. With `discount` 1 it is the gradient, if no loss
    depends on later tokens.

    Args:
      token_loss_fn, params, batch, discount, exact: as of `activation_gradient`.

    Returns:
      A gradient like params.

    Raises:
      ValueError: as `activation_gradient`.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> losses = lambda w: jnp.cumsum(jnp.sum((jnp.ones((1, 3, 2)) @ w) ** 2, axis=-1), axis=1)
    >>> w = jnp.ones((2, 1))
    >>> [float(zo_jax.mean_activation_gradient(losses, w, discount=d)[0, 0]) for d in (0.0, 1.0)]
    [4.0, 8.0]
    """
    _check(1, 1.0, discount)
    whole = as_arrays(params)
    clean = _evaluate(token_loss_fn, whole, batch, exact)
    zeros = [jnp.zeros(site.shape, site.dtype) for site in clean.sites]
    losses_BT, pull = jax.vjp(clean.losses_with, zeros)
    T = losses_BT.shape[1]

    def add_token(totals: list[jax.Array], u: jax.Array) -> tuple[list[jax.Array], None]:
        """The errors of all tokens up to u in the losses of token u."""
        cotangent_BT = jnp.broadcast_to(jnp.arange(T) == u, losses_BT.shape)
        (errors,) = pull(cotangent_BT.astype(losses_BT.dtype))
        behind_T = u - jnp.arange(T)
        weight_T = jnp.where(behind_T >= 0, jnp.float32(discount) ** jnp.maximum(behind_T, 0), 0)
        weight_BT = jnp.broadcast_to(weight_T, losses_BT.shape)
        own = [
            total + error.astype(jnp.float32) * _along(weight_BT, site)
            for total, error, site in zip(totals, errors, clean.sites, strict=True)
        ]
        return own, None

    start = [jnp.zeros(site.shape, jnp.float32) for site in clean.sites]
    errors, _ = lax.scan(add_token, start, jnp.arange(T))
    return clean.gradient_of(errors)


def activation_feedback(
    token_loss_fn: Callable[..., jax.Array],
    error_fn: Callable[..., jax.Array],
    params: Any,
    *batch: Any,
    exact: Rule | Subset | None = None,
    memory: float = 50.0,
    ridge: float = 0.1,
) -> ActivationFeedback:
    """Feedback that has learned nothing yet, for `activation_gradient` and
    `activation_zeroth_order`.

    Where a parameter acts it is a matrix: the ridge regression, over the tokens of earlier steps,
    of the error's estimates on the output's error. It costs an evaluation of `error_fn` and
    products of the width of that error a step.

    Args:
      token_loss_fn, params, batch, exact: as of `activation_gradient`; shapes alone are read.
      error_fn: `error_fn(params, *batch)` -> [B, T, E], what predicts errors: that of a token's
        last hidden state, softmax - onehot through the head. It is evaluated once a step.
      memory: steps that the averages reach back.
      ridge: of the regression, relative to the mean square of the output's error.

    Raises:
      ValueError: an argument is out of range, or as `activation_gradient`.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> params, x = {"w": jnp.ones((3, 2))}, jax.random.normal(jax.random.key(1), (4, 8, 3))
    >>> losses = lambda params, x: jnp.sum((x @ params["w"]) ** 2, axis=-1)
    >>> error_fn = lambda params, x: 2 * x @ params["w"]
    >>> feedback = zo_jax.activation_feedback(losses, error_fn, params, x)
    >>> estimate = jax.jit(lambda key, feedback: zo_jax.activation_gradient(
    ...     losses, params, key, x, num_draws=4, discount=0.0, feedback=feedback))
    >>> spread = lambda feedback: jnp.std(jnp.stack(
    ...     [estimate(jax.random.key(i), feedback).gradient["w"] for i in range(8)]), axis=0).mean()
    >>> before = spread(feedback)
    >>> for i in range(50):
    ...     feedback = estimate(jax.random.key(100 + i), feedback).feedback
    >>> bool(spread(feedback) < 0.3 * before)
    True
    """
    check_feedback(memory, ridge)
    whole = as_arrays(params)
    _, _, _, found = _trace(token_loss_fn, whole, batch, exact)
    read = lambda params, *batch: output_error(error_fn, params, batch, found.tokens)
    E = jax.eval_shape(read, whole, *batch).shape[-1]
    of_token = lambda s: (*s.shape[: s.loops], *s.shape[s.loops + 2 :])
    products = [jnp.zeros((*of_token(site), E), jnp.float32) for site in found.sites]
    # Each an array of its own, for they may be donated.
    start = _zeros(E, E), products, _zeros(len(products)), _zeros(len(products))
    return ActivationFeedback(*start, error_fn, float(memory), float(ridge))


class ActivationState(NamedTuple):
    """State of `activation_zeroth_order`.

    Attributes:
      key: uint32 [2], the words of the key that was given; that of a step is `fold_in(key, count)`.
      count: int32, steps taken.
      loss: float32, of the last step (inf before the first).
      feedback: what it has learned, if one was given.
    """

    key: jax.Array
    count: jax.Array
    loss: jax.Array
    feedback: Any = None


def activation_zeroth_order(
    key: jax.Array, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates by an `activation_gradient`: the first link of an optax chain.

    `update(updates, state, params, value_fn=..., batch=())` takes the losses of all tokens from
    `value_fn(params, *batch)`; the updates may be None.

    Args:
      key: a PRNG key of the threefry implementation.
      **options: of `activation_gradient`; a `feedback` is what it begins with.

    Raises:
      ValueError: as `activation_gradient`; or, from `update`, `params` or `value_fn` is missing.

    >>> import jax, jax.numpy as jnp, optax, zo_jax
    >>> losses = lambda w: jnp.sum((jnp.ones((1, 4, 3)) @ w - 1) ** 2, axis=-1)
    >>> tx = optax.chain(zo_jax.activation_zeroth_order(jax.random.key(0)), optax.sgd(0.05))
    >>> w = jnp.zeros((3, 2))
    >>> state = tx.init(w)
    >>> for _ in range(40):
    ...     updates, state = tx.update(None, state, w, value_fn=losses)
    ...     w = optax.apply_updates(w, updates)
    >>> bool(jnp.mean(losses(w)) < 1e-2)
    True
    """
    words = key_words(typed_key(key))
    feedback = options.pop("feedback", None)

    def init_fn(params: Any) -> ActivationState:
        del params
        loss = jnp.full((), jnp.inf, jnp.float32)
        # Of its own, for a state may be donated.
        learned = jax.tree.map(jnp.copy, feedback)
        return ActivationState(own_words(words), jnp.zeros((), jnp.int32), loss, learned)

    def update_fn(updates, state, params=None, *, value_fn=None, batch=(), **extra_args):
        del updates, extra_args
        if params is None or value_fn is None:
            raise ValueError(
                "activation_zeroth_order evaluates the losses itself: pass params and value_fn to "
                "update, as tx.update(None, state, params, value_fn=losses_of_tokens)"
            )
        step_key = jax.random.fold_in(typed_key(state.key), state.count)
        own = options if state.feedback is None else {**options, "feedback": state.feedback}
        estimate = activation_gradient(value_fn, params, step_key, *batch, **own)
        count = jnp.asarray(optax.safe_increment(state.count))
        new = ActivationState(state.key, count, estimate.loss, estimate.feedback)
        return estimate.gradient, new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check(num_draws: int, sigma: float, discount: float) -> None:
    if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 1:
        raise ValueError(f"num_draws must be an integer of at least 1, got {num_draws!r}")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be finite and above 0, got {sigma!r}")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be from 0 to 1, got {discount!r}")


class _Clean(NamedTuple):
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


def _evaluate(token_loss_fn: Any, whole: Any, batch: Any, exact: Any) -> _Clean:
    parts, noisy, evaluate, found = _trace(token_loss_fn, whole, batch, exact)
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
    return _Clean(found.sites, losses_BT, losses_with, gradient_of)


def _trace(token_loss_fn, params, batch, exact):
    """(the two parts or None, what has noise, its evaluation, its sites)."""
    parts, losses_of, noisy = None, token_loss_fn, params
    if exact is not None:
        parts = exactly.split(exact, params)
        noisy, losses_of = parts.rest.select(params), loss_of(parts.rest, token_loss_fn, params)
    evaluate, found = trace_tokens(losses_of, noisy, batch)
    _check_covered(found.uncovered, noisy, found.tokens)
    return parts, noisy, evaluate, found


def _check_fits(feedback: ActivationFeedback, sites: list[Any]) -> None:
    there = [x.shape[:-1] for x in feedback.products]
    here = [(*s.shape[: s.loops], *s.shape[s.loops + 2 :]) for s in sites]
    if there != here:
        raise ValueError(
            f"feedback was made for {len(there)} places {there}, and the losses have {len(here)} "
            f"{here}; make it by activation_feedback of the same losses, parameters and exact"
        )


def _check_covered(uncovered: set[int], params: Any, tokens: tuple[int, ...]) -> None:
    if uncovered:
        paths = [p for p, x in jax.tree.leaves_with_path(params) if is_floating(x)]
        names = ", ".join(path_name(paths[i]) or "params" for i in sorted(uncovered))
        raise ValueError(
            f"parameters must act linearly on activations {list(tokens)} + [...], but {names} are "
            "used in another way too; name them in exact"
        )


def _errors(losses_with, sites, sigma, key, num_draws, discount, guess):
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
        of_sites = [_by_token(a * p, s) for a, p, s in zip(draws, predicted, sites, strict=False)]
        expected_SBT = jnp.stack(of_sites) if of_sites else _zeros(0, *change_BT.shape)
        change_BT -= jnp.einsum("s,sbt->bt", weights, expected_SBT)
        credit_BT = jnp.where(is_finite, _discounted(change_BT, discount), 0)
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


def _zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def _discounted(x_BT: jax.Array, discount: float) -> jax.Array:
    """Σ_{u >= t} discount^(u - t) x_u."""
    T = x_BT.shape[1]
    ahead_TT = jnp.arange(T)[None] - jnp.arange(T)[:, None]
    weight_TT = jnp.where(ahead_TT >= 0, jnp.float32(discount) ** jnp.maximum(ahead_TT, 0), 0)
    return jnp.einsum("tu,bu->bt", weight_TT, x_BT)


def _by_token(values: jax.Array, site: Any) -> jax.Array:
    """The sum of a site's values over all but the tokens, [B, T]."""
    own = (site.loops, site.loops + 1)
    return jnp.sum(values, axis=[i for i in range(values.ndim) if i not in own])


def _along(credit_BT: jax.Array, site: Any) -> jax.Array:
    """The credit of tokens, shaped to go with a site's values."""
    first, last = site.loops, len(site.shape)
    return lax.expand_dims(credit_BT, (*range(first), *range(first + 2, last)))
