import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax.train.config import ModelConfig
from zo_jax.train.model import SIZES, make_model


@pytest.mark.parametrize(
    "size, count",
    [("gpt2", 124439808), ("gpt2-medium", 354823168), ("gpt2-large", 774030080)],
)
def test_gpt2_sizes_have_the_published_parameter_counts(size, count):
    assert make_model(ModelConfig(size=size), 50257).num_params == count


@pytest.mark.parametrize(
    "size, label", [("20M", 20e6), ("200M", 200e6), ("500M", 500e6), ("1B", 1e9)]
)
def test_labels_are_within_five_percent(size, label):
    assert abs(make_model(ModelConfig(size=size), 50257).num_params / label - 1) < 0.05
    assert SIZES[size].width % SIZES[size].num_heads == 0


def test_count_is_that_of_the_arrays(tiny_config):
    model = make_model(tiny_config.model, 11)
    params = model.fresh(jax.random.key(0))
    assert model.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("position", [1, 4, 7])
def test_causal(tiny_config, position):
    model = make_model(tiny_config.model, 11)
    params = model.fresh(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 11, (2, 8)).astype(np.int32)
    changed = tokens.copy()
    changed[:, position] = (tokens[:, position] + 1) % 11
    hidden = model.hidden(params, tokens)
    other = model.hidden(params, changed)
    np.testing.assert_array_equal(hidden[:, :position], other[:, :position])
    assert jnp.all(jnp.any(hidden[:, position:] != other[:, position:], axis=-1))


def test_dtypes(tiny_config):
    tiny_config.model.param_dtype = tiny_config.model.compute_dtype = "bfloat16"
    model = make_model(tiny_config.model, 11)
    params = model.fresh(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert model.hidden(params, jnp.zeros((1, 4), jnp.int32)).dtype == jnp.bfloat16
