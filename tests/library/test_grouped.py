"""Directions of one group each: unbiased, learned from projections, and cheaper below nothing."""

import contextlib
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from programs import values
import pytest
from test_prefix import Counter

import zo_jax
from zo_jax import ledger
from zo_jax.groups import find_groups
from zo_jax.replay import make_header, replay

KEY = jax.random.key(8)
PARAMS = {
    "embedding": values((3, 4), 1),
    "layers": {"w": 0.5 * values((3, 4, 4), 2), "b": values((3, 4), 3)},
    "head": values((4, 2), 4),
    "steps": jnp.arange(2),
}
X = values((6, 3), 5)
NAMES = ["embedding", "head", "layers/0", "layers/1", "layers/2"]


def loss_fn(params, x_BC):
    step = lambda h, p: (h + jnp.tanh(h @ p["w"] + p["b"][None]), None)
    h, _ = lax.scan(step, x_BC @ params["embedding"], params["layers"])
    return jnp.mean(jax.nn.logsumexp(h @ params["head"], axis=-1))


def flat(tree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return np.concatenate([np.ravel(x) for x in leaves])


def test_groups():
    names = lambda groups: [name for name, _ in find_groups(groups, PARAMS)]
    assert names("layers") == NAMES
    assert names("leaves") == ["embedding", "head", "layers/b", "layers/w"]
    assert names(lambda path, leaf: "one") == ["one"]
    found = dict(find_groups("layers", PARAMS))
    assert [x.shape for x in jax.tree.leaves(found["layers/1"].select(PARAMS))] == [
        (1, 4),
        (1, 4, 4),
    ]
    by_halves = lambda path, leaf: ["low", "high", "high"] if "layers" in path else "rest"
    assert names(by_halves) == ["rest", "low", "high"]
    in_a_list = {"layers": [{"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 2))}], "head": jnp.ones(3)}
    assert [n for n, _ in find_groups("layers", in_a_list)] == ["head", "layers/0", "layers/1"]
    total = sum(np.concatenate([flat(s.select(PARAMS)) for s in found.values()]).shape)
    assert total == flat(PARAMS).size


def taught(family, params, norms, num_steps=60, q=32):
    """A family that has seen projections of a gradient with the given norms of groups."""
    groups = find_groups(family.groups, params)
    family = family.start(params)
    rng = np.random.default_rng(0)

    @jax.jit
    def step(family, keys, normals):
        p = jnp.stack(list(family.shares(params).values()))
        which = jax.vmap(lambda key: family.part_of(params, key))(keys)
        c = jnp.array(norms)[which] * normals / jnp.sqrt(p[which])
        return family.learn(params, keys, c)

    assert len(groups) == len(norms)
    for i in range(num_steps):
        keys = jax.random.split(jax.random.key(i), q)
        family = step(family, keys, rng.normal(size=q).astype(np.float32))
    return family


def test_shares_are_what_is_best():
    norms = np.array([1.0, 4.0, 0.5, 0.5, 0.5])
    costs = {"head": 0.25}
    family = taught(zo_jax.grouped(costs=costs), PARAMS, norms)
    d, k = np.array([12, 8, 20, 20, 20]), np.array([1, 0.25, 1, 1, 1])
    best = norms * np.sqrt(d / k)
    expected = 0.9 * best / best.sum() + 0.1 * (0.5 * d / d.sum() + 0.1)
    shares = family.shares(PARAMS)
    assert list(shares) == NAMES
    np.testing.assert_allclose(list(shares.values()), expected, atol=0.05)
    # Before anything is known they go by size: the variance is that of all parameters at once.
    before = np.array(list(zo_jax.grouped().start(PARAMS).shares(PARAMS).values()))
    np.testing.assert_allclose(before, 0.95 * d / d.sum() + 0.01, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"parallel_batch_size": 4}, {"perturbation": "low_rank"}], ids=str
)
def test_the_estimate_is_unbiased_whatever_is_learned(options):
    base = options.pop("perturbation", "rademacher")
    family = taught(zo_jax.grouped(perturbation=base), PARAMS, [1.0, 4.0, 0.5, 0.1, 2.0], 5)
    estimator = zo_jax.Estimator(num_queries=4000, difference="jvp", perturbation=family, **options)
    est = jax.jit(lambda p: estimator.estimate(loss_fn, p, KEY, X))(PARAMS)
    g = flat(jax.grad(loss_fn, allow_int=True)(PARAMS, X))
    groups = [
        flat(s.select(jax.tree.map(jnp.zeros_like, PARAMS))).size for s in family.parts(PARAMS)
    ]
    assert sum(groups) == g.size
    # Of an entry in group g the variance is at most n_g² / p_g.
    least = min(float(p) for p in family.shares(PARAMS).values())
    bound = 5 * np.linalg.norm(g) / np.sqrt(4000 * least)
    np.testing.assert_allclose(flat(est.gradient), g, atol=bound)
    np.testing.assert_allclose(est.projections[:50], slopes(estimator, 50), rtol=1e-3, atol=1e-4)


def slopes(estimator, count):
    """⟨g, z⟩ of the first queries, each direction formed by itself."""
    g = jax.grad(loss_fn, allow_int=True)(PARAMS, X)
    direction = jax.jit(lambda key: estimator.family.direction(PARAMS, key))
    return [flat(direction(key)) @ flat(g) for key in estimator.keys(KEY)[:count]]


def test_the_variance_falls_as_the_norms_say():
    """Mean squared errors of one query against Σ d n² / p."""
    g = jax.grad(loss_fn, allow_int=True)(PARAMS, X)
    family = taught(
        zo_jax.grouped(),
        PARAMS,
        [float(np.linalg.norm(flat(s.select(g)))) for s in zo_jax.grouped().parts(PARAMS)],
    )
    direction = jax.jit(jax.vmap(lambda key: flat_jnp(family.direction(PARAMS, key))))
    z = np.asarray(direction(jax.random.split(KEY, 4000)))
    estimates = (z @ flat(g))[:, None] * z
    error = np.mean(np.sum((estimates - flat(g)) ** 2, axis=1))
    expected = -np.sum(flat(g) ** 2)
    for subset, p in zip(family.parts(PARAMS), family.shares(PARAMS).values(), strict=True):
        part = flat(subset.select(g))
        expected += part.size * np.sum(part**2) / float(p)
    np.testing.assert_allclose(error, expected, rtol=0.1)
    assert error < 0.9 * (flat(g).size - 1) * np.sum(flat(g) ** 2)


def flat_jnp(tree):
    return jnp.concatenate(
        [jnp.ravel(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    )


@pytest.mark.parametrize("num_queries", [4, 24])
def test_what_lies_below_a_group_is_evaluated_once(num_queries):
    """Once for all queries where these are many, once for both sides of a query otherwise."""
    count = Counter()

    def counted(params, x_BC):
        step = lambda h, p: (count("layer", h + jnp.tanh(h @ p["w"])), None)
        h, _ = lax.scan(step, count("embedding", x_BC @ params["embedding"]), params["layers"])
        return jnp.mean((h @ params["head"]) ** 2)

    family = zo_jax.grouped()
    project = lambda p, x: zo_jax.project(
        counted, p, KEY, x, num_queries=num_queries, perturbation=family
    )
    counts = count.of(project, PARAMS, X)
    keys = jax.random.split(KEY, num_queries)
    which = [NAMES[int(family.part_of(PARAMS, key))] for key in keys]
    above = {"embedding": 3, "head": 0, "layers/0": 3, "layers/1": 2, "layers/2": 1}
    twice = sum(2 * above[name] for name in which)
    below = {name: 3 - layers for name, layers in above.items()}
    once = sum(below.values()) if num_queries == 24 else sum(below[name] for name in which)
    assert counts["layer"] == twice + once


def test_a_run_replays_from_its_ledger_to_the_bit(tmp_path):
    optimizer, q = optax.adam(1e-2), 6
    params = {k: v for k, v in PARAMS.items() if k != "steps"}
    start = zo_jax.Update(optimizer).init(params, zo_jax.grouped().start(params))
    update = zo_jax.make_update(optimizer, zo_jax.rademacher())
    project = jax.jit(
        lambda p, k, family: zo_jax.project(loss_fn, p, k, X, num_queries=q, perturbation=family)
    )
    state = jax.tree.map(jnp.copy, start)
    header = make_header(start, num_queries=q)
    writer = ledger.Writer(tmp_path / "ledger.bin", header)
    for step in range(1, 9):
        key = jax.random.fold_in(KEY, step)
        loss, c = project(state.params, key, state.family)
        c = c.at[0].set(jnp.nan) if step == 3 else c
        writer.append(step, ledger.REPLAYABLE, jax.random.key_data(key), loss, c)
        state, _ = update(state, key, loss, c)
    writer.close()
    again = replay(start, ledger.read(tmp_path / "ledger.bin"), optimizer)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(state.family.norms.ends != start.family.norms.ends)


COUNTS = [9, 0, 1] * 30


def tabled():
    """A loss of a table of 90 rows of which few are looked up, and of a matrix."""
    params = {"table": values((90, 2), 6), "w": values((2, 3), 7)}
    tokens = jnp.array([0, 3, 3, 6])
    return params, lambda p: jnp.mean(jnp.tanh(p["table"][tokens] @ p["w"]) ** 2)


def test_rows_have_tiers_by_how_often_they_are_used():
    params, _ = tabled()
    family = zo_jax.grouped(counts={"table": COUNTS}).start(params)
    assert list(family.shares(params)) == ["table/0", "table/1", "w"]
    first, rest, _ = family.parts(params)
    # All of 9, all of 1, and the first four that are not used.
    used = [i for i in range(90) if COUNTS[i]] + [1, 4, 7, 10]
    np.testing.assert_array_equal(first.select(params)["table"], params["table"][np.sort(used)])
    assert rest.select(params)["table"].shape == (26, 2)
    few = zo_jax.grouped(counts={"table": COUNTS[:60]})
    assert list(few.start({"table": jnp.ones((60, 2))}).shares({"table": jnp.ones((60, 2))})) == [
        "table/0"
    ]


def test_tiers_are_unbiased_and_of_less_variance():
    params, loss = tabled()
    g = flat(jax.grad(loss)(params))
    plain = zo_jax.grouped().start(params)
    tiers = zo_jax.grouped(counts={"table": COUNTS}).start(params)
    errors = []
    for family in (plain, tiers):
        for i in range(20):
            key = jax.random.key(i)
            _, c = zo_jax.project(
                loss, params, key, num_queries=64, perturbation=family, difference="jvp"
            )
            family = family.learn(params, jax.random.split(key, 64), c)
        est = zo_jax.estimate_gradient(
            loss, params, KEY, num_queries=4000, perturbation=family, difference="jvp"
        )
        error = np.sum((flat(est.gradient) - g) ** 2)
        bound = sum(
            flat(part.select(params)).size
            * np.sum(flat(part.select(jax.grad(loss)(params))) ** 2)
            / float(p)
            for part, p in zip(family.parts(params), family.shares(params).values(), strict=True)
        )
        np.testing.assert_allclose(error, bound / 4000, rtol=0.5)
        errors.append(bound)
    assert errors[1] < 0.9 * errors[0]


def test_a_run_with_tiers_replays_from_its_ledger(tmp_path):
    params, loss = tabled()
    family = zo_jax.grouped(counts={"table": COUNTS}).start(params)
    start = zo_jax.Update(optax.sgd(0.1)).init(params, family)
    header = make_header(start, num_queries=4, groups="layers", tiers=family.tiers)
    update = zo_jax.make_update(optax.sgd(0.1), zo_jax.rademacher())
    state = jax.tree.map(jnp.copy, start)
    with contextlib.closing(ledger.Writer(tmp_path / "ledger.bin", header)) as writer:
        for step in range(1, 5):
            key = jax.random.fold_in(KEY, step)
            told = zo_jax.project(loss, state.params, key, num_queries=4, perturbation=state.family)
            writer.append(step, ledger.REPLAYABLE, jax.random.key_data(key), *told)
            state, _ = update(state, key, *told)
    again = replay(params, ledger.read(tmp_path / "ledger.bin"), optax.sgd(0.1))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_optax_chain_keeps_what_it_learns():
    loss = lambda p: (
        jnp.sum((p["a"] - 1) ** 2) + 1e-2 * jnp.sum((p["b"] - 1) ** 2) + jnp.sum(p["c"])
    )
    params = {"a": jnp.zeros(4), "b": jnp.zeros(40), "c": jnp.zeros(2)}
    tx = optax.chain(
        zo_jax.zeroth_order(KEY, num_queries=8, perturbation=zo_jax.grouped(), exact="^c$"),
        optax.sgd(0.01),
    )
    state = tx.init(params)
    step = jax.jit(functools.partial(tx.update, None, value_fn=loss))
    for _ in range(20):
        _, state = step(state, params)
    family = state[0].family
    # √d n of the two groups: √4 · 2 √4 = 8 and √40 · 0.02 √40 = 0.8.
    rest = {"a": params["a"], "b": params["b"], "c": None}
    assert 0.6 < family.shares(rest)["a"] < 0.95


def test_bad_arguments():
    for options, match in (
        ({"groups": "layer"}, "groups must be layers, leaves, or a function"),
        ({"costs": {"head": 0.0}}, "costs must be finite and above 0"),
        ({"memory": 1}, "memory must be finite and above 1 step"),
        ({"perturbation": zo_jax.grouped()}, "inside a group"),
    ):
        with pytest.raises(ValueError, match=match):
            zo_jax.grouped(**options)
    with pytest.raises(ValueError, match="'heads', which is no group; the groups are embedding"):
        zo_jax.grouped(costs={"heads": 1.0}).start(PARAMS)
    for counts, match in (
        ({"head": [1, 2]}, "counts must have a number for each row of head"),
        ({"heads": [1, 2]}, "got 'heads'; they are embedding, head"),
    ):
        with pytest.raises(ValueError, match=match):
            zo_jax.grouped(counts=counts).start(PARAMS)
    for name in ("head/0", "embedding/0"):
        names = lambda path, x, name=name: name if x.ndim else "rest"
        with pytest.raises(ValueError, match=f"must not name a group '{name}'"):
            table = name.removesuffix("/0")
            counts = {table: range(len(PARAMS[table]))}
            zo_jax.grouped(names, counts=counts).start(PARAMS)
    for bad in ([-1, 2], [[1]], [np.inf], [], ["a"]):
        with pytest.raises(ValueError, match="must be finite numbers of at least 0"):
            zo_jax.grouped(counts={"head": bad})
    with pytest.raises(ValueError, match="one for each of its layers; got 2 for the shape"):
        zo_jax.grouped(lambda path, leaf: ["a", "b"]).start(PARAMS)
    with pytest.raises(
        ValueError, match="learned the norms of 5 groups, but the parameters have 1"
    ):
        zo_jax.grouped().start(PARAMS).part_of({"a": X}, KEY)


def test_projections_that_overflow_are_not_learned_from():
    estimator = zo_jax.Estimator(8, perturbation=zo_jax.grouped())
    family = estimator.start(PARAMS)
    keys = estimator.keys(KEY)
    for huge in (1.5e19, jnp.inf, jnp.nan):
        projections = jnp.ones(8).at[::2].set(huge)
        family = family.learn(PARAMS, keys, projections)
    shares = np.array(list(family.shares(PARAMS).values()))
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-5)
    assert np.all(np.isfinite(list(family.gradient_norms(PARAMS).values())))
