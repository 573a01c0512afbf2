"""Every difference × every family of directions through the same properties."""

import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo_jax
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import GPT

FAMILIES = {
    "rademacher": zo_jax.rademacher(),
    "gaussian": zo_jax.gaussian(),
    "sphere": zo_jax.sphere(),
    "low_rank_1": zo_jax.low_rank(1),
    "low_rank_2": zo_jax.low_rank(2),
}
DIFFERENCES = ("central", "forward", "jvp")
MODEL = GPT(vocab_size=97, num_layers=2, num_heads=2, width=32, context_length=16)

# These two go the ways of the others, and are left out of the fast tests.
SLOW = ("sphere", "low_rank_2")
families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, family in FAMILIES.items()
    ],
)
differences = pytest.mark.parametrize("difference", DIFFERENCES)
# The side of a forward difference is one of a central one, and a derivative goes the same way along
# all directions of a kind; `test_unbiased` goes through all pairs.
PAIRS = [
    *(("central", name) for name in FAMILIES),
    *(("forward", name) for name in ("rademacher", "low_rank_1")),
    *(("jvp", name) for name in ("rademacher", "gaussian", "low_rank_1")),
]


def gpt_loss(params, tokens):
    return next_token_loss(MODEL, params, tokens)


LOSS, GRADIENT = jax.jit(gpt_loss), jax.jit(jax.grad(gpt_loss))
DIRECTION = {name: jax.jit(family.direction) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def gpt():
    params = MODEL.fresh(jax.random.key(0))
    # Weights of ordinary size: with GPT-2's small initial ones a finite difference is far from the
    # derivative.
    params = jax.tree.map(lambda x: 4 * x, params)
    return params, jax.random.randint(jax.random.key(1), (3, 16), 0, 97)


def dot(a, b):
    products = jax.tree.map(lambda x, y: np.vdot(np.float64(x), np.float64(y)), a, b)
    return sum(jax.tree.leaves(products))


def shifted(params, z, scale):
    return jax.tree.map(lambda p, d: p + np.float32(scale) * d, params, z)


@pytest.mark.parametrize("difference, name", PAIRS)
def test_projections_equal_an_eager_recomputation(difference, name, gpt):
    (params, tokens), family = gpt, FAMILIES[name]
    key, epsilon, q = jax.random.key(5), 1e-2, 3
    estimate = jax.jit(
        lambda p, k, t: zo_jax.estimate_gradient(
            gpt_loss,
            p,
            k,
            t,
            num_queries=q,
            epsilon=epsilon,
            perturbation=family,
            difference=difference,
        )
    )(params, key, tokens)
    directions = [DIRECTION[name](params, k) for k in jax.random.split(key, q)]
    at = lambda z, scale: float(LOSS(shifted(params, z, scale), tokens))
    base = float(LOSS(params, tokens))
    if difference == "central":
        sides = [(at(z, epsilon), at(z, -epsilon)) for z in directions]
        expected = [(plus - minus) / (2 * epsilon) for plus, minus in sides]
        expected_loss = np.mean(sides)
    elif difference == "forward":
        expected, expected_loss = [(at(z, epsilon) - base) / epsilon for z in directions], base
    else:
        gradient = GRADIENT(params, tokens)
        expected, expected_loss = [dot(z, gradient) for z in directions], base
    # A loss of about 5 has float32 rounding of some 5e-7, divided by epsilon.
    np.testing.assert_allclose(estimate.projections, expected, rtol=1e-3, atol=5e-4)
    mean = jax.tree.map(
        lambda *z: sum(c / q * x for c, x in zip(np.array(estimate.projections), z, strict=True)),
        *directions,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), estimate.gradient, mean
    )
    np.testing.assert_allclose(estimate.loss, expected_loss, rtol=1e-5)
    assert estimate.num_failed == 0


@families
@differences
def test_unbiased(family, difference):
    """The mean over many queries is the gradient, within five standard errors."""
    params = {"w": jax.random.normal(jax.random.key(2), (5, 4)), "bias": jnp.ones(4)}
    x = jax.random.normal(jax.random.key(3), (5,))
    loss = lambda p: jnp.sum(jnp.tanh(x @ p["w"] + p["bias"]))
    q = 20_000
    estimate = jax.jit(
        lambda p: zo_jax.estimate_gradient(
            loss,
            p,
            jax.random.key(11),
            num_queries=q,
            perturbation=family,
            difference=difference,
            parallel_batch_size=q,
        )
    )(params)
    gradient = jax.grad(loss)(params)
    # Var(c zⱼ) ≤ E[c² zⱼ²] ≤ 3 ‖g‖² for entries of kurtosis 3 at most (‖g‖² + 2 gⱼ² for Gaussian
    # ones).
    error = np.sqrt(3 * dot(gradient, gradient) / q)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5 * error),
        estimate.gradient,
        gradient,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rademacher", "gaussian", "low_rank_1"])
def test_chunks_and_vmap_do_not_change_the_estimate(name, gpt):
    (params, tokens), family = gpt, FAMILIES[name]
    # An embedding and a matrix of every layer.
    part = {"wte": params["wte"], "fc": params["blocks"]["fc"]}
    whole = lambda p: params | {"wte": p["wte"], "blocks": params["blocks"] | {"fc": p["fc"]}}
    estimate = lambda batch_size: jax.jit(
        lambda k: zo_jax.project(
            lambda p, tokens: gpt_loss(whole(p), tokens),
            part,
            k,
            tokens,
            num_queries=5,
            epsilon=1e-2,
            perturbation=family,
            parallel_batch_size=batch_size,
        )
    )
    one_by_one, keys = estimate(1), jax.random.split(jax.random.key(9), 2)
    one = [one_by_one(key)[1] for key in keys]
    for batch_size in (2, 5):
        other = estimate(batch_size)(keys[0])
        np.testing.assert_allclose(one[0], other[1], rtol=1e-3, atol=3e-4)
    mapped = jax.vmap(one_by_one)(keys)
    np.testing.assert_allclose(mapped[1], one, rtol=1e-3, atol=3e-4)


@families
def test_batch_per_query(family):
    params = jnp.arange(6.0).reshape(2, 3)
    batch = jax.random.normal(jax.random.key(0), (4, 3))
    loss = lambda p, x: jnp.sum(p @ x)
    project = lambda params, batch: zo_jax.project(
        loss,
        params,
        jax.random.key(1),
        batch,
        num_queries=4,
        perturbation=family,
        difference="jvp",
        batch_per_query=True,
    )
    _, projections = jax.jit(project)(params, batch)
    keys = jax.random.split(jax.random.key(1), 4)
    direction = jax.jit(family.direction)
    expected = [loss(direction(params, k), x) for k, x in zip(keys, batch, strict=True)]
    np.testing.assert_allclose(projections, expected, rtol=1e-5, atol=1e-5)


@families
def test_fresh_noise_for_every_leaf_layer_and_query(family):
    params = {"a": jnp.zeros((3, 16, 16)), "b": jnp.zeros((16, 16)), "c": jnp.zeros((16, 16))}
    keys = jax.random.split(jax.random.key(0), 2)
    direction = jax.jit(family.direction)
    z0, z1 = (direction(params, k) for k in keys)
    tables = [*z0["a"], z0["b"], z0["c"], *z1["a"], z1["b"], z1["c"]]
    for i, x in enumerate(tables):
        for y in tables[:i]:
            # 256 products of unit variance (rank 1 of 16 + 16 signs: 16 · 16 dependent ones, at
            # most all equal).
            assert abs(float(jnp.mean(x * y))) < 0.95


@families
def test_apply_directions_is_params_plus_combine(family):
    params = {"stack": jnp.ones((3, 5, 7)), "w": jnp.ones((5, 7)), "b": jnp.ones(7)}
    keys, weights = jax.random.split(jax.random.key(4), 3), jnp.array([0.1, -0.2, 0.3])
    moved, total = jax.jit(
        lambda params: (
            zo_jax.apply_directions(params, keys, weights, family),
            family.combine(params, keys, weights),
        )
    )(params)
    jax.tree.map(
        lambda p, t, m: np.testing.assert_allclose(p + t, m, rtol=1e-5, atol=1e-6),
        params,
        total,
        moved,
    )


def test_a_query_that_fails_is_left_out_and_counted():
    loss = lambda p: jnp.where(p[0] > 0, jnp.nan, jnp.sum(p * jnp.array([1.0, 2.0, 3.0])))
    params, key = jnp.zeros(3), jax.random.key(0)
    estimate = zo_jax.estimate_gradient(loss, params, key, num_queries=8, difference="forward")
    keys = jax.random.split(key, 8)
    directions = np.array([DIRECTION["rademacher"](params, k) for k in keys])
    bad = directions[:, 0] > 0
    assert 0 < bad.sum() < 8
    assert estimate.num_failed == bad.sum()
    np.testing.assert_array_equal(np.isnan(estimate.projections), bad)
    expected = np.mean([np.dot(z, [1, 2, 3]) * z for z in directions[~bad]], axis=0)
    np.testing.assert_allclose(estimate.gradient, expected, rtol=1e-3)

    estimate = zo_jax.estimate_gradient(lambda p: jnp.sum(p) / 0, jnp.ones(3), key, num_queries=4)
    assert estimate.num_failed == 4
    np.testing.assert_array_equal(estimate.gradient, np.zeros(3))


def test_low_rank_is_never_formed_in_a_gpt(gpt):
    params, tokens = gpt
    with zo_jax.record_formed() as formed:
        jax.eval_shape(
            lambda: zo_jax.project(
                gpt_loss, params, jax.random.key(0), tokens, perturbation=zo_jax.low_rank(1)
            )
        )
    assert [f for f in formed if f.kind == "LowRank"] == []


def test_any_jax_code():
    """Convolution, cond, while_loop, checkpoint, custom_jvp and custom_vjp, integer leaves, mixed
    dtypes.
    """

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    def loss(p, x):
        image = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME")
        y = jax.nn.relu(image).mean((2, 3)) @ jax.checkpoint(jnp.tanh)(p["w"])
        y = jax.lax.cond(x[0, 0, 0, 0] > 0, lambda w: w[0] * y, lambda w: w[1] + y, p["pair"])
        y = jax.lax.while_loop(
            lambda s: s[0] < p["count"], lambda s: (s[0] + 1, s[1] * p["pair"][0]), (0, y)
        )[1]
        return jnp.sum(double(p["half"]).astype(jnp.float32)) + jnp.mean(y**2)

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "conv": jax.random.normal(keys[0], (4, 2, 3, 3)),
        "w": jax.random.normal(keys[1], (4, 4)),
        "pair": jnp.array([1.1, 0.9]),
        "half": jnp.ones(3, jnp.bfloat16),
        "count": jnp.int32(2),
    }
    x = jax.random.normal(keys[2], (1, 2, 5, 5))
    for name in [name for name in FAMILIES if name not in SLOW]:
        family = FAMILIES[name]

        @jax.jit
        def run(params, key, family=family):
            z = family.direction(params, key)
            moved = jax.tree.map(
                lambda p, d: (p + 1e-2 * d).astype(p.dtype) if p.dtype != jnp.int32 else p,
                params,
                z,
            )
            lazy = zo_jax.lazily(loss)(family.perturb(params, key, 1e-2), x)
            estimate = zo_jax.estimate_gradient(loss, params, key, x, perturbation=family)
            return lazy, loss(moved, x), estimate

        lazy, expected, estimate = run(params, keys[3])
        np.testing.assert_allclose(lazy, expected, rtol=1e-5, err_msg=name)
        assert estimate.gradient["count"] == 0
        assert jax.tree.map(jnp.dtype, estimate.gradient) == jax.tree.map(jnp.dtype, params)


def test_equinox_and_nnx():
    x = jax.random.normal(jax.random.key(1), (8, 3))
    mlp = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
    arrays, static = eqx.partition(mlp, eqx.is_inexact_array)
    eqx_loss = lambda p, x: jnp.mean(jax.vmap(eqx.combine(p, static))(x) ** 2)
    graph, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    nnx_loss = lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2)
    for loss, params, names in (
        (eqx_loss, arrays, ("rademacher", "sphere", "low_rank_1")),
        (nnx_loss, state, ("gaussian", "low_rank_2")),
    ):
        gradient = jax.jit(jax.grad(loss))(params, x)
        for name in names:
            family = FAMILIES[name]

            @jax.jit
            def run(params, key, loss=loss, family=family):
                options = dict(perturbation=family, difference="jvp")
                estimate = zo_jax.estimate_gradient(loss, params, key, x, **options)
                return estimate, family.direction(params, jax.random.split(key, 8)[0])

            estimate, z = run(params, jax.random.key(2))
            np.testing.assert_allclose(estimate.projections[0], dot(z, gradient), rtol=1e-4)
            assert jax.tree.structure(estimate.gradient) == jax.tree.structure(params)


def test_no_recompilation():
    estimate = jax.jit(
        lambda p, k: zo_jax.estimate_gradient(lambda w: jnp.sum(w**2), p, k, num_queries=2)
    )
    for i in range(3):
        estimate(jnp.ones((4, 4)) * i, jax.random.key(i))
    assert estimate._cache_size() == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_queries=0), "num_queries must be"),
        (dict(epsilon=0.0), "epsilon must be"),
        (dict(epsilon=float("nan")), "epsilon must be"),
        (dict(epsilon=1e-60), "epsilon must be"),
        (dict(parallel_batch_size=0), "parallel_batch_size must be"),
        (dict(difference="backward"), "difference must be one of"),
        (dict(params={}), "floating leaf"),
        (dict(params={"n": jnp.arange(3)}), "floating leaf"),
        (dict(loss_fn=lambda p: p), "floating scalar"),
        (dict(loss_fn=lambda p: jnp.int32(1)), "floating scalar"),
        (dict(key=jax.random.key(0, impl="rbg")), "threefry2x32"),
        (dict(key=jnp.ones(3)), "one PRNG key"),
        (dict(mesh=jax.make_mesh((1,), ("query",))), "axes must be Auto"),
        (dict(batch=(jnp.ones((3, 2)),), batch_per_query=True), "leading axis"),
    ],
)
def test_bad_input(kwargs, message):
    loss_fn = kwargs.pop("loss_fn", lambda p, *_: jnp.sum(p))
    params = kwargs.pop("params", jnp.ones(3))
    key = kwargs.pop("key", jax.random.key(0))
    batch = kwargs.pop("batch", ())
    with pytest.raises(ValueError, match=message):
        zo_jax.estimate_gradient(loss_fn, params, key, *batch, **kwargs)


def test_bad_rank():
    with pytest.raises(ValueError, match="positive integer"):
        zo_jax.low_rank(0)
