import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax import families, rounding
from zo_jax.fingerprint import fingerprint
from zo_jax.train import choices, run_state, steps
from zo_jax.train.config import ConfigError
from zo_jax.train.data import batches
from zo_jax.train.model import make_model
from zo_jax.train.run import make_layout
from zo_jax.train.validation import check_possible, validate


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_is_unbiased(dtype):
    rng = np.random.default_rng(0)
    n = 200_000
    p = jnp.asarray(rng.normal(size=8), dtype)
    u = jnp.asarray(rng.normal(size=8) * 1e-4, jnp.float32)
    exact = np.float64(p) + np.float64(u)
    params, moves = jnp.tile(p[:, None], (1, n)), jnp.tile(u[:, None], (1, n))
    rounded = jax.jit(rounding.apply)({"w": params}, {"w": moves}, jax.random.key(1))["w"]
    assert rounded.dtype == dtype
    got = np.float64(rounded)
    # Only the two neighbours occur, and the mean is exact to 5 standard errors and the 2⁻¹⁶ of the
    # random bits.
    spread = got.std(axis=1)
    gap = got.max(axis=1) - got.min(axis=1)
    assert all(len(set(row)) <= 2 for row in got)
    np.testing.assert_array_less(
        np.abs(got.mean(axis=1) - exact), 5 * spread / np.sqrt(n) + gap * 2**-15 + 1e-12
    )
    nearest = rounding.apply({"w": p}, {"w": u}, jax.random.key(1), "nearest")["w"]
    np.testing.assert_array_equal(nearest, jnp.asarray(np.float32(p) + np.float32(u), dtype))


def test_rounding_leaves_what_is_exact_and_what_is_not_finite():
    p = jnp.array([1.0, -2.0, jnp.inf, jnp.nan, 3e38], jnp.bfloat16)
    out = rounding.apply({"w": p}, {"w": jnp.zeros(5)}, jax.random.key(0))["w"]
    np.testing.assert_array_equal(np.float32(out), np.float32(p))
    full = jnp.array([0.1], jnp.float32)
    out = rounding.apply({"w": full}, {"w": full * 1e-3}, jax.random.key(0))["w"]
    assert out == full + full * 1e-3


def test_small_updates_stall_to_nearest_and_not_stochastically():
    """Gradient descent on a quadratic, whose steps are below half the spacing of bfloat16 near
    1.
    """

    def descend(way):
        def step(p, key):
            move = -2e-3 * (p.astype(jnp.float32) - 1.5)
            return rounding.apply({"w": p}, {"w": move}, key, way)["w"], None

        keys = jax.random.split(jax.random.key(0), 700)
        end, _ = jax.jit(lambda p: jax.lax.scan(step, p, keys))(jnp.ones(256, jnp.bfloat16))
        return float(jnp.mean(end.astype(jnp.float32)))

    assert descend("nearest") == 1.0
    # Exactly, the distance to 1.5 shrinks by 0.998 a step: 0.5 * 0.998^700 = 0.123.
    np.testing.assert_allclose(1.5 - descend("stochastic"), 0.123, atol=0.01)


@pytest.mark.parametrize("family", ["rademacher", "gaussian", "sphere", "low_rank"])
@pytest.mark.parametrize("q", [1, 5, 11])
def test_norm_without_a_pass_over_the_sum(family, q):
    rng = np.random.default_rng(q)
    params = {
        "kernel": jnp.zeros((3, 20, 37)),
        "bias": jnp.zeros(7),
        "scalar": jnp.zeros(()),
        "none": None,
        "count": jnp.zeros((), jnp.int32),
    }
    keys = jax.random.split(jax.random.key(q), q)
    weights = jnp.asarray(rng.normal(size=q), jnp.float32)
    total, norm = jax.jit(lambda w: families.by_name(family, 2).combine_with_norm(params, keys, w))(
        weights
    )
    exact = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(total)))
    np.testing.assert_allclose(norm, exact, rtol=1e-5)


@pytest.mark.slow
# Both with the steps of zo.
@pytest.mark.parametrize("mode, dtype", [("calibrate", "bfloat16"), ("instruct", "float16")])
def test_half_precision_in_every_mode(tiny_config, mode, dtype):
    tiny_config.mode, tiny_config.scope = mode, "^(wte|ln_f|blocks/0/fc)/"  # one of each kind
    tiny_config.model.param_dtype = tiny_config.model.compute_dtype = dtype
    tiny_config.zo.epsilon = 1e-2
    tiny_config.fo.bp_interval = 2
    check_possible(tiny_config)
    corpus = batches.load_corpora(tiny_config)
    model = make_model(tiny_config.model, corpus.tokenizer.vocab_size)
    state = run_state.init_state(tiny_config, model)
    before = jax.tree.map(np.array, state.params)
    train_step = steps.make_train_step(tiny_config, model)
    for step in range(2):
        read = batches.read_batches(tiny_config, corpus.train_NT, step)
        state, info, _ = train_step(state, step, *read)
    assert np.isfinite(info.loss) and int(state.train.num_skipped) == 0
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    # Moments are float32 whatever the parameters are.
    moments = [x for x in jax.tree.leaves(state.train.opt_state) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}
    assert not np.array_equal(before["wte"]["embedding"], state.params["wte"]["embedding"])


def test_epsilon_that_float16_cannot_hold(tiny_config):
    tiny_config.model.param_dtype, tiny_config.zo.epsilon = "float16", 1e-5
    with pytest.raises(ConfigError, match="underflows in float16"):
        validate(tiny_config)


def test_checkpointed_activations_change_no_gradient(tiny_config):
    tiny_config.mode, tiny_config.model.num_layers = "fo", 3
    tiny_config.optimizer.name = "sgd"
    results = []
    for checkpointed in (False, True):
        tiny_config.model.checkpoint_activations = checkpointed
        corpus = batches.load_corpora(tiny_config)
        model = make_model(tiny_config.model, corpus.tokenizer.vocab_size)
        state = run_state.init_state(tiny_config, model)
        _, tokens = batches.read_batches(tiny_config, corpus.train_NT, 0)
        state, _ = steps.make_fo_step(tiny_config, model)(state, tokens)
        results.append(jax.tree.map(np.array, state.params))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_chunks_of_a_batch_change_no_projection_and_save_memory(tiny_config):
    tiny_config.train.batch_size, tiny_config.zo.epsilon = 64, 1e-2
    tiny_config.model.width, tiny_config.model.num_layers = 32, 2
    results, needs = [], []
    for chunks in (1, 16):
        tiny_config.zo.batch_chunks = chunks
        corpus = batches.load_corpora(tiny_config)
        model = make_model(tiny_config.model, corpus.tokenizer.vocab_size)
        state = run_state.init_state(tiny_config, model)
        tokens, _ = batches.read_batches(tiny_config, corpus.train_NT, 0)
        args = state.params, choices.base_key(tiny_config), tokens
        project = steps.make_project(tiny_config, model)
        results.append(project(*args))
        needs.append(project.lower(*args).compile().memory_analysis().temp_size_in_bytes)
    np.testing.assert_allclose(*(loss for loss, _ in results), rtol=1e-6)
    np.testing.assert_allclose(*(c for _, c in results), rtol=1e-2, atol=1e-3)
    assert needs[1] < needs[0] / 2
    tiny_config.zo.batch_chunks = 3
    with pytest.raises(ConfigError, match=r"divisible by zo.batch_chunks; got 64 and 3"):
        validate(tiny_config)


def test_fingerprint_notices_every_bit():
    rng = np.random.default_rng(0)
    tree = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "c": np.arange(6, dtype=np.int32),
        "d": np.array([True, False]),
    }
    first = int(fingerprint(tree))
    assert first == int(fingerprint(jax.tree.map(jnp.asarray, tree)))
    for bit in range(32):
        other = tree["a"].copy()
        other.view(np.uint32)[1, 2] ^= np.uint32(1 << bit)
        assert int(fingerprint(tree | {"a": other})) != first
    swapped = tree["a"].copy()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    assert int(fingerprint(tree | {"a": swapped})) != first
    assert int(fingerprint(tree | {"d": np.array([False, True])})) != first


def test_one_device_has_no_layout(tiny_config):
    assert make_layout(tiny_config, None) is None
    tiny_config.mesh.query = 2
    with pytest.raises(ConfigError, match="multiply to the 1 devices; got query=2"):
        make_layout(tiny_config, None)
