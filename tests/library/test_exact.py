"""A part of the parameters with an exact gradient, and directions for the rest."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from programs import values
import pytest

import zo_jax
from zo_jax.trees import Subset, subset_by

KEY = jax.random.key(3)
PARAMS = {
    "embedding": values((7, 4), 1),
    "layers": 0.6 * values((3, 4, 4), 2),
    "head": values((4, 5), 3),
    "steps": jnp.arange(3),  # no part of any gradient
}
X = jnp.array(np.random.default_rng(0).integers(0, 7, (4, 6)))


def loss_fn(params, x_BT):
    """Scanned layers between an embedding and a head."""
    h_BTC = params["embedding"][x_BT]
    h_BTC, _ = lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h_BTC, params["layers"])
    return jnp.mean(jax.nn.logsumexp(h_BTC @ params["head"], axis=-1) ** 2)


LOSS, GRADIENT = jax.jit(loss_fn), jax.jit(jax.grad(loss_fn, allow_int=True))
last_two = lambda path, leaf: {"head": True, "layers": [1, 2]}.get(path, False)
RULES = {
    "head": ("^head$", {"head": ...}),
    "last layers": (last_two, {"head": ..., "layers": np.array([1, 2])}),
    "first layer": (
        lambda path, leaf: [0] if path == "layers" else None,
        {"layers": np.array([0])},
    ),
}


def parts_of(chosen):
    """(exact, rest) of trees like the parameters, by what is chosen of them, in plain NumPy."""
    rows = lambda name: np.asarray(chosen[name]) if name in chosen else np.array([], int)
    whole = [name for name, rows in chosen.items() if rows is ...]
    own = lambda t: {k: t[k] if k in whole else t[k][rows(k)] for k in chosen}
    others = {
        k: np.setdiff1d(np.arange(len(v)), rows(k)) for k, v in PARAMS.items() if k not in whole
    }
    rest = lambda t: {k: v if k in whole else v[others[k]] for k, v in t.items() if k not in whole}

    def put(tree, part):
        return tree | {k: tree[k].at[others[k]].set(v) for k, v in part.items()}

    return own, rest, put


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_chunks": 2},
        {"batch_per_query": True, "difference": "forward"},
        {"difference": "jvp"},
    ],
    ids=str,
)
def test_equals_jax_grad_above_and_finite_differences_below(rule, options):
    rule, chosen = RULES[rule]
    q, epsilon = 3, 1e-2
    per_query = "batch_per_query" in options
    x = jnp.stack([X, X[::-1] + 1, 6 - X]) % 7 if per_query else X
    estimator = zo_jax.Estimator(num_queries=q, epsilon=epsilon, exact=rule, **options)
    est = jax.jit(lambda p, x: estimator.estimate(loss_fn, p, KEY, x))(PARAMS, x)
    own, rest, put = parts_of(chosen)

    true = [GRADIENT(PARAMS, b) for b in (x if per_query else [x])]
    for name, g in own(est.gradient).items():
        mean = np.mean([own(t)[name] for t in true], axis=0)
        np.testing.assert_allclose(g, mean, rtol=2e-4, atol=1e-6)

    part = rest(PARAMS)
    total = {k: np.zeros(v.shape) for k, v in part.items()}
    for i, key in enumerate(jax.random.split(KEY, q)):
        z, b = estimator.family.direction(part, key), x[i] if per_query else x
        floating = [k for k in z if k != "steps"]
        at = lambda s: float(LOSS(put(PARAMS, {k: part[k] + s * z[k] for k in floating}), b))
        if options.get("difference") == "forward":
            c = (at(epsilon) - at(0)) / epsilon
        else:
            c = (at(epsilon) - at(-epsilon)) / (2 * epsilon)
        np.testing.assert_allclose(est.projections[i], c, rtol=0.02, atol=2e-3)
        total = {k: v + est.projections[i] * z[k] / q for k, v in total.items()}
    for name, g in rest(est.gradient).items():
        np.testing.assert_allclose(g, total[name], rtol=1e-5, atol=1e-6)
    # Without its exact part it is what the projections tell.
    again = estimator.combine(PARAMS, KEY, est.projections)
    assert all(not np.any(g) for g in own(again).values())


def test_the_estimate_is_unbiased():
    estimator = zo_jax.Estimator(num_queries=4000, difference="jvp", exact="^head$")
    est = jax.jit(lambda p: estimator.estimate(loss_fn, p, KEY, X))(PARAMS)
    true = GRADIENT(PARAMS, X)
    rest = ["embedding", "layers"]
    norm2 = sum(float(jnp.sum(true[k] ** 2)) for k in rest)
    for name in rest:
        # The variance of an entry is at most the squared norm of what has directions.
        bound = 5 * np.sqrt(norm2 / 4000)
        np.testing.assert_allclose(est.gradient[name], true[name], atol=bound)


def count_backward(counts, name):
    """The identity, which counts how often it is differentiated backwards."""

    def note(ct):
        counts.append(name)
        return ct

    @jax.custom_vjp
    def watched(x):
        return x

    def backward(_, ct):
        return (jax.pure_callback(note, jax.ShapeDtypeStruct(ct.shape, ct.dtype), ct),)

    watched.defvjp(lambda x: (x, None), backward)
    return watched


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("^head$", {"head": 1}), (last_two, {"head": 1, "layer": 2})],
    ids=["head", "last two of three layers"],
)
def test_nothing_below_is_differentiated(rule, expected):
    counts = []
    layer, head = (count_backward(counts, name) for name in ("layer", "head"))

    def loss(params, x_BT):
        h_BTC = count_backward(counts, "embedding")(params["embedding"][x_BT])
        step = lambda h, w: (layer(h + jnp.tanh(h @ w)), None)
        h_BTC, _ = lax.scan(step, h_BTC, params["layers"])
        return jnp.mean(head(h_BTC @ params["head"]) ** 2)

    estimate = lambda p: zo_jax.estimate_gradient(loss, p, KEY, X, num_queries=2, exact=rule)
    jax.block_until_ready(jax.jit(estimate)(PARAMS))
    jax.effects_barrier()
    assert {name: counts.count(name) for name in counts} == expected


def test_no_word_is_drawn_for_what_is_exact():
    """The directions of the rest are those of the rest alone."""
    whole = lambda part: {**PARAMS, **part}
    rest = {k: v for k, v in PARAMS.items() if k != "head"}
    options = dict(num_queries=2, perturbation="low_rank")
    _, c = zo_jax.project(loss_fn, PARAMS, KEY, X, exact="^head$", **options)
    _, alone = zo_jax.project(lambda part: loss_fn(whole(part), X), rest, KEY, **options)
    np.testing.assert_allclose(c, alone, rtol=1e-6)


def test_bad_rules_are_told_before_anything_is_compiled():
    estimate = lambda exact: zo_jax.estimate_gradient(loss_fn, PARAMS, KEY, X, exact=exact)
    with pytest.raises(ValueError, match="paths are embedding, head, layers"):
        estimate("nothing")
    with pytest.raises(ValueError, match="regular expression"):
        estimate("(")
    with pytest.raises(ValueError, match="must leave a floating leaf"):
        estimate("")
    with pytest.raises(ValueError, match="indices of layers from 0 to 2 for layers"):
        estimate(lambda path, leaf: [3] if path == "layers" else False)
    with pytest.raises(ValueError, match="got 3"):
        zo_jax.Estimator(exact=3)
    with pytest.raises(ValueError, match="leave exact out"):
        zo_jax.probe(loss_fn, PARAMS, KEY, X, num_steps=10, exact="head")


def test_a_part_that_is_not_finite_is_zero():
    def loss(params, x):
        return jnp.sum(params["a"] ** 2) + jnp.sum(params["b"]) / x[0]

    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    batches = jnp.array([[0.0], [2.0]])
    est = zo_jax.estimate_gradient(
        loss, params, KEY, batches, num_queries=2, batch_per_query=True, exact="b"
    )
    assert est.num_failed == 1
    np.testing.assert_allclose(est.gradient["b"], [0.5, 0.5])


def test_in_an_optax_chain_the_exact_part_goes_down_the_gradient():
    loss = lambda p: jnp.sum((p["a"] - 1) ** 2) + jnp.sum((p["b"] - 2) ** 2)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    tx = zo_jax.zeroth_order(KEY, num_queries=2, exact=Subset((None, ...)))
    g, _ = tx.update(None, tx.init(params), params, value_fn=loss)
    np.testing.assert_allclose(g["b"], [-4.0, -4.0], rtol=1e-6)


def test_subsets_and_their_rests():
    subset = subset_by(
        lambda path, leaf: {"layers": (2, 0), "head": np.True_}.get(path), PARAMS, "x"
    )
    picked, rest = subset.select(PARAMS), subset.rest(PARAMS).select(PARAMS)
    np.testing.assert_array_equal(picked["layers"], PARAMS["layers"][jnp.array([0, 2])])
    np.testing.assert_array_equal(rest["layers"], PARAMS["layers"][1:2])
    assert rest["head"] is None and picked["embedding"] is None
    every = lambda path, leaf: range(3) if path == "layers" else False
    assert subset_by(every, PARAMS, "x").indices == (None, None, ..., None)
