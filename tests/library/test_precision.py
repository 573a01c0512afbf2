"""bfloat16 inside the loss, or in the parameters: the estimate is that of float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax import estimators, gaussian, low_rank, rademacher
from zo_jax.train.config import ModelConfig
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model


@functools.cache
def make(param_dtype, compute_dtype, family):
    """A model and an estimator of its gradient."""
    config = ModelConfig(
        num_layers=2,
        num_heads=2,
        width=32,
        context_length=16,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )
    model = make_model(config, 61)
    tokens = np.random.default_rng(1).integers(0, 61, (4, 17)).astype(np.int32)
    estimate = jax.jit(
        lambda p: estimators.estimate_gradient(
            lambda p, t: next_token_loss(model, p, t),
            p,
            jax.random.key(1),
            tokens,
            num_queries=16,
            epsilon=1e-2,
            perturbation=family,
        )
    )
    return model, estimate


def estimate(param_dtype, compute_dtype, params, family):
    model, estimate_of = make(param_dtype, compute_dtype, family)
    params = params or model.fresh(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(param_dtype), params)
    result = estimate_of(params)
    assert result.loss.dtype == result.projections.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(result.gradient)} == {jnp.dtype(param_dtype)}
    return params, np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(result.gradient)])


@pytest.mark.parametrize(
    "family", [rademacher(), gaussian(), low_rank(1)], ids=lambda f: type(f).__name__
)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_equals_float32(param_dtype, family):
    params, half = estimate(param_dtype, "bfloat16", None, family)
    _, full = estimate("float32", "float32", params, family)
    assert half @ full / np.linalg.norm(half) / np.linalg.norm(full) > 0.99
