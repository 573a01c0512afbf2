"""Modes feedback and block_local: the error of the output, known in closed form, is handed to every
block as its own.

A block adds to the residual stream what the blocks above read and write. If these changed little,
the error of the stream's end would be the error of every block's output: residual feedback takes it
so. It is exact for the last block alone, and biased below.
Relatives: feedback alignment (Lillicrap et al., 2016) and its direct form (Nøkland, 2016), which
hand errors down by random matrices. Axes: B blocks, T tokens, C width of the residual stream, L
layers.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.local import by_differences
from zo_jax.models.layers import AS_IT_IS, CHECKPOINTED, Around
from zo_jax.train.config import Config, FeedbackConfig
from zo_jax.train.model import GPT, Block
from zo_jax.train.sublayers import (
    attend,
    attend_gradient,
    feed_forward,
    feed_forward_gradient,
    output,
)

# (params, key, tokens [B, T]) -> (loss, gradient of all parameters).
Gradient = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


def make_gradient(config: Config, model: GPT) -> Gradient:
    """What a step of the configured mode takes for the gradient: (params, key, tokens [B, T]) ->
    (loss, gradient).

    With e = d loss / d (end of the residual stream), every block takes e, or e times a fixed random
    matrix, as the error of its output. Mode feedback evaluates attention and MLP alone, to find the
    error of what lies inside them and, unless every sublayer takes e, of what goes in; it has no
    derivative but closed forms of single layers. Mode block_local differentiates every block by
    itself (`jax.vjp`), the first together with the embeddings. Neither hands an error from one
    block to the next.

    Args:
      config: validated; its section `feedback` says how.
      model: the decoder; in mode feedback of float32.

    Returns:
      A function of the parameters, a key (of the draws; unused without them) and int32 tokens [B,
      T], whose gradient is like the parameters: exact for the head and, but for draws and
      differences, the last block (of sublayers that all take e, its MLP alone); biased below.
    """
    make = {"feedback": _make_feedback, "block_local": _make_block_local}[config.mode]
    return make(config, model)


def _make_feedback(config: Config, model: GPT) -> Gradient:
    error_at, options = _make_error_at(config, model.num_layers), config.feedback
    by_blocks = options.handed_to == "blocks" and options.errors == "all"

    def error_of(site: Any, output_BTC: jax.Array, found_BTC: jax.Array) -> jax.Array:
        """Of a site inside a block: what was found there, or the output's."""
        return found_BTC if by_blocks else error_at(output_BTC, site)

    def gradient(params: Any, key: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, Any]:
        inputs_BT = tokens_BT[:, :-1]

        def forward(x_BTC, block):
            middle_BTC = x_BTC + attend(block, x_BTC, model.num_heads)
            return middle_BTC + feed_forward(block, middle_BTC), (x_BTC, middle_BTC)

        x_BTC, kept = jax.lax.scan(forward, embed(params, inputs_BT), params["blocks"])
        end = output(params["ln_f"], model.head(params), x_BTC, tokens_BT[:, 1:])

        def of_block(_, args):
            layer, block, (x_BTC, middle_BTC) = args
            error_BTC = error_at(end.error_BTC, 2 * layer + 2)
            own, more_BTC = feed_forward_gradient(block, middle_BTC, error_BTC, options)
            error_BTC = error_of(2 * layer + 1, end.error_BTC, error_BTC + more_BTC)
            own_key = jax.random.fold_in(key, layer)
            others, more_BTC = attend_gradient(
                block, x_BTC, error_BTC, own_key, model.num_heads, options
            )
            return error_BTC + more_BTC, own | others

        # From the last block to the first, whose error alone goes on, to the embeddings.
        layers = jnp.arange(model.num_layers), params["blocks"], kept
        below_BTC, blocks = jax.lax.scan(of_block, end.error_BTC, layers, reverse=True)
        gradient = {"blocks": blocks, "ln_f": end.norm}
        first_BTC = error_of(0, end.error_BTC, below_BTC)
        gradient |= _embeddings_gradient(params, inputs_BT, first_BTC)
        return end.loss, _add_head(gradient, end.head_VC, model.tied_head)

    return gradient


def _make_block_local(config: Config, model: GPT) -> Gradient:
    error_at = _make_error_at(config, model.num_layers)
    block = Block(model.num_layers, model.num_heads, model.dtype, model.param_dtype)
    apply = lambda params, x_BTC: block.apply({"params": params}, x_BTC)[0]

    def gradient(params: Any, key: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, Any]:
        inputs_BT = tokens_BT[:, :-1]
        forward = lambda x_BTC, block: (apply(block, x_BTC), x_BTC)
        x_BTC, kept = jax.lax.scan(forward, embed(params, inputs_BT), params["blocks"])
        end = output(params["ln_f"], model.head(params), x_BTC, tokens_BT[:, 1:])

        def of_block(_, args):
            layer, block, x_BTC = args
            _, derivative = jax.vjp(apply, block, x_BTC)
            return derivative(error_at(end.error_BTC, 2 * layer + 2))[::-1]

        layers = jnp.arange(model.num_layers), params["blocks"], kept
        below_BTC, blocks = jax.lax.scan(of_block, end.error_BTC, layers, reverse=True)
        gradient = {"blocks": blocks, "ln_f": end.norm}
        gradient |= _embeddings_gradient(params, inputs_BT, below_BTC)
        return end.loss, _add_head(gradient, end.head_VC, model.tied_head)

    return gradient


def make_around(config: Config, num_layers: int) -> Around:
    """What the layers of a pretrained model and their parts are evaluated in, for backprop to go
    the way of residual feedback: what it hands a layer is the error of the output, which below that
    layer goes on beside it; the first layer hands the embeddings its own. In mode feedback the
    units of an MLP have differences in the place of a derivative, so that what is left of
    derivatives are closed forms of single layers.

    Values stay what they are, to the bit; of a layer backprop keeps the input alone.

    Args:
      config: validated; its section `feedback` says how.
      num_layers: of the model.
    """
    error_at, options = _make_error_at(config, num_layers), config.feedback

    @jax.custom_vjp
    def at_site(y_BTC: jax.Array, site: jax.Array) -> jax.Array:
        """Itself, and backwards the error of a site."""
        del site
        return y_BTC

    at_site.defvjp(
        lambda y_BTC, site: (y_BTC, site),
        lambda site, error_BTC: (error_at(error_BTC, site).astype(error_BTC.dtype), None),
    )

    def of_layer(layer: Callable[..., Any]) -> Callable[..., Any]:
        layer = CHECKPOINTED.layer(layer)

        def handed(carry: Any, slices: Any) -> Any:
            (x_BTC, cache), i = carry, slices[-1]
            # The first layer is differentiated together with the embeddings.
            still_BTC = jnp.where(i == 0, x_BTC, jax.lax.stop_gradient(x_BTC))
            y_BTC, cache = layer((still_BTC, cache), slices)
            if options.errors == "last":  # and nothing goes on
                return (y_BTC, cache)
            if options.matrix == "random":
                y_BTC = at_site(y_BTC, 2 * i + 2)
            return y_BTC + (x_BTC - still_BTC), cache

        return handed

    if config.mode == "block_local":
        return Around(of_layer)
    of_attention = _without_error if options.attention == "none" else AS_IT_IS.attend
    return Around(of_layer, functools.partial(by_differences, size=options.sigma), of_attention)


def _without_error(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function, which hands nothing backwards."""
    return lambda *args: jax.lax.stop_gradient(function(*args))


def embed(params: Any, tokens_BT: jax.Array) -> jax.Array:
    """The residual stream before the first block."""
    positions_TC = params["wpe"]["embedding"][: tokens_BT.shape[1]]
    return params["wte"]["embedding"][tokens_BT] + positions_TC[None]


def _embeddings_gradient(params: Any, tokens_BT: jax.Array, error_BTC: jax.Array) -> dict[str, Any]:
    """The error scattered by token, and summed by position."""
    zeros = jax.tree.map(jnp.zeros_like, {name: params[name] for name in ("wte", "wpe")})
    wte_VC, wpe_TC = zeros["wte"]["embedding"], zeros["wpe"]["embedding"]
    return {
        "wte": {"embedding": wte_VC.at[tokens_BT].add(error_BTC)},
        "wpe": {"embedding": wpe_TC.at[: tokens_BT.shape[1]].add(jnp.sum(error_BTC, axis=0))},
    }


def _add_head(gradient: Any, head_VC: jax.Array, tied: bool) -> Any:
    if not tied:
        return gradient | {"head": {"embedding": head_VC}}
    return gradient | {"wte": {"embedding": gradient["wte"]["embedding"] + head_VC}}


def _make_error_at(config: Config, num_layers: int) -> Callable[[jax.Array, Any], jax.Array]:
    """(output error, site) -> error of a site: 0 the embeddings, 2 l + 1 the attention and 2 l + 2
    the MLP of layer l, which is that of the block.
    """
    feedback: FeedbackConfig = config.feedback
    last = 2 * num_layers

    def error_at(error_BTC: jax.Array, site: Any) -> jax.Array:
        if feedback.errors == "last":
            return jnp.where(site == last, error_BTC, 0)
        if feedback.matrix == "identity":
            return error_BTC
        # Of the run, not of a step: feedback stays what it is.
        key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), 2**31 + 2)
        C = error_BTC.shape[-1]
        matrix_CC = jax.random.normal(jax.random.fold_in(key, site), (C, C)) / jnp.sqrt(C)
        # The last site's error is known.
        return jnp.where(site == last, error_BTC, error_BTC @ matrix_CC)

    return error_at
