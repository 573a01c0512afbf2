"""What depends on nothing perturbed is evaluated once, and changes no result."""

import dataclasses
import functools
import os

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
from nets import Net, nets
import numpy as np
from programs import values
import pytest
from test_interpreter import FAMILIES, QUICK, form

import zo_jax
from zo_jax.programs import in_halves
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import GPT
from zo_jax.train.scopes import make_scope

KEY = jax.random.key(5)


@settings(
    max_examples=int(os.environ.get("ZO_JAX_FUZZ_EXAMPLES", 16)),
    deadline=None,
    derandomize="ZO_JAX_FUZZ_EXAMPLES" not in os.environ,
    database=None,
)
@given(nets(), st.sampled_from(sorted(FAMILIES)))
def test_any_net_in_halves(net: Net, family_name: str):
    family = FAMILIES[family_name]
    direction = family.draw(net.moved, KEY)
    move = lambda scale: family.move(net.moved, direction, scale)

    def in_two(scale):
        first, second = in_halves(net.run, net.moved, [True] * len(net.moved))
        kept = first()
        return jax.jvp(lambda scale: second(kept, move(scale)), (scale,), (jnp.float32(1),))

    def whole(scale):
        # The function of `jax.custom_vjp`, which forward mode forbids, is left out by `lazily`.
        run = lambda scale: zo_jax.lazily(net.run)(form(move(scale)))
        return jax.jvp(run, (scale,), (jnp.float32(1),))

    both = jax.jit(lambda scale: (in_two(scale), whole(scale)), **QUICK)
    for a, b in zip(*map(jax.tree.leaves, both(jnp.float32(0.1))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1, np.abs(b).max()))


class Counter:
    """Counts how often a value is computed."""

    def __init__(self):
        self.counts = {}

    def __call__(self, name, x):
        def count(x):
            self.counts[name] = self.counts.get(name, 0) + 1
            return x

        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(count, shape, x, vmap_method="expand_dims")

    def of(self, function, *args):
        self.counts = {}
        jax.block_until_ready(jax.jit(function)(*args))
        jax.effects_barrier()
        return self.counts


STACK, HEAD = 0.5 * values((4, 5, 5)), values((5, 3), 1)
X = values((6, 2, 5), 2)


def counted_loss(count, trained, x):
    """Four scanned layers of which the last ones are trained, and a head."""
    stack = jnp.concatenate([STACK[: 4 - len(trained["layers"])], trained["layers"]])
    step = lambda x, w: (count("layer", jnp.tanh(x @ w)), None)
    x, _ = lax.scan(step, count("input", x), stack)
    return jnp.mean(count("head", x @ trained["head"]) ** 2)


@pytest.mark.parametrize(
    ("options", "batch", "expected"),
    [
        (dict(), X[0], dict(input=1, layer=3 + 12, head=12)),
        (dict(difference="forward"), X[0], dict(input=1, layer=3 + 7, head=7)),
        (dict(batch_per_query=True), X, dict(input=6, layer=18 + 12, head=12)),
        (
            dict(batch_per_query=True, difference="forward"),
            X,
            dict(input=6, layer=18 + 12, head=12),
        ),
        (dict(batch_chunks=2), X[0], dict(input=2, layer=2 * (3 + 12), head=24)),
        # Of a mapped evaluation the callback has all in one.
        (dict(parallel_batch_size=6), X[0], dict(input=1, layer=3 + 2, head=2)),
    ],
)
def test_how_often_each_part_is_evaluated(options, batch, expected):
    count = Counter()
    trained = {"layers": STACK[3:], "head": HEAD}
    loss = functools.partial(counted_loss, count)
    project = lambda trained, x: zo_jax.project(loss, trained, KEY, x, num_queries=6, **options)
    assert count.of(project, trained, batch) == expected


def test_everything_is_evaluated_each_time_if_all_is_moved():
    count = Counter()
    loss = functools.partial(counted_loss, count)
    project = lambda p: zo_jax.project(lambda p: loss(p, p["x"]), p, KEY, num_queries=2)
    assert count.of(project, {"layers": STACK, "head": HEAD, "x": X[0]}) == dict(
        input=4, layer=16, head=4
    )


def test_effects_are_had_each_time(capfd):
    def loss(w):
        x = STACK[0] @ STACK[1]
        jax.debug.print("known {}", x[0, 0])
        return jnp.sum(x * w)

    project = jax.jit(lambda w: zo_jax.project(jax.jit(loss), w, KEY, num_queries=3))
    jax.block_until_ready(project(STACK[2]))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("known") == 6


def test_what_costs_nothing_or_is_large_is_not_kept():
    """A mask and casts are made again; of what is broadcast the source is kept."""
    ids = jnp.arange(7)

    def loss(w):
        mask = jnp.tril(jnp.ones((64, 64)))
        scores = jnp.sum(STACK[0] @ STACK[1], axis=0)[:1, None] * mask
        return jnp.sum(scores * w) + jnp.sum(jax.nn.one_hot(ids, 64) @ w)

    first, second = in_halves(loss, values((64, 64)), [True])
    kept = [x.shape for x in jax.tree.leaves(jax.eval_shape(first))]
    assert kept == [(1, 1)]
    inner = jax.make_jaxpr(lambda w: second(first(), w))(values((64, 64)))
    assert [eqn.primitive.name for eqn in inner.eqns].count("dot_general") == 2
    nothing_known, _ = in_halves(lambda w: jnp.sum(w @ w), values((5, 5)), [True])
    assert nothing_known() == ()


def test_what_a_turn_passes_on_is_known_though_the_turn_is_not():
    """The carry below the last layer, which is then evaluated in another way."""
    count = Counter()

    def loss(last):
        stack = jnp.concatenate([STACK[:3], last[None]])
        step = lambda carry, w: ((count("layer", jnp.tanh(carry[0] @ w)), carry[0]), None)
        (_, below), _ = lax.scan(step, (X[0], X[0]), stack)
        below = count("below", below @ HEAD)
        return jnp.sum(below @ last[:3, :3]) + jnp.sum(below @ below.T)

    project = lambda last: zo_jax.project(loss, last, KEY, num_queries=6)
    assert count.of(project, STACK[3]) == dict(layer=3, below=1)
    first, second = in_halves(loss, STACK[3], [True])
    kept = [x.shape for x in jax.tree.leaves(jax.eval_shape(first))]
    assert sorted(kept) == [(), (2, 3)]
    moved = STACK[3] + 1
    np.testing.assert_allclose(second(first(), moved), jax.jit(loss)(moved), rtol=1e-5)


MODEL = GPT(97, num_layers=3, num_heads=2, width=32, context_length=16, tied_head=False)
PARAMS = jax.tree.map(lambda x: 4 * x, MODEL.fresh(jax.random.key(0)))
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 97)


@pytest.mark.parametrize(
    "scope, difference",
    [
        ("^blocks/(1|2)/(fc|ln_2)", "central"),
        ("^blocks/(1|2)/(fc|ln_2)", "jvp"),
        ("^blocks/2/fc/bias|^head", "central"),
        ("^ln_f", "jvp"),
    ],
)
def test_scopes_of_a_gpt_equal_plain_evaluations(scope, difference):
    scope = make_scope(scope, MODEL)
    loss = lambda trained, tokens: next_token_loss(MODEL, scope.merge(PARAMS, trained), tokens)
    trained, epsilon = scope.select(PARAMS), 1e-2
    options = dict(num_queries=3, epsilon=epsilon, difference=difference)
    estimate = lambda t: zo_jax.project(loss, trained, KEY, t, **options)
    mean, projections = jax.jit(estimate)(TOKENS)
    family, keys = zo_jax.rademacher(), jax.random.split(KEY, 3)

    @jax.jit
    def plain(key):
        at = lambda scale: loss(form(family.perturb(trained, key, scale)), TOKENS)
        if difference == "jvp":
            return jax.value_and_grad(at)(0.0)
        plus, minus = at(epsilon), at(-epsilon)
        return (plus + minus) / 2, (plus - minus) / (2 * epsilon)

    losses, slopes = zip(*map(plain, keys), strict=True)
    np.testing.assert_allclose(mean, np.mean(losses), rtol=1e-5)
    # A loss of about 5 has float32 rounding of some 5e-7, divided by epsilon.
    np.testing.assert_allclose(projections, slopes, rtol=1e-3, atol=3e-4)


def test_under_vmap_on_a_mesh_and_with_aux():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("query",))
    trained = {"layers": STACK[2:], "head": HEAD}

    def loss(trained, x):
        value = counted_loss(lambda name, x: x, trained, x)
        return value, {"input": x, "loss": value}

    options = dict(num_queries=3, has_aux=True)
    run = lambda **more: lambda x: zo_jax.project(loss, trained, KEY, x, **options, **more)
    expected = jax.jit(run())(X[0])
    for a, b in zip(
        jax.tree.leaves(jax.jit(run(mesh=mesh))(X[0])), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    mapped = jax.jit(jax.vmap(run()))(X[:2])
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-4)
    assert expected[2]["input"].shape == (3, *X[0].shape)


@dataclasses.dataclass(frozen=True)
class MovesAll(zo_jax.Family):
    """Of which `moves` tells less than `move` does."""

    def draw(self, params, key):
        return ()

    def move(self, params, direction, scale):
        return jax.tree.map(lambda x: x + scale, params)

    def moves(self, params):
        return [False, True]


def test_a_family_that_moves_what_it_says_it_does_not():
    with pytest.raises(ValueError, match="mend one of the two"):
        zo_jax.project(
            lambda p: jnp.sum(p["a"] * p["b"]),
            {"a": jnp.ones(2), "b": jnp.ones(2)},
            KEY,
            perturbation=MovesAll(),
        )
