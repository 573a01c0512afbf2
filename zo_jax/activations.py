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
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zo_jax.activation_errors import evaluate_clean, find_errors, mean_errors, trace
from zo_jax.activation_feedback import ActivationFeedback, new_feedback, output_error
from zo_jax.estimators import positive_int, typed_key
from zo_jax.noise import key_words, own_words
from zo_jax.trees import Rule, Subset, as_arrays

_NUMBERS = ("num_draws", "sigma", "discount")


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
    clean = evaluate_clean(token_loss_fn, whole, batch, exact)
    guess, error_BTE = None, None
    if feedback is not None:
        feedback.check_fits(clean.sites)
        error_BTE = output_error(feedback.error_fn, whole, batch, clean.losses_BT.shape)
        is_usable = jnp.all(jnp.isfinite(error_BTE))
        error_BTE = jnp.where(is_usable, error_BTE, 0)
        guess = feedback.predict(error_BTE, clean.sites), feedback.weights
    errors, count, told = find_errors(
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
    clean = evaluate_clean(token_loss_fn, whole, batch, exact)
    errors = mean_errors(clean.losses_with, clean.sites, discount)
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
    whole = as_arrays(params)
    _, _, _, found = trace(token_loss_fn, whole, batch, exact)
    read = lambda params, *batch: output_error(error_fn, params, batch, found.tokens)
    E = jax.eval_shape(read, whole, *batch).shape[-1]
    return new_feedback(found.sites, E, error_fn, memory, ridge)


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
    known = inspect.signature(activation_gradient).parameters
    if unknown := options.keys() - known.keys():
        raise ValueError(f"options must be those of activation_gradient, got {min(unknown)!r}")
    _check(**{name: options.get(name, known[name].default) for name in _NUMBERS})

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
    positive_int("num_draws", num_draws)
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be finite and above 0, got {sigma!r}")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be from 0 to 1, got {discount!r}")
