"""Sums over large leaves block by block of rows, and updates that go entry by entry there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo_jax
from zo_jax import families, row_sums, spans

SHAPES = {"stack": (3, 51, 333), "matrix": (107, 129), "bias": (7,)}


@pytest.fixture
def small_blocks(monkeypatch):
    """Leaves of a test as large ones, of many blocks and a rest."""
    monkeypatch.setattr(row_sums, "_BLOCK_ENTRIES", 4000)
    monkeypatch.setattr(spans, "_LARGE_WORDS", 100)
    monkeypatch.setattr(spans, "_LARGE_ENTRIES", 10_000)


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}
    return params | {"count": jnp.arange(3)}


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
@pytest.mark.parametrize("q", [2, 11])
def test_sum_in_blocks_is_that_of_the_directions(family, q, small_blocks):
    family, params, keys = (
        families.by_name(family),
        make_params(),
        jax.random.split(jax.random.key(1), q),
    )
    weights = jnp.linspace(-1, 2, q)
    assert {type(x) for x in family.sums(params, keys, weights)[0]} >= {row_sums.RowSum}
    total = jax.jit(family.add)(params, keys, weights)

    @jax.jit
    def moved(key):
        far = family.perturb(params, key, 1.0)
        return jax.tree.map(lambda x: x.form() if hasattr(x, "form") else x, far,
                            is_leaf=lambda x: hasattr(x, "form"))  # fmt: skip

    exact = {name: np.float64(params[name]) for name in SHAPES}
    for key, weight in zip(keys, weights, strict=True):
        far = moved(key)
        for name in SHAPES:
            exact[name] += float(weight) * (np.float64(far[name]) - np.float64(params[name]))
    for name in SHAPES:
        np.testing.assert_allclose(total[name], exact[name], atol=2e-5)
    np.testing.assert_array_equal(total["count"], params["count"])


@pytest.mark.parametrize("family", ["rademacher", "gaussian", "low_rank"])
def test_layers_written_out_over_several_draws(family, monkeypatch):
    """Layers that are alike share programs, wherever in the stream, and in which draw, they are."""
    monkeypatch.setattr(spans, "_WORDS_AT_ONCE", 64)
    family, rng = families.by_name(family, rank=2), np.random.default_rng(0)
    shapes = {"kernel": (17, 40), "stack": (2, 9, 11), "bias": (33,), "scalar": ()}
    layer = lambda: {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    params = [layer() for _ in range(7)]
    keys, weights = jax.random.split(jax.random.key(1), 3), jnp.array([0.5, -2.0, 1.0])
    total = jax.jit(family.combine)(params, keys, weights)
    form = lambda x: x.form() if hasattr(x, "form") else x
    zeros = jax.tree.map(jnp.zeros_like, params)
    expected = jax.tree.map(np.zeros_like, params)
    for key, weight in zip(keys, weights, strict=True):
        z = jax.tree.map(
            form, family.perturb(zeros, key, 1.0), is_leaf=lambda x: hasattr(x, "form")
        )
        expected = jax.tree.map(lambda a, b, w=weight: a + np.asarray(w * b), expected, z)
    for x, y in zip(jax.tree.leaves(total), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


OPTIMIZERS = {
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "adamw": optax.adamw(optax.linear_schedule(1e-2, 1e-3, 9), weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "orthogonalized": zo_jax.mudamw(1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_update_in_blocks_is_the_update(name, dtype, small_blocks):
    if name == "orthogonalized" and dtype == jnp.bfloat16:
        pytest.skip("the same path as in float32")
    update, family = zo_jax.Update(OPTIMIZERS[name]), zo_jax.rademacher()
    state, key, loss = update.init(make_params(dtype)), jax.random.key(1), jnp.float32(2)
    in_blocks = jax.jit(lambda state, c: update.from_projections(family, state, key, loss, c))

    @jax.jit
    def whole(state, c):
        trained = {name: state.params[name].astype(jnp.float32) for name in SHAPES}
        weights = zo_jax.mean_weights(c)
        gradient = family.combine(trained, jax.random.split(key, len(c)), weights)
        return update.from_gradient(state, key, loss, gradient | {"count": None})

    c = jnp.array([0.5, jnp.nan, -2.0])
    for _ in range(2):
        state, metrics = in_blocks(state, c)
    expected = update.init(make_params(dtype))
    for _ in range(2):
        expected, plain_metrics = whole(expected, c)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, plain_metrics.grad_norm, rtol=1e-5)
    unchanged, metrics = in_blocks(state, c * jnp.nan)
    for x, y in zip(jax.tree.leaves(unchanged[1:3]), jax.tree.leaves(state[1:3]), strict=True):
        np.testing.assert_array_equal(x, y)
    assert int(metrics.num_skipped) == 1


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
def test_adam_needs_no_gradient_and_no_words(family):
    """Of a leaf of 64 MB neither exists whole."""
    update = zo_jax.Update(optax.adam(1e-3))
    params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    state = jax.eval_shape(update.init, params)
    step = zo_jax.make_update(update.optimizer, families.by_name(family))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    c = jax.ShapeDtypeStruct((8,), jnp.float32)
    stats = step.lower(state, key, number, c).compile().memory_analysis()
    assert stats.alias_size_in_bytes >= 3 * 4 * 4096**2
    assert stats.temp_size_in_bytes < 16e6


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends write bfloat16")
def test_bfloat16_is_never_float32_as_a_whole():
    """XLA would convert the whole array for every block of rows."""
    shape = (1024, 1536)
    state = zo_jax.Update(optax.sgd(1e-2)).init(jnp.ones(shape, jnp.bfloat16))
    update = jax.jit(
        lambda *x: zo_jax.Update(optax.sgd(1e-2)).from_projections(zo_jax.rademacher(), *x)[0],
        donate_argnums=0,
    )
    text = update.lower(state, jax.random.key(0), jnp.float32(1), jnp.ones(2)).compile().as_text()
    assert f"u16[{shape[0]},{shape[1]}]" in text
    assert f"f32[{shape[0]},{shape[1]}]" not in text
