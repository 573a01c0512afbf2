"""The methods of the field: two steps of each against NumPy, and what all of them promise."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

import zo_jax
from zo_jax import methods
from zo_jax.methods.method import Step

KEY = jax.random.key(7)
RATE = 0.1


# Two steps from the formulas, in NumPy and in float64, for a loss of a matrix and a vector. Random
# numbers are the library's, taken from its Gaussian family by key; what is made of them is not.

START = {
    "b": np.random.default_rng(1).normal(size=5).astype(np.float32),
    "w": np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32),
}
X = np.random.default_rng(2).normal(size=(8, 6)).astype(np.float32)
FULL = np.random.default_rng(3).normal(size=(16, 6)).astype(np.float32)


def loss_of(xp, b, w, x):
    return xp.mean((xp.tanh(x @ w + b) - 0.3) ** 2) + 0.1 * xp.sum(w**2)


def jax_loss(params, x):
    return loss_of(jnp, params["b"][None], params["w"], x)


def L(theta, x=X):
    b, w = theta
    return loss_of(np, b, w, x.astype(np.float64))


def plus(theta, scale, z):
    return [p + scale * np.float64(d) for p, d in zip(theta, z, strict=True)]


def mean_of(weights, directions):
    """(1/q) Σ weights directions, leaf by leaf."""
    q = len(weights)
    return [sum(c * z[i] for c, z in zip(weights, directions, strict=True)) / q for i in range(2)]


def drawn(family, keys, b_shape=(5,), w_shape=(6, 5)):
    """The directions of keys, [b, w] each, of leaves of these shapes."""
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (b_shape, w_shape)]
    return [[np.float64(z) for z in family.direction(like, key)] for key in keys]


def central(theta, z, eps, x=X):
    return (L(plus(theta, eps, z), x) - L(plus(theta, -eps, z), x)) / (2 * eps)


def curvature(theta, z, eps):
    return (L(plus(theta, eps, z)) - 2 * L(theta) + L(plus(theta, -eps, z))) / eps**2


def est(num_queries=3, epsilon=0.02, **options):
    return zo_jax.Estimator(num_queries=num_queries, epsilon=epsilon, **options)


def normal(key, shape):
    return np.float64(jax.random.normal(key, shape, jnp.float32))


def kept_key(step, period, leaf):
    """The key of the kept factors of a leaf."""
    root = jax.random.key_data(KEY)
    return jax.random.fold_in(Step(root, jnp.int32(step)).lasting(period), leaf)


# Each: (theta, t, keys of the queries, memory) -> (updates, memory).


def fzoo(theta, t, keys, memory):
    u = drawn(zo_jax.rademacher(), keys)
    base, losses = L(theta), [L(plus(theta, 0.02, z)) for z in u]
    g = mean_of([(loss - base) / 0.02 for loss in losses], u)
    return [x / np.std(losses, ddof=1) for x in g], memory


def spsa(theta, t, keys, memory):
    z = drawn(zo_jax.rademacher(), keys)
    slopes = [central(theta, d, 0.1) for d in z]
    divisors = [max(abs(curvature(theta, d, 0.1)) ** 0.3, 0.5) for d in z]
    return mean_of([c / k for c, k in zip(slopes, divisors, strict=True)], z), memory


def es(theta, t, keys, memory):
    z = drawn(zo_jax.gaussian(), keys)
    scores = np.array([-L(plus(theta, 0.1, d)) for d in z])
    fitness = (scores - scores.mean()) / scores.std()
    return mean_of(-fitness / 0.1, z), memory


def eggroll(theta, t, keys, memory):
    z = drawn(zo_jax.low_rank(1), keys)
    scores = np.array([[-L(plus(theta, s, d)) for s in (0.1, -0.1)] for d in z])
    fitness = (scores - scores.mean()) / scores.std()
    return mean_of(-(fitness[:, 0] - fitness[:, 1]) / 0.2, z), memory


def lozo(theta, t, keys, memory, decay=0.0):
    # A new V in the second step.
    v = normal(kept_key(t, 1, 1), (5, 2))
    u = drawn(zo_jax.gaussian(), keys, w_shape=(6, 2))
    z = [[b, x @ v.T / np.sqrt(2)] for b, x in u]
    c = [central(theta, d, 0.02) for d in z]
    if not decay:
        return mean_of(c, z), memory
    n = mean_of(c, u)
    if memory is None:
        old = [0 * n[0], 0 * n[1]]
    else:
        (b, w), before = memory
        old = [b, w @ before.T @ v / 5]
    n = [decay * o + (1 - decay) * x for o, x in zip(old, n, strict=True)]
    return [n[0], n[1] @ v.T / np.sqrt(2)], (n, v)


def lozo_m(theta, t, keys, memory):
    return lozo(theta, t, keys, memory, decay=0.7)


def orthonormal(key, shape):
    return np.linalg.qr(normal(key, shape))[0]


def subzero(theta, t, keys, memory):
    rows, columns = jax.random.split(kept_key(t, 1, 1))
    u, v = orthonormal(rows, (6, 2)), orthonormal(columns, (5, 2))
    x = drawn(zo_jax.gaussian(), keys, w_shape=(2, 2))
    z = [[b, np.sqrt(30 / 4) * u @ s @ v.T] for b, s in x]
    return mean_of([central(theta, d, 0.02) for d in z], z), memory


def tezo(theta, t, keys, memory):
    rows, columns = jax.random.split(kept_key(t, None, 1))
    u, v = normal(rows, (6, 3)), normal(columns, (5, 3))
    x = drawn(zo_jax.gaussian(), keys, w_shape=(1, 3))
    z = [[b, u @ np.diag(tau[0]) @ v.T / np.sqrt(3)] for b, tau in x]
    c = [central(theta, d, 0.02) for d in z]
    m = [0.3 * n for n in mean_of(c, x)]
    if memory is not None:
        m = [0.7 * old + new for old, new in zip(memory, m, strict=True)]
    return [m[0], u @ np.diag(m[1][0]) @ v.T / np.sqrt(3)], m


def forward(theta, z, eps):
    return (L(plus(theta, eps, z)) - L(theta)) / eps


def zo_muon(theta, t, keys, memory):
    p = orthonormal(kept_key(t, 1, 1), (6, 2))
    psi = drawn(zo_jax.gaussian(), keys, w_shape=(2, 5))
    c = [forward(theta, [b, p @ x], 0.02) for b, x in psi]
    b, g = mean_of(c, psi)
    x, _, y = np.linalg.svd(g, full_matrices=False)
    return [b, p @ x @ y], memory


def mopi(theta, t, keys, memory):
    p = orthonormal(kept_key(t, 1, 1), (6, 3))
    psi = drawn(zo_jax.gaussian(), keys, w_shape=(3, 5))
    b, g = mean_of([central(theta, [b, p @ x], 0.02) for b, x in psi], psi)
    if memory is None:
        v = orthonormal(jax.random.fold_in(jax.random.key(0), 1), (5, 2))
        old_b, old_m = 0 * b, 0 * g
    else:
        old_b, old_m, v, before = memory
        old_m = p.T @ before @ old_m
    b, m = 0.6 * old_b + 0.4 * b, 0.6 * old_m + 0.4 * g
    v = np.linalg.qr(m.T @ (m @ v))[0]
    u = m @ v / np.linalg.norm(m @ v, axis=0)
    return [b, p @ u @ v.T], (b, m, v, p)


def hizoo(theta, t, keys, memory):
    inverse = [np.ones(5), np.ones((6, 5))] if memory is None else memory
    u = drawn(zo_jax.gaussian(), keys)
    z = [[x / np.sqrt(s) for x, s in zip(d, inverse, strict=True)] for d in u]
    c = [central(theta, d, 0.1) for d in z]
    kappa = [curvature(theta, d, 0.1) for d in z]
    squares = mean_of(kappa, [[x**2 for x in d] for d in u])
    inverse = [0.8 * s + 0.2 * np.abs(x / 2 * s) for s, x in zip(inverse, squares, strict=True)]
    cu = mean_of(c, u)
    return [x / np.sqrt(s) for x, s in zip(cu, inverse, strict=True)], inverse


def conmezo(theta, t, keys, memory):
    sphere = drawn(zo_jax.sphere(), keys)  # √d u
    if memory is None:
        z, m = sphere, [0, 0]
    else:
        m = memory
        norm = np.sqrt(sum(np.sum(x**2) for x in m))
        along = [np.sqrt(35) * np.cos(1.2) * x / norm for x in m]
        z = [[a + np.sin(1.2) * x for a, x in zip(along, d, strict=True)] for d in sphere]
    g = mean_of([central(theta, d, 0.02) for d in z], z)
    return g, [0.9 * x + 0.1 * y for x, y in zip(m, g, strict=True)]


def sparse(theta, t, keys, memory):
    if memory is None:
        memory = [np.quantile(np.abs(x), 0.5) for x in theta]
    masks = [np.abs(x) <= h for x, h in zip(theta, memory, strict=True)]
    z = [[m * x for m, x in zip(masks, d, strict=True)] for d in drawn(zo_jax.gaussian(), keys)]
    return mean_of([central(theta, d, 0.02) for d in z], z), memory


def svrg(theta, t, keys, memory):
    z = drawn(zo_jax.rademacher(), keys)
    if t == 0:
        g = mean_of([central(theta, d, 0.02, FULL) for d in z], z)
        return g, (theta, g)
    snapshot, g = memory
    here = mean_of([central(theta, d, 0.02) for d in z], z)
    there = mean_of([central(snapshot, d, 0.02) for d in z], z)
    return [a - b + x for a, b, x in zip(here, there, g, strict=True)], memory


def example_slopes(theta, z, eps):
    """The projection of each example along its own direction."""
    return [central(theta, d, eps, X[i : i + 1]) for i, d in enumerate(z)]


def group_relative(c, z, eps):
    """Σ δ z / (2 σ B std(δ)), δ = 2 σ c."""
    delta = 2 * eps * np.array(c)
    return mean_of(delta / (2 * eps) / np.std(delta), z)


def grzo(theta, t, keys, memory):
    shared = jax.random.fold_in(jax.random.fold_in(KEY, t), 2**31)
    (_, u) = drawn(zo_jax.rademacher(), [shared])[0]
    # The vectors of the signs, in the order of the leaves: b, r, s.
    like = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (5, 6, 5)]
    signs = [[np.float64(x) for x in zo_jax.rademacher().direction(like, key)] for key in keys]
    z = [[b, u * np.outer(r, s)] for b, r, s in signs]
    return group_relative(example_slopes(theta, z, 0.02), z, 0.02), memory


def grzo_low_rank(theta, t, keys, memory):
    z = drawn(zo_jax.low_rank(1), keys)
    return group_relative(example_slopes(theta, z, 0.02), z, 0.02), memory


METHODS = {
    "fzoo": (methods.Fzoo(est(4, difference="forward")), fzoo),
    "1.5-spsa": (methods.CurvatureSpsa(est(epsilon=0.1), power=0.3, floor=0.5), spsa),
    "es": (methods.evolution_strategy(6, 0.1), es),
    "eggroll": (methods.eggroll(6, 0.1), eggroll),
    "lozo": (methods.Lozo(est(), rank=2, period=1), lozo),
    "lozo-m": (methods.Lozo(est(), rank=2, period=1, decay=0.7), lozo_m),
    "subzero": (methods.SubZero(est(), rank=2, period=1), subzero),
    "tezo-m": (methods.Tezo(est(), rank=3, decay=0.7), tezo),
    "zo-muon": (methods.ZoMuon(est(difference="forward"), rank=2, period=1), zo_muon),
    "mopi": (methods.Mopi(est(), rank=3, period=1, num_directions=2, decay=0.6), mopi),
    "hizoo": (
        methods.Hizoo(est(epsilon=0.1, perturbation="gaussian"), smoothing=0.2),
        hizoo,
    ),
    "conmezo": (methods.ConMezo(est(perturbation="sphere"), angle=1.2, decay=0.9), conmezo),
    "sparse-mezo": (methods.SparseMezo(est(perturbation="gaussian"), share=0.5), sparse),
    "grzo": (methods.Grzo(est(8)), grzo),
    "grzo-low-rank": (
        methods.Grzo(est(8, perturbation="low_rank"), use_flipout=False),
        grzo_low_rank,
    ),
    "mezo-svrg": (methods.MezoSvrg(est(), period=2), svrg),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_are_those_of_the_formula(name):
    method, reference = METHODS[name]
    tx = optax.chain(method.transformation(KEY), optax.sgd(RATE))
    extra = dict(full_batch=(FULL,)) if name == "mezo-svrg" else {}

    @jax.jit
    def two_steps(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params, value_fn=jax_loss, batch=(X,), **extra)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), length=2)[1]

    got = two_steps(START)
    theta, memory = [np.float64(START["b"]), np.float64(START["w"])], None
    q = method.estimator.num_queries
    for t in range(2):
        keys = jax.random.split(jax.random.fold_in(KEY, t), q)
        updates, memory = reference(theta, t, keys, memory)
        theta = plus(theta, -RATE, updates)
        moved = max(np.max(np.abs(theta[1] - START["w"])), 0.01)
        np.testing.assert_allclose(got["b"][t], theta[0], rtol=1e-4, atol=1e-3 * moved)
        np.testing.assert_allclose(got["w"][t], theta[1], rtol=1e-4, atol=1e-3 * moved)


# What all of them promise, of a small model with a look-up, a scan over layers, a table used twice,
# a scalar and an integer.


def model_params(dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(1), 3))
    draw = lambda *shape: (0.5 * jax.random.normal(next(keys), shape)).astype(dtype)
    blocks = {"w": draw(2, 6, 6), "b": draw(2, 6)}
    return dict(emb=draw(7, 6), blocks=blocks, scale=jnp.ones((), dtype), n=jnp.int32(3))


TOKENS = jnp.arange(24).reshape(8, 3) * 5 % 7


def token_losses(params, tokens):
    def block(x, p):
        return x + jnp.tanh(x @ p["w"] + p["b"][None, None]), None

    x, _ = jax.lax.scan(block, params["emb"][tokens], params["blocks"])
    logits = (params["scale"] * (x @ params["emb"].T)).astype(jnp.float32)
    next_tokens = (tokens + params["n"])[..., None] % 7
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), next_tokens, -1)[..., 0]


def model_loss(params, tokens):
    return jnp.mean(token_losses(params, tokens))


def loss_for(method):
    return token_losses if isinstance(method, methods.Agzo) else model_loss


def some_steps(method, params, state, numbers=None, length=None):
    """Some steps in a scan: (parameters, state), and the numbers of each."""
    tx = method.transformation(KEY)
    descent = lambda u: (-1e-3 * u).astype(u.dtype)

    def step(carry, numbers):
        params, state = carry
        known = dict(value_fn=loss_for(method), batch=(TOKENS,), unknown=1)
        known = known if numbers is None else dict(numbers=numbers)
        updates, state = tx.update(None, state, params, **known)
        assert jax.tree.map(jnp.dtype, updates) == jax.tree.map(jnp.dtype, params)
        params = optax.apply_updates(params, jax.tree.map(descent, updates))
        return (params, state), state.numbers

    return jax.lax.scan(step, (params, state), numbers, length=length)


# Float32 numbers that a method keeps between steps of that model, of 42 + 72 + 12 + 1 parameters; a
# method that is not here keeps none.
KEPT = {
    "lozo-m": (7 + 2 * 6) * 2 + 12 + 1,
    "tezo-m": (1 + 2) * 3 + 12 + 1,
    "mopi": (1 + 2) * (3 + 2) * 6 + 12 + 1,
    "hizoo": 127,
    "conmezo": 127,
    "sparse-mezo": 1 + 2 + 1 + 1,
    "mezo-svrg": 127 + 3,
    "agzo": 2 * 6,
}
# Its formula has a test of its own.
AGZO = methods.Agzo(est(), is_matrix=lambda path, leaf: path == "blocks/w")


@pytest.mark.parametrize("name", [*METHODS, "agzo"])
def test_what_every_method_promises(name):
    method = AGZO if name == "agzo" else METHODS[name][0]
    loss_fn = loss_for(method)
    num_traces = 0

    @jax.jit
    def two_steps(params, state):
        nonlocal num_traces
        num_traces += 1
        return some_steps(method, params, state, length=2)

    params = model_params()
    start = method.transformation(KEY).init(params)
    assert start.numbers.shape == (method.num_numbers,)
    floats = [x for x in jax.tree.leaves(start.memory) if x.dtype == jnp.float32]
    assert sum(x.size for x in floats) == KEPT.get(name, 0)
    (middle, state), first = two_steps(params, start)
    (end, last), second = two_steps(middle, state)
    assert int(last.count) == 4 and int(last.num_failed) == 0 and int(end["n"]) == 3
    assert np.all(np.isfinite(np.concatenate([first, second]))) and last.loss < 10
    for leaf in ("emb", "scale"):
        assert np.any(end[leaf] != params[leaf])

    # Resumed from what was saved, with the same compiled program, to the bit.
    saved = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (middle, state))
    (again, _), _ = two_steps(*saved)
    jax.tree.map(np.testing.assert_array_equal, again, end)
    # Another key draws other directions.
    _, other = two_steps(params, start._replace(key=start.key ^ jnp.uint32(1)))
    assert not np.any(other == first)
    assert num_traces == 1

    # Replayed from the numbers alone.
    if method.replays:
        numbers = jnp.concatenate([first, second])
        (replayed, _), _ = jax.jit(lambda *args: some_steps(method, *args))(params, start, numbers)
        near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        jax.tree.map(near, replayed, end)

    # Several queries at once, on the devices of a mesh.
    mesh = jax.make_mesh((1,), ("query",), axis_types=(AxisType.Auto,))
    options = dict(parallel_batch_size=2, mesh=mesh)
    chunked = dataclasses.replace(
        method, estimator=dataclasses.replace(method.estimator, **options)
    )

    def project(params, state):
        step = Step(state.key, state.count)
        memory = chunked.prepare(loss_fn, params, state.memory, step, TOKENS)
        return chunked.project(loss_fn, params, memory, step, TOKENS)

    _, numbers = jax.jit(project)(middle, state)
    np.testing.assert_allclose(numbers, second[0], rtol=1e-3, atol=1e-3 * np.max(np.abs(first)))

    # Parameters of 16 bits.
    halves = model_params(jnp.bfloat16)
    half_start = method.transformation(KEY).init(halves)
    one = jax.jit(lambda *args: some_steps(method, *args, length=1))
    (after, half_state), _ = one(halves, half_start)
    assert all(np.all(np.isfinite(np.float32(x))) for x in jax.tree.leaves(after))
    assert jax.tree.map(jnp.dtype, (after, half_state)) == jax.tree.map(
        jnp.dtype, (halves, half_start)
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: methods.Fzoo(est()), "Fzoo needs an estimator with difference 'forward'"),
        (lambda: methods.Fzoo(est(1, difference="forward")), "num_queries of at least 2"),
        (
            lambda: methods.Fzoo(est(difference="forward", batch_per_query=True)),
            "losses of one batch",
        ),
        (lambda: methods.weights_of({"name": "x"}), "must be None or"),
        (lambda: methods.CurvatureSpsa(est(difference="jvp")), "difference 'central'"),
        (lambda: methods.CurvatureSpsa(power=2.0), r"power must be in \[0, 1\]"),
        (lambda: methods.Lozo(rank=0), "rank must be a positive integer, got 0"),
        (lambda: methods.Lozo(decay=1.0), r"decay must be in \[0, 1\)"),
        (lambda: methods.SubZero(period=0.5), "period must be a positive integer"),
        (lambda: methods.Mopi(rank=4, num_directions=5), "at most the rank 4"),
        (lambda: methods.ConMezo(angle=2.0), "angle must be in"),
        (lambda: methods.SparseMezo(share=-0.1), "share must be in"),
        (lambda: methods.MezoSvrg(est(batch_per_query=True)), "set batch_per_query=False"),
        (lambda: methods.MezoSvrg(small_batch=0), "small_batch must be a positive integer"),
        (lambda: methods.evolution_strategy(population=1), "population must be at least 2"),
        (lambda: methods.Grzo(est(difference="forward")), "difference 'central'"),
        (lambda: methods.Method(est(has_aux=True)), "set has_aux=False"),
        (lambda: methods.Method(est(exact="head")), "set exact=None"),
        (lambda: methods.ConMezo(est(perturbation="low_rank")), "directions must be dense"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        method = make()
        tx = method.transformation(KEY)
        tx.update(None, tx.init(START), START, value_fn=lambda p: jnp.sum(p["w"]))


def test_what_is_missing_is_said():
    tx = methods.Fzoo().transformation(KEY)
    with pytest.raises(ValueError, match="Fzoo evaluates the loss of perturbed parameters"):
        tx.update(None, tx.init(START), START)
    tx = methods.dizo(KEY)
    with pytest.raises(ValueError, match="dizo evaluates the loss of scaled changes"):
        tx.update(START, tx.init(START), START)
    tx = methods.Grzo(est(4)).transformation(KEY)
    with pytest.raises(ValueError, match=r"num_queries = 4 examples.*got shape \(8, 6\)"):
        tx.update(None, tx.init(START), START, value_fn=jax_loss, batch=(X,))


def test_flipout_forms_nothing_in_products_look_ups_casts_and_scans():
    params = model_params()
    family = methods.flipout(params, KEY)

    def loss(params, tokens):
        half = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
        rows = jnp.take(params["emb"], tokens - 3, axis=0)  # the first of them do not exist
        # A layer, and some rows, with indices that are known and that are not.
        first, second = params["blocks"]["w"][0], params["blocks"]["w"][tokens[0, 0]]
        head = jax.lax.dynamic_slice_in_dim(params["emb"], tokens[0, 1] - 3, 4)
        x = jnp.ones((2, 6)) @ first @ second
        used = jnp.sum((x @ head.T) ** 2) + jnp.sum((x @ params["emb"][2:5].T) ** 2)
        return model_loss(jax.tree.map(half, params), tokens) + jnp.nansum(rows**2) + used

    def both(params, key, fn):
        moved = family.perturb(params, key, 0.1)
        form = lambda x: x.form() if hasattr(x, "form") else x
        formed = jax.tree.map(form, moved, is_leaf=lambda x: hasattr(x, "form"))
        with zo_jax.record_formed() as record:
            lazy = zo_jax.lazily(fn)(moved, TOKENS)
        assert record == []
        return lazy, fn(formed, TOKENS)

    lazy, formed = jax.jit(lambda *args: both(*args, model_loss))(params, KEY)
    np.testing.assert_allclose(lazy, formed, rtol=1e-5)
    lazy, formed = jax.jit(lambda *args: both(*args, loss))(params, KEY)
    np.testing.assert_allclose(lazy, formed, rtol=1e-2)


def test_directions_of_flipout_are_uncorrelated():
    """Of 4,000 pairs of directions of 20 entries, within 5 standard deviations."""
    params = jnp.zeros((4, 5))

    def products(key):
        shared, one, two = jax.random.split(key, 3)
        family = methods.flipout(params, shared)
        z, y = family.direction(params, one), family.direction(params, two)
        return z.reshape(-1, 1) * z.reshape(1, -1), z.reshape(-1, 1) * y.reshape(1, -1)

    own, other = jax.vmap(products)(jax.random.split(KEY, 4000))
    bound = 5 / np.sqrt(4000)
    np.testing.assert_allclose(np.mean(own, axis=0), np.eye(20), atol=bound)
    np.testing.assert_allclose(np.mean(other, axis=0), np.zeros((20, 20)), atol=bound)


def test_dizo_is_the_formula_and_replays():
    search = methods.dizo(KEY, period=2, num_iterations=3, clip=0.15, delta=0.02, rate=0.3)
    tx = optax.chain(optax.sgd(1.0), search)

    @jax.jit
    def step(params, state, updates, numbers=None):
        known = dict(value_fn=jax_loss, batch=(X,)) if numbers is None else dict(numbers=numbers)
        updates, state = tx.update(updates, state, params, **known)
        return optax.apply_updates(params, updates), state

    change = jax.tree.map(lambda x: 0.1 * jnp.sign(x), START)
    middle, state = step(START, tx.init(START), change)
    end, after = step(middle, state, change)
    theta = [np.float64(START[k]) for k in "bw"]
    moved = [p - 0.2 * np.sign(p) for p in theta]
    scaled = lambda s: [p + a * (m - p) for p, m, a in zip(theta, moved, s, strict=True)]
    s, step_key = np.ones(2), jax.random.fold_in(KEY, 1)
    for i in range(3):
        key = jax.random.fold_in(step_key, i)
        n = np.array(
            [normal(jax.random.fold_in(key, leaf), (1,) * (leaf + 1)).item() for leaf in (0, 1)]
        )
        c = (L(scaled(s + 0.02 * n)) - L(scaled(s - 0.02 * n))) / 0.04
        np.testing.assert_allclose(after[1].numbers[i], c, rtol=2e-3, atol=1e-5)
        s = np.clip(s - 0.3 * c * n, 0.85, 1.15)
    assert np.any(s != 1)
    for k, wanted in zip("bw", theta, strict=True):
        np.testing.assert_allclose(middle[k], wanted - 0.1 * np.sign(wanted), rtol=1e-5)
    for k, wanted in zip("bw", scaled(s), strict=True):
        np.testing.assert_allclose(end[k], wanted, rtol=1e-4, atol=1e-4)
    replayed, _ = step(middle, state, change, after[1].numbers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), replayed, end)


@pytest.mark.parametrize("input_axis", [-2, -1])
def test_agzo_moves_in_the_span_of_its_inputs(input_axis):
    """Two steps from the formula; the second matrix is a stack in a loop."""
    rng = np.random.default_rng(4)
    flip = (lambda w: w) if input_axis == -2 else (lambda w: np.swapaxes(w, -1, -2).copy())
    start = {"stack": flip(rng.normal(size=(2, 6, 6))), "w": flip(rng.normal(size=(6, 5)))}
    start = jax.tree.map(np.float32, start) | {"b": np.zeros(6, np.float32)}
    # Inputs with a leading direction that power iterations find in float32.
    x = (rng.normal(size=(2, 4, 6)) * [5, 1, 1, 1, 0.5, 0.5]).astype(np.float32)
    product = lambda h, w: h @ (w if input_axis == -2 else w.swapaxes(-1, -2))

    def token_losses(params, x):
        layer = lambda h, w: (jnp.tanh(product(h, w) + params["b"][None, None]), None)
        h, _ = jax.lax.scan(layer, x, params["stack"])
        return jnp.mean((product(h, params["w"]) - 0.3) ** 2, axis=-1)

    def loss_and_inputs(theta):
        b, stack, w = theta
        inputs, h = [], np.float64(x)
        for layer in stack:
            inputs.append(h)
            h = np.tanh(product(h, layer) + b)
        return np.mean((product(h, w) - 0.3) ** 2), [*inputs, h]

    method = methods.Agzo(est(), rank=2, num_iterations=60, input_axis=input_axis)
    tx = method.transformation(KEY)
    state, params = tx.init(start), start
    update = jax.jit(
        lambda state, params: tx.update(None, state, params, value_fn=token_losses, batch=(x,))
    )
    theta = [np.float64(start[k]) for k in ("b", "stack", "w")]
    for t in range(2):
        _, inputs = loss_and_inputs(theta)
        flat = [h.reshape(-1, 6) for h in inputs]
        # Where A is a basis of the right span, which one decides what R means: the one that was
        # found is taken.
        updates, state = update(state, params)
        found = [np.float64(a) for a in state.memory if a is not None]
        A = [*found[0], found[1]]
        for a, h in zip(A, flat, strict=True):
            top = np.linalg.eigh(h.T @ h)[1][:, -2:]
            np.testing.assert_allclose(a @ a.T, top @ top.T, atol=2e-3)
        keys = jax.random.split(Step(jax.random.key_data(KEY), jnp.int32(t)).key, 3)
        like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((6,), (2, 6, 2), (5, 2))]
        gradient = [0 * p for p in theta]
        for key in keys:
            b, r_stack, r = (np.float64(z) for z in zo_jax.gaussian().direction(like, key))
            of = (lambda a, r: a @ r.T) if input_axis == -2 else (lambda a, r: r @ a.T)
            z = [b, np.stack([of(a, q) for a, q in zip(A, r_stack, strict=False)]), of(A[2], r)]
            ends = [loss_and_inputs(plus(theta, s * 0.02, z))[0] for s in (1, -1)]
            c = (ends[0] - ends[1]) / 0.04
            gradient = [g + c * d / 3 for g, d in zip(gradient, z, strict=True)]
        for name, g in zip(("b", "stack", "w"), gradient, strict=True):
            np.testing.assert_allclose(updates[name], g, rtol=2e-3, atol=2e-3 * np.abs(g).max())
        params = jax.tree.map(lambda p, u: p - RATE * u, params, updates)
        theta = [np.float64(params[k]) for k in ("b", "stack", "w")]
    with pytest.raises(ValueError, match="Agzo depends on its data: pass value_fn"):
        tx.update(None, state, params, numbers=state.numbers)
    plain = methods.Agzo(est(), is_matrix=lambda path, leaf: path == "w")
    assert [a is None for a in plain.init(start)] == [True, True, False]


def test_addax_mixes_the_estimate_and_the_gradient():
    tx = methods.addax(KEY, alpha=0.3, estimator=est())
    updates, state = jax.jit(
        lambda p, s: tx.update(None, s, p, value_fn=jax_loss, batch=(FULL,), fo_batch=(X,))
    )(START, tx.init(START))
    keys = jax.random.split(jax.random.fold_in(KEY, 0), 3)
    theta = [np.float64(START[k]) for k in "bw"]
    z = drawn(zo_jax.rademacher(), keys)
    estimate = mean_of([central(theta, d, 0.02, FULL) for d in z], z)
    exact = jax.grad(jax_loss)(START, X)
    for i, k in enumerate("bw"):
        wanted = 0.3 * estimate[i] + 0.7 * np.float64(exact[k])
        np.testing.assert_allclose(updates[k], wanted, rtol=1e-3, atol=1e-4)
    assert int(state.count) == 1


def test_addax_takes_two_parts_of_a_batch():
    parts = dict(fo_batch=(FULL[:2],), batch=(FULL[2:],))

    def updates_of(small_batch, **given):
        tx = methods.addax(KEY, alpha=0.3, estimator=est(), small_batch=small_batch)
        return tx.update(None, tx.init(START), START, value_fn=jax_loss, **given)[0]

    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(near, updates_of(2, batch=(FULL,)), updates_of(None, **parts))
    # What is given apart is no part of the batch.
    jax.tree.map(near, updates_of(2, **parts), updates_of(None, **parts))
    with pytest.raises(ValueError, match="small_batch must be a positive integer"):
        methods.addax(KEY, small_batch=0)
    with pytest.raises(ValueError, match="set batch_per_query=False"):
        methods.addax(KEY, small_batch=1, estimator=zo_jax.Estimator(2, batch_per_query=True))


def test_states_share_no_buffers_and_leave_the_key_alone():
    """So that they can be donated, together and with the parameters."""
    params = jax.tree.map(jnp.asarray, START)
    made = [
        zo_jax.zeroth_order(KEY),
        zo_jax.evolution(KEY, population=4),
        zo_jax.activation_zeroth_order(KEY),
        methods.dizo(KEY),
        *(method.transformation(KEY) for method, _ in METHODS.values()),
        AGZO.transformation(KEY),
    ]
    states = [tx.init(params) for tx in made]
    leaves = [x for x in jax.tree.leaves((KEY, params, states)) if x.size]
    words = jax.random.key_data
    leaves = [words(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    places = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(places)) == len(places)


def test_sparse_mezo_trains_what_begins_alike():
    params = {"up": jnp.zeros((4, 3)), "w": jnp.asarray(START["w"])}
    tx = methods.SparseMezo(share=0.5).transformation(KEY)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(
            None, state, params, value_fn=lambda p: jnp.sum((p["up"] - 1) ** 2) + jnp.sum(p["w"])
        )
        assert jnp.all(updates["up"] != 0) and 0 < jnp.sum(updates["w"] != 0) < START["w"].size
        params = optax.apply_updates(params, jax.tree.map(lambda u: -1e-2 * u, updates))


def test_svrg_takes_its_small_batch_from_the_large_one():
    """As if both were handed in."""
    params, x = {"w": jnp.arange(6.0)}, jax.random.normal(jax.random.key(1), (8, 6))
    loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"]))
    own, apart = (methods.MezoSvrg(period=2, small_batch=n) for n in (3, None))
    memory = own.init({"w": jnp.zeros(6)})
    for count in (0, 1):
        step = methods.Step(np.zeros(2, np.uint32), jnp.int32(count))
        found = own.project(loss, params, memory, step, x)
        expected = apart.project(loss, params, memory, step, x[:3], full_batch=(x,))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        of_all = apart.project(loss, params, memory, step, x)
        assert np.array_equal(found[1], of_all[1]) == (count == 0)
