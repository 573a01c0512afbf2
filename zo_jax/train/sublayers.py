"""The parts of the GPT as functions of arrays, each with the gradient of its parameters from the
error of its own output.

No part is differentiated with another: what leaves a part is the gradient of its parameters and the
error of its input. Linear maps and LayerNorm have it in closed form; attention and the MLP's units
as `credit.py` finds it. Axes: B blocks, T tokens, C width of the residual stream, H heads, D width
of a head, U units of the MLP, N tokens of all blocks, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zo_jax import credit
from zo_jax.train.config import FeedbackConfig
from zo_jax.train.losses import cross_entropy_gradient

_EPSILON = 1e-5
_gelu = functools.partial(jax.nn.gelu, approximate=True)


class Output(NamedTuple):
    """What the end of the model has to tell.

    Attributes:
      loss: mean cross-entropy, float32.
      error_BTC: its derivative by the last of the residual stream.
      norm: its gradient by the last LayerNorm's scale and bias.
      head_VC: its gradient by the output head.
    """

    loss: jax.Array
    error_BTC: jax.Array
    norm: Any
    head_VC: jax.Array


def attend(params: Any, x_BTC: jax.Array, num_heads: int) -> jax.Array:
    """What attention adds to the residual stream."""
    z_BTHD = credit.attention(*_qkv(params, _norm(params["ln_1"], x_BTC)[0], num_heads))
    return _linear(params["proj"], z_BTHD.reshape(x_BTC.shape))


def feed_forward(params: Any, x_BTC: jax.Array) -> jax.Array:
    """What the MLP adds to the residual stream."""
    h_BTC, _ = _norm(params["ln_2"], x_BTC)
    return _linear(params["fc_proj"], _gelu(_linear(params["fc"], h_BTC)))


def output(params: Any, head_VC: jax.Array, x_BTC: jax.Array, targets_BT: jax.Array) -> Output:
    """The loss, the output error and the gradient of the head, in closed form: softmax - onehot,
    through the head and the last LayerNorm.
    """
    h_BTC, normed_BTC = _norm(params, x_BTC)
    N, C = targets_BT.size, x_BTC.shape[-1]
    losses_N, d_hidden_NC, d_head_VC = cross_entropy_gradient(
        h_BTC.reshape(N, C), head_VC, targets_BT.reshape(N), 1 / N
    )
    d_h_BTC = d_hidden_NC.reshape(x_BTC.shape)
    error_BTC = _norm_error(params, x_BTC, normed_BTC, d_h_BTC)
    gradient = _norm_gradient(normed_BTC, d_h_BTC)
    return Output(jnp.sum(losses_N) / N, error_BTC, gradient, d_head_VC)


def attend_gradient(
    params: Any,
    x_BTC: jax.Array,
    error_BTC: jax.Array,
    key: jax.Array,
    num_heads: int,
    config: FeedbackConfig,
) -> tuple[dict[str, Any], jax.Array]:
    """From the error of what `attend` adds, the gradient of ln_1, qkv and proj, and the error of
    x_BTC through it.
    """
    B, T, C = x_BTC.shape
    h_BTC, normed_BTC = _norm(params["ln_1"], x_BTC)
    qkv = _qkv(params, h_BTC, num_heads)
    z_BTC = credit.attention(*qkv).reshape(x_BTC.shape)
    d_z_BTC = error_BTC @ params["proj"]["kernel"].T
    d_qkv = credit.attention_error(
        config.attention,
        qkv,
        d_z_BTC.reshape(B, T, num_heads, C // num_heads),
        key,
        num_draws=config.num_draws,
        size=config.sigma,
        discount=config.discount,
    )
    d_qkv_BTC = jnp.concatenate([d.reshape(B, T, C) for d in d_qkv], axis=-1)
    d_h_BTC = d_qkv_BTC @ params["qkv"]["kernel"].T
    gradient = {
        "ln_1": _norm_gradient(normed_BTC, d_h_BTC),
        "qkv": _linear_gradient(h_BTC, d_qkv_BTC),
        "proj": _linear_gradient(z_BTC, error_BTC),
    }
    return gradient, _norm_error(params["ln_1"], x_BTC, normed_BTC, d_h_BTC)


def feed_forward_gradient(
    params: Any, x_BTC: jax.Array, error_BTC: jax.Array, config: FeedbackConfig
) -> tuple[dict[str, Any], jax.Array]:
    """From the error of what `feed_forward` adds, the gradient of ln_2, fc and fc_proj, and the
    error of x_BTC through it.
    """
    h_BTC, normed_BTC = _norm(params["ln_2"], x_BTC)
    u_BTU = _linear(params["fc"], h_BTC)
    d_units_BTU = error_BTC @ params["fc_proj"]["kernel"].T
    d_u_BTU = credit.unit_error(_gelu, u_BTU, d_units_BTU, config.sigma)
    d_h_BTC = d_u_BTU @ params["fc"]["kernel"].T
    gradient = {
        "ln_2": _norm_gradient(normed_BTC, d_h_BTC),
        "fc": _linear_gradient(h_BTC, d_u_BTU),
        "fc_proj": _linear_gradient(_gelu(u_BTU), error_BTC),
    }
    return gradient, _norm_error(params["ln_2"], x_BTC, normed_BTC, d_h_BTC)


def _norm(params: Any, x_BTC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """LayerNorm, and what it is before scale and bias."""
    normed_BTC = (x_BTC - jnp.mean(x_BTC, axis=-1, keepdims=True)) * _inverse_deviation(x_BTC)
    return normed_BTC * params["scale"][None, None] + params["bias"][None, None], normed_BTC


def _inverse_deviation(x_BTC: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.var(x_BTC, axis=-1, keepdims=True) + _EPSILON)


def _norm_error(
    params: Any, x_BTC: jax.Array, normed_BTC: jax.Array, error_BTC: jax.Array
) -> jax.Array:
    """The error of what goes into LayerNorm, from that of what comes out."""
    d_normed_BTC = error_BTC * params["scale"][None, None]
    mean = lambda y_BTC: jnp.mean(y_BTC, axis=-1, keepdims=True)
    along_BT1 = mean(d_normed_BTC * normed_BTC)
    return (d_normed_BTC - mean(d_normed_BTC) - normed_BTC * along_BT1) * _inverse_deviation(x_BTC)


def _norm_gradient(normed_BTC: jax.Array, error_BTC: jax.Array) -> dict[str, jax.Array]:
    return {
        "scale": jnp.sum(normed_BTC * error_BTC, axis=(0, 1)),
        "bias": jnp.sum(error_BTC, axis=(0, 1)),
    }


def _linear(params: Any, x_BTC: jax.Array) -> jax.Array:
    return x_BTC @ params["kernel"] + params["bias"][None, None]


def _linear_gradient(inputs_BTC: jax.Array, error_BTU: jax.Array) -> dict[str, jax.Array]:
    return {
        "kernel": jnp.einsum("btc,btu->cu", inputs_BTC, error_BTU),
        "bias": jnp.sum(error_BTU, axis=(0, 1)),
    }


def _qkv(params: Any, h_BTC: jax.Array, num_heads: int) -> tuple[jax.Array, ...]:
    B, T, C = h_BTC.shape
    parts = jnp.split(_linear(params["qkv"], h_BTC), 3, axis=-1)
    return tuple(part.reshape(B, T, num_heads, C // num_heads) for part in parts)
