"""What the library promises of the estimator as a value, of families, and of parameters of every
kind.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo_jax
from zo_jax.trees import matrices

KEY = jax.random.key(0)
OPTIONS = dict(num_queries=3, epsilon=1e-2, perturbation="gaussian")


def quadratic(p):
    return jnp.sum((p["w"] - 1) ** 2)


def test_every_place_takes_an_estimator_or_its_options():
    estimator, params = zo_jax.Estimator(**OPTIONS), {"w": jnp.arange(4.0)}
    expected = estimator.estimate(quadratic, params, KEY)
    for got in (
        zo_jax.estimate_gradient(quadratic, params, KEY, estimator=estimator),
        zo_jax.estimate_gradient(quadratic, params, KEY, **OPTIONS),
    ):
        np.testing.assert_array_equal(got.gradient["w"], expected.gradient["w"])
    loss, c = zo_jax.project(quadratic, params, KEY, estimator=estimator)
    np.testing.assert_array_equal(c, expected.projections)
    assert loss == expected.loss
    np.testing.assert_array_equal(estimator.combine(params, KEY, c)["w"], expected.gradient["w"])
    state = zo_jax.zeroth_order(KEY, estimator=estimator).init(params)
    assert state.projections.shape == (3,)
    # What is given besides replaces what the estimator has.
    assert zo_jax.zeroth_order(KEY, estimator=estimator, num_queries=5).init(
        params
    ).projections.shape == (5,)
    with pytest.raises(TypeError, match="did you mean num_queries"):
        zo_jax.estimate_gradient(quadratic, params, KEY, num_querys=3)


def test_numpy_integers_and_names():
    estimator = zo_jax.Estimator(num_queries=np.int64(3), parallel_batch_size=np.int32(2))
    assert type(estimator.num_queries) is int and estimator.num_evaluations == 6
    for name in ("rademacher", "gaussian", "sphere", "low_rank"):
        assert isinstance(zo_jax.Estimator(perturbation=name).perturbation, zo_jax.Family)
    for options, match in (
        ({"num_queries": 0}, "num_queries must be an integer of at least 1, got 0"),
        ({"num_queries": True}, "num_queries must be an integer"),
        ({"num_queries": 1.5}, "num_queries must be an integer"),
        ({"batch_chunks": np.int64(0)}, "batch_chunks must be"),
        ({"perturbation": "signs"}, "one of rademacher, gaussian, sphere, low_rank; got 'signs'"),
        ({"perturbation": 3}, "must be a Family"),
        ({"difference": "backward"}, "difference must be one of"),
        ({"epsilon": 1e-50}, "positive and finite in float32"),
    ):
        with pytest.raises(ValueError, match=match):
            zo_jax.Estimator(**options)


@pytest.mark.parametrize("difference", ["central", "forward", "jvp"])
def test_aux(difference):
    loss_fn = lambda w, x: (jnp.sum(w * x), {"w0": w[0], "x": x})
    estimator = zo_jax.Estimator(
        num_queries=3, epsilon=0.5, difference=difference, has_aux=True, batch_per_query=True
    )
    params, x = jnp.array([1.0, 2.0]), jnp.arange(6.0).reshape(3, 2)
    estimate = jax.jit(lambda k: estimator.estimate(loss_fn, params, k, x))(KEY)
    np.testing.assert_array_equal(estimate.aux["x"], x)
    z = jax.vmap(lambda k: estimator.family.direction(params, k))(estimator.keys(KEY))
    moved = 0 if difference == "jvp" else 0.5 * z[:, 0]
    np.testing.assert_allclose(estimate.aux["w0"], 1 + moved + np.zeros(3), rtol=1e-6)
    np.testing.assert_allclose(estimate.projections, np.sum(np.array(z * x), axis=1), rtol=1e-5)
    plain = dataclasses.replace(estimator, has_aux=False)
    assert plain.estimate(lambda w, x: loss_fn(w, x)[0], params, KEY, x).aux is None


def test_chunks_of_a_batch_are_a_mean():
    loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
    w, x = jnp.array([1.0, -2.0]), jax.random.normal(jax.random.key(1), (6, 2))
    whole = zo_jax.estimate_gradient(loss_fn, w, KEY, x, num_queries=2)
    parts = zo_jax.estimate_gradient(loss_fn, w, KEY, x, num_queries=2, batch_chunks=3)
    np.testing.assert_allclose(parts.projections, whole.projections, rtol=1e-3)
    with pytest.raises(ValueError, match=r"batch_chunks=4 .* divisible by it, got shape \(6, 2\)"):
        zo_jax.estimate_gradient(loss_fn, w, KEY, x, batch_chunks=4)


def test_a_loss_that_is_none_says_what_to_do():
    for loss_fn, match in (
        (lambda w: None, "got None; return the loss"),
        (lambda w: (jnp.sum(w), 1), r"tuple of 2; if it is \(loss, aux\), set has_aux=True"),
        (lambda w: w, r"floating scalar, got shape \(2,\)"),
        (lambda w: jnp.sum(w) > 0, "dtype bool"),
    ):
        with pytest.raises(ValueError, match=match):
            zo_jax.estimate_gradient(loss_fn, jnp.ones(2), KEY)
    with pytest.raises(ValueError, match=r"must return \(loss, aux\), got"):
        zo_jax.estimate_gradient(lambda w: jnp.sum(w), jnp.ones(2), KEY, has_aux=True)


def test_parameters_of_every_kind():
    mlp = eqx.nn.MLP(2, 1, 4, 1, key=KEY)
    with pytest.raises(ValueError, match=r"at .*activation; split off .* eqx.partition"):
        zo_jax.estimate_gradient(lambda m: jnp.sum(m(jnp.ones(2))), mlp, KEY)
    with pytest.raises(
        ValueError, match="params must be real, got complex64 at c; hand in its real"
    ):
        zo_jax.estimate_gradient(quadratic, {"w": jnp.ones(2), "c": jnp.ones(2) * 1j}, KEY)
    with pytest.raises(ValueError, match="must have a floating leaf"):
        zo_jax.estimate_gradient(lambda p: 0.0, {"i": jnp.arange(3)}, KEY)
    params = {"w": 2.0, "v": np.ones(2, np.float32), "i": 7}
    loss_fn = lambda p: p["w"] * 3 + jnp.sum(p["v"]) * p["i"]
    estimate = zo_jax.estimate_gradient(loss_fn, params, KEY, num_queries=999, difference="jvp")
    # Five standard errors: each entry's is at most ‖g‖ over the root of the queries.
    error = 5 * np.sqrt(9 + 2 * 49) / np.sqrt(999)
    np.testing.assert_allclose(estimate.gradient["w"], 3, atol=error)
    np.testing.assert_allclose(estimate.gradient["v"], [7, 7], atol=error)
    assert estimate.gradient["i"] == 0


def test_losses_in_float64_stay_so():
    with jax.enable_x64(True):
        params = {"w": jnp.arange(3, dtype=jnp.float64)}
        loss_fn = lambda p: 1e8 + jnp.sum((p["w"] - 1) ** 2)
        estimate = zo_jax.estimate_gradient(loss_fn, params, KEY, num_queries=2, epsilon=2.0**-10)
        assert estimate.loss.dtype == estimate.projections.dtype == jnp.float64
        assert estimate.gradient["w"].dtype == jnp.float64
        z = [zo_jax.rademacher().direction(params, k)["w"] for k in jax.random.split(KEY, 2)]
        expected = [np.dot([-2, 0, 2], np.array(d, np.float64)) for d in z]
        # In float32 the loss is a multiple of 8.
        np.testing.assert_allclose(estimate.projections, expected, rtol=1e-4, atol=1e-4)
        tx = zo_jax.zeroth_order(KEY, num_queries=2)
        step = jax.jit(lambda s: tx.update(None, s, params, value_fn=loss_fn)[1])
        state = step(tx.init(params))
        assert jax.tree.map(jnp.dtype, step(state)) == jax.tree.map(jnp.dtype, state)


def test_queries_along_which_nothing_changes_are_counted():
    # Near 1 the spacing of bfloat16 is 2⁻⁷ or 2⁻⁸.
    loss_fn = lambda p: jnp.sum(p.astype(jnp.bfloat16).astype(jnp.float32))
    lost = zo_jax.estimate_gradient(loss_fn, jnp.ones(8), KEY, epsilon=1e-3, num_queries=4)
    felt = zo_jax.estimate_gradient(loss_fn, jnp.ones(8), KEY, epsilon=1e-2, num_queries=4)
    assert lost.num_flat == 4 and not np.any(lost.gradient)
    assert felt.num_flat < 4


FAMILIES = {
    "rademacher": lambda: zo_jax.rademacher(),
    "gaussian": lambda: zo_jax.gaussian(),
    "sphere": lambda: zo_jax.sphere(),
    "low_rank": lambda: zo_jax.low_rank(2),
    "hybrid": lambda: zo_jax.guided(GRADIENT, method="hybrid"),
    "gram_schmidt": lambda: zo_jax.guided(GRADIENT, 0.5, method="gram_schmidt"),
    "own": lambda: Layerwise(),
}
PARAMS = {"w": jnp.ones((9, 8)), "b": jnp.ones(3, jnp.bfloat16), "count": jnp.int32(5)}
GRADIENT = {
    "w": jnp.arange(72.0).reshape(9, 8),
    "b": jnp.ones(3),
    "count": np.zeros((), jax.dtypes.float0),
}


class Layerwise(zo_jax.Family):
    """A family with the two methods that it must have: signs of the rows of matrices."""

    def draw(self, params, key):
        return jax.random.rademacher(key, (9, 1), jnp.float32)

    def move(self, params, direction, scale):
        return params | {"w": (params["w"] + scale * direction).astype(params["w"].dtype)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_contract(name):
    family = FAMILIES[name]()
    keys, weights = jax.random.split(KEY, 3), jnp.array([1.0, -2.0, 0.5])
    direction = jax.jit(family.direction)
    z = [direction(PARAMS, key) for key in keys]
    assert jax.tree.map(jnp.dtype, z[0]) == {"w": jnp.float32, "b": jnp.float32, "count": jnp.int32}
    expected = jax.tree.map(
        lambda *x: sum(w * np.float64(y) for w, y in zip(np.array(weights), x, strict=True)), *z
    )
    is_perturbed = lambda x: hasattr(x, "form")
    form = lambda x: x.form() if is_perturbed(x) else x

    @jax.jit
    def run(params, keys, weights):
        return dict(
            combined=family.combine(params, keys, weights),
            with_norm=family.combine_with_norm(params, keys, weights),
            added=family.add(params, keys, weights),
            moved=jax.tree.map(form, family.perturb(params, keys[0], 0.25), is_leaf=is_perturbed),
            estimate=zo_jax.estimate_gradient(loss_fn, params, KEY, perturbation=family),
        )

    loss_fn = lambda p: jnp.sum(p["w"] ** 2) + p["count"] * jnp.sum(p["b"].astype(jnp.float32))
    got = run(PARAMS, keys, weights)
    assert jax.tree.map(jnp.dtype, got["combined"]) == jax.tree.map(jnp.dtype, PARAMS)
    np.testing.assert_allclose(got["combined"]["w"], expected["w"], rtol=1e-4, atol=1e-4)
    assert got["combined"]["count"] == 0
    total, norm = got["with_norm"]
    np.testing.assert_allclose(
        norm, optax.global_norm([total["w"], total["b"].astype(jnp.float32)]), rtol=1e-2
    )
    np.testing.assert_allclose(got["added"]["w"], 1 + expected["w"], rtol=1e-4, atol=1e-4)
    assert got["added"]["count"] == 5
    moved = got["moved"]
    np.testing.assert_allclose(moved["w"], 1 + 0.25 * z[0]["w"], rtol=1e-5, atol=1e-5)
    assert moved["count"] == 5 and moved["b"].dtype == jnp.bfloat16
    assert family.on(None) is not None
    assert got["estimate"].num_failed == 0 and got["estimate"].gradient["count"] == 0


def test_integer_leaves_are_not_trained():
    params = {
        "w": np.ones((3, 4), np.float32),
        "ids": np.int32([2**24 + 1, -5]),
        "flag": np.array(True),
    }
    fresh = lambda: jax.tree.map(jnp.array, params)  # the update donates them
    loss_fn = lambda p: jnp.sum((p["w"] - 2) ** 2) + 0 * jnp.sum(p["ids"])
    project = jax.jit(lambda p, key: zo_jax.project(loss_fn, p, key, num_queries=4))
    for optimizer in (optax.sgd(0.1), optax.adamw(0.1, weight_decay=0.1), optax.contrib.muon(0.1)):
        state = zo_jax.Update(optimizer).init(fresh())
        update = zo_jax.make_update(optimizer, zo_jax.rademacher())
        first = None
        for step in range(3):
            key = jax.random.fold_in(KEY, step)
            loss, c = project(state.params, key)
            first = loss if first is None else first
            state, _ = update(state, key, loss, c)
        np.testing.assert_array_equal(state.params["ids"], params["ids"])
        assert state.params["flag"] and state.params["ids"].dtype == jnp.int32
        assert loss_fn(state.params) < first
    # Signs are those of the family, whatever other leaves there are.
    sgd = zo_jax.Update(optax.sgd(1.0))
    start = sgd.init(fresh())
    new, _ = sgd.from_projections(zo_jax.rademacher(), start, KEY, jnp.float32(0), jnp.ones(1))
    z = zo_jax.rademacher().direction(params, jax.random.split(KEY, 1)[0])
    np.testing.assert_allclose(new.params["w"], 1 - z["w"], rtol=1e-6)


def test_matrices_by_shape_or_by_a_rule():
    norm = jax.vmap(lambda key: eqx.nn.LayerNorm(6))(jax.random.split(KEY, 3))
    linear = jax.vmap(lambda key: eqx.nn.Linear(6, 5, key=key))(jax.random.split(KEY, 3))
    blocks = eqx.filter({"norm": norm, "linear": linear}, eqx.is_array)
    found = matrices({"blocks": blocks, "lora": {"a": jnp.ones((6, 2)), "b": jnp.ones((2, 6))}})
    assert found["lora"] == {"a": True, "b": True}
    assert found["blocks"]["linear"].weight and not found["blocks"]["linear"].bias
    assert not found["blocks"]["norm"].weight
    # Kernels [C, H, D] of several heads make no stack of what stands beside them.
    heads = {"query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}}
    found = matrices({"block": {"attention": heads, "fc": {"kernel": jnp.ones((8, 16))}}})
    assert found["block"]["fc"]["kernel"]
    mine = zo_jax.low_rank(1, is_matrix=lambda path, leaf: path == "a/kernel")
    params = {"a": {"kernel": jnp.zeros((8, 8))}, "b": {"kernel": jnp.zeros((8, 8))}}
    z = mine.direction(params, KEY)
    assert np.linalg.matrix_rank(z["a"]["kernel"]) == 1 < np.linalg.matrix_rank(z["b"]["kernel"])
