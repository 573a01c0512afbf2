"""Directions with a scale for each group: unbiased, of the variance that the formula tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo_jax
from zo_jax.groups import find_groups
from zo_jax.trees import is_floating

KEY = jax.random.key(7)
NAMES = ["blocks/0", "blocks/1", "blocks/2", "count", "head", "table"]


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "blocks": {"w": normal(3, 4, 4), "b": normal(3, 4)},
        "head": normal(4, 3),
        "table": normal(9, 4),
        "count": jnp.arange(3),
    }


PARAMS = make_params()
GRADIENT = jax.tree.map(
    lambda x, s: s * x if is_floating(x) else x * 0,
    make_params(1),
    {"blocks": {"w": 0.1, "b": 3.0}, "head": 1.0, "table": 0.3, "count": 0},
)


def loss_fn(params):
    products = jax.tree.map(lambda x, g: jnp.sum(x * g), params, GRADIENT)
    return sum(x for x in jax.tree.leaves(products) if is_floating(x))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree) if is_floating(x)])


def true_norms(groups, counts=None):
    found = find_groups(groups, PARAMS, zo_jax.grouped(counts=counts).tiers)
    return {name: float(np.linalg.norm(flat(part.select(GRADIENT)))) for name, part in found}


COUNTS = {"table": [9, 0, 0, 3, 0, 0, 0, 0, 1]}
CASES = {
    "leaves": ("leaves", None, "rademacher"),
    "layers": ("layers", None, "rademacher"),
    "rank 1": ("leaves", None, "low_rank"),
    "normals": ("layers", None, "gaussian"),
    "rows": ("leaves", COUNTS, "rademacher"),
}


@pytest.mark.parametrize("case", CASES)
def test_unbiased_and_of_the_variance_of_the_formula(case):
    groups, counts, base = CASES[case]
    norms = true_norms(groups, counts)
    family = zo_jax.scaled(norms, groups, base, counts=counts)
    scales = family.scales(PARAMS)
    n = 4000
    estimator = zo_jax.Estimator(num_queries=n, difference="jvp", perturbation=family)
    keys = estimator.keys(KEY)

    @jax.jit
    def look():
        est = estimator.estimate(loss_fn, PARAMS, KEY)
        summed = jax.vmap(lambda key: family.direction(PARAMS, key))(keys)
        moved = jax.vmap(
            lambda key: jax.tree.map(
                lambda x: x.form() if hasattr(x, "form") else x,
                family.perturb(jax.tree.map(jnp.zeros_like, PARAMS), key, 1.0),
                is_leaf=lambda x: hasattr(x, "form"),
            )
        )(keys)
        return est, summed, moved

    est, summed, moved = look()
    found = find_groups(groups, PARAMS, family.tiers)
    # S z and S⁻¹ z, group by group.
    for name, part in found:
        of = lambda tree, part=part: flat(jax.vmap(part.select)(tree))
        np.testing.assert_allclose(of(moved), of(summed) * scales[name] ** 2, rtol=1e-5, atol=1e-6)
    sizes = np.array([flat(part.select(PARAMS)).size for _, part in found])
    own = np.array(list(norms.values()))
    np.testing.assert_allclose(sizes @ np.square(list(scales.values())), sizes.sum(), rtol=1e-5)
    # The slopes are those along S z, and the estimate is their mean along S⁻¹ z.
    rows = lambda tree: np.stack([flat(jax.tree.map(lambda x: x[i], tree)) for i in range(n)])
    z, g = rows(summed), flat(GRADIENT)
    np.testing.assert_allclose(est.projections, rows(moved) @ g, rtol=1e-3, atol=1e-3)
    estimates = np.asarray(est.projections)[:, None] * z
    np.testing.assert_allclose(flat(est.gradient), estimates.mean(axis=0), rtol=1e-3, atol=1e-3)
    errors = np.sum((estimates - g) ** 2, axis=1)
    least = np.sum(np.sqrt(sizes) * own) ** 2
    if base == "rademacher":  # whose entries have a fourth moment of 1: less g² of every coordinate
        np.testing.assert_allclose(errors.mean(), least - g @ g, rtol=0.1)
    assert errors.mean() < 0.9 * g.size * (g @ g)
    bound = 5 * np.sqrt(errors.mean() / n)
    assert np.linalg.norm(flat(est.gradient) - g) < bound


def test_unbiased_with_wrong_norms_and_the_same_in_any_chunks():
    norms = dict.fromkeys(true_norms("leaves"), 1.0) | {"head": 30.0}
    family = zo_jax.scaled(norms)

    def estimate(*options, **others):
        estimator = zo_jax.Estimator(*options, perturbation=family, **others)
        return jax.jit(lambda: estimator.estimate(loss_fn, PARAMS, KEY))()

    estimates = [estimate(64, parallel_batch_size=size) for size in (64, 1, 5)]
    for other in estimates[1:]:
        np.testing.assert_allclose(other.projections, estimates[0].projections, rtol=1e-3)
        np.testing.assert_allclose(
            flat(other.gradient), flat(estimates[0].gradient), rtol=1e-3, atol=1e-3
        )
    est, g = estimate(20000, difference="jvp"), flat(GRADIENT)
    assert np.linalg.norm(flat(est.gradient) - g) < 0.2 * np.linalg.norm(g)


def test_norms_come_from_what_a_run_has_learned():
    estimator = zo_jax.Estimator(64, difference="jvp", perturbation=zo_jax.grouped("layers"))
    family = estimator.start(PARAMS)
    learn = jax.jit(
        lambda family, key: family.learn(
            PARAMS,
            estimator.keys(key),
            zo_jax.project(loss_fn, PARAMS, key, estimator=estimator, perturbation=family)[1],
        )
    )
    for i in range(60):
        family = learn(family, jax.random.key(i))
    learned, true = family.gradient_norms(PARAMS), true_norms("layers")
    assert learned.keys() == true.keys()
    for name, norm in true.items():
        np.testing.assert_allclose(learned[name], norm, rtol=0.25)
    assert zo_jax.scaled(learned, "layers").scales(PARAMS).keys() == true.keys()


def test_bad_arguments():
    norms = true_norms("leaves")
    with pytest.raises(ValueError, match="norms must be finite and above 0, got 0"):
        zo_jax.scaled(norms | {"head": 0.0})
    with pytest.raises(ValueError, match="groups must be layers, leaves"):
        zo_jax.scaled(norms, "rows")
    for family in (zo_jax.grouped(), zo_jax.scaled(norms)):
        with pytest.raises(ValueError, match="must be a family inside a group"):
            zo_jax.scaled(norms, perturbation=family)
    with pytest.raises(ValueError, match="these are two with Scaled: leave it out"):
        zo_jax.probe(loss_fn, PARAMS, KEY, num_steps=9, perturbation=zo_jax.scaled(norms))
    norms.pop("head")
    with pytest.raises(ValueError, match="norms must have one for each group, blocks/b"):
        zo_jax.scaled(norms).direction(PARAMS, KEY)
