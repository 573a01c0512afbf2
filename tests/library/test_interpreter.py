"""Any function under `lazily` is what it is on formed arrays: values, derivatives, what is formed
and when.
"""

import functools
import os

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from programs import Program, opaque, programs, values
import pytest

import zo_jax

FAMILIES = {
    "rademacher": zo_jax.rademacher(),
    "gaussian": zo_jax.gaussian(),
    "low_rank_1": zo_jax.low_rank(1),
    "low_rank_2": zo_jax.low_rank(2),
}
EPSILON = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}
# Compiled without optimisation, which takes most of the time that such small programs take.
QUICK = dict(
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
)


def form(tree):
    is_perturbed = lambda x: isinstance(x, zo_jax.Perturbed)
    return jax.tree.map(lambda x: x.form() if is_perturbed(x) else x, tree, is_leaf=is_perturbed)


@functools.cache
def drawn(family_name, shape):
    return FAMILIES[family_name].draw(values(shape), jax.random.key(7))


def assert_close(lazy, formed, tolerance, num_terms=0):
    lazy, formed = np.float64(lazy), np.float64(formed)
    assert lazy.shape == formed.shape
    np.testing.assert_array_equal(np.isfinite(lazy), np.isfinite(formed))
    formed = np.where(np.isfinite(formed), formed, 0)
    # What is left of a sum whose terms cancel has the rounding of the terms.
    largest = max(1.0, np.max(np.abs(formed), initial=0), num_terms**0.5)
    np.testing.assert_allclose(
        np.where(np.isfinite(lazy), lazy, 0), formed, rtol=0, atol=tolerance * largest
    )


@settings(
    max_examples=int(os.environ.get("ZO_JAX_FUZZ_EXAMPLES", 40)),
    deadline=None,
    derandomize="ZO_JAX_FUZZ_EXAMPLES" not in os.environ,
    database=None,
)
@given(programs(), st.sampled_from(sorted(FAMILIES)), st.booleans())
def test_any_program(program: Program, family_name: str, backward: bool):
    w = values(program.shape).astype(program.dtype)
    direction = drawn(family_name, program.shape)
    perturbed = lambda w, scale: FAMILIES[family_name].move(w, direction, scale)
    lazy = lambda w, scale: zo_jax.lazily(program.run)(perturbed(w, scale))
    formed = lambda w, scale: program.plain(form(perturbed(w, scale)))

    def results(function, w, scale):
        value, slope = jax.jvp(lambda scale: function(w, scale), (scale,), (jnp.float32(1),))
        if not (backward and program.is_reversible):
            return value, slope
        inner = lambda w, scale: jnp.vdot(
            values(value.shape, 4), function(w, scale).astype(jnp.float32)
        )
        return value, slope, *jax.grad(inner, (0, 1))(w, scale)

    both = jax.jit(lambda w, scale: (results(lazy, w, scale), results(formed, w, scale)), **QUICK)
    (lazy_value, *lazy_slopes), (value, *slopes) = both(w, jnp.float32(0.1))
    narrowest = max(EPSILON.get(dtype, 0) for dtype in program.dtypes)
    assert_close(lazy_value, value, 16 * narrowest)
    if "float8_e4m3fn" in program.dtypes:
        narrowest = 2**-3  # the derivative of a cast is rounded as its value is
    for a, b in zip(lazy_slopes, slopes, strict=True):
        assert_close(a, b, 16 * narrowest, value.size)


W, X = values((6, 8)), values((5, 6))
LOW_RANK = zo_jax.low_rank(1)


def formed_in(function, family=LOW_RANK, params=W):
    """(primitive, shape) of what is formed."""
    with zo_jax.record_formed() as formed:
        zo_jax.lazily(function)(family.perturb(params, jax.random.key(0), 0.1))
    return [(f.primitive, f.shape) for f in formed]


RECORDED = {
    "return": (lambda w: (w, w.T), [("return", (6, 8)), ("return", (8, 6))]),
    "scan": (
        lambda w: lax.scan(lambda c, _: (2 * c, None), w, length=2)[0],
        [("scan", (6, 8))],
    ),
    "while": (
        lambda w: lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w + 9, w),
        [("while", (6, 8))],
    ),
    "dot_general": (lambda w: w @ w.T, [("dot_general", (8, 6))]),
    "add": (lambda w: w + w, [("add", (6, 8)), ("add", (6, 8))]),
    "exp": (lambda w: jax.jit(jax.checkpoint(jnp.exp))(w), [("exp", (6, 8))]),
    "cond": (lambda w: lax.cond(w[0, 0] > 0, lambda w: w.T, lambda w: 2 * w.T, w), None),
}


@pytest.mark.parametrize("name", RECORDED)
def test_everything_formed_is_recorded(name):
    function, expected = RECORDED[name]
    found = formed_in(function)
    assert found == expected if expected else ("cond", (8, 6)) in found


def test_records_inside_records():
    with zo_jax.record_formed() as outer:
        formed_in(lambda w: jnp.exp(w))
        with zo_jax.record_formed() as inner:
            formed_in(jnp.sin)
        formed_in(jnp.cos)
    assert [f.primitive for f in inner] == ["sin"]
    assert [f.primitive for f in outer] == ["exp", "sin", "cos"]
    assert "test_interpreter.py" in outer[0].where


IN_LOOPS = {
    "a scan": lambda f, w: lax.scan(lambda c, i: (c + f(w), None), 0.0, length=3)[0],
    "a while": lambda f, w: lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] + f(w)), (0, 0.0)
    )[1],
    "a while's condition": lambda f, w: lax.while_loop(lambda s: s < f(w), lambda s: s + 1e6, 0.0),
    "calls in a scan": lambda f, w: lax.map(
        lambda i: jax.jit(jax.checkpoint(f))(w) * i, jnp.ones(2)
    ),
    "a branch in a scan": lambda f, w: lax.map(
        lambda i: lax.cond(i > 0, f, lambda w: 0.0, w), jnp.ones(2)
    ),
    "two loops": lambda f, w: lax.map(
        lambda i: lax.map(lambda j: i * j * f(w), i), jnp.ones((2, 2))
    ),
}


@pytest.mark.parametrize("name", IN_LOOPS)
def test_loops_form_once(name):
    """What is formed is formed by the outermost loop, before it begins; what need not be is not."""
    run = lambda f: lambda w: IN_LOOPS[name](f, w)
    outermost = "while" if "while" in name else "scan"
    few_vectors = lambda w: jnp.sum((X @ w) ** 2)
    assert formed_in(run(few_vectors), zo_jax.rademacher()) == [(outermost, (6, 8))]
    assert formed_in(run(few_vectors)) == []
    elementwise = lambda w: jnp.sum(jnp.exp(w.T))
    assert formed_in(run(elementwise)) == [(outermost, (6, 8))]
    rows = lambda w: jnp.sum(w[jnp.array([0, 2])])
    assert not [f for f in formed_in(run(rows), zo_jax.rademacher()) if f[1] == (6, 8)]


def test_layers_of_a_cell_in_time_are_formed_once():
    """A stack of layers that is scanned in every turn of an outer loop, each layer with few
    vectors.
    """
    stack = values((3, 6, 6))
    layers = lambda w, h: lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), h, w)[0]
    in_time = lambda w: lax.scan(lambda h, _: (layers(w, h), None), X, length=4)[0]
    assert formed_in(in_time, zo_jax.rademacher(), stack) == [("scan", (3, 6, 6))]
    assert formed_in(in_time, LOW_RANK, stack) == []
    once = lambda w: layers(w, X)
    assert formed_in(once, zo_jax.rademacher(), stack) == [("dot_general", (6, 6))]


PLACES = {
    "jit": lambda f, x: jax.jit(lambda x: 2 * f(x))(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "scan": lambda f, x: lax.scan(lambda c, r: (c, f(r)), 0, x)[1],
    "cond": lambda f, x: lax.cond(x[0, 0] > 0, f, lambda x: 3 * f(x), x),
    "while": lambda f, x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, f(s[1])), (0, x))[
        1
    ],
    "jit in scan in jit": lambda f, x: jax.jit(
        lambda x: lax.scan(lambda c, r: (c, jax.jit(f)(r)), 0, x)[1]
    )(x),
    "vmap": lambda f, x: jax.vmap(jax.jit(f))(x),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sees", ["the parameters", "what they made"])
def test_forward_mode_through_custom_vjp(place, sees):
    inside = lambda f, w: (
        PLACES[place](f, w) if sees == "the parameters" else PLACES[place](f, X @ w)
    )
    loss = lambda f: lambda w: jnp.sum(jnp.tanh(inside(f, w)))
    family = zo_jax.rademacher()
    key = jax.random.key(1)
    _, projections = zo_jax.project(
        loss(opaque), W, key, num_queries=2, perturbation=family, difference="jvp"
    )
    plain = loss(lambda x: 2 * x)
    directions = [family.direction(W, k) for k in jax.random.split(key, 2)]
    expected = [jax.jvp(plain, (W,), (z,))[1] for z in directions]
    np.testing.assert_allclose(projections, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("difference", ["central", "forward", "jvp"])
def test_backward_through_an_estimate(family, difference):
    loss = lambda w: jnp.sum(jnp.tanh(X @ w) ** 2)

    def of_estimate(w):
        estimate = zo_jax.estimate_gradient(
            loss,
            w,
            jax.random.key(2),
            num_queries=2,
            epsilon=1e-1,
            perturbation=FAMILIES[family],
            difference=difference,
        )
        return jnp.sum(estimate.gradient**2) + estimate.loss

    backward, forward = jax.jit(lambda w: (jax.grad(of_estimate)(w), jax.jacfwd(of_estimate)(w)))(W)
    np.testing.assert_allclose(backward, forward, rtol=1e-3, atol=1e-3)


def test_equal_calls_share_one_body():
    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ w)

    def model(params):
        x = X[:, :4]
        for w in params:
            x = layer(w, x)
        return x

    params = [values((4, 4), i) for i in range(5)]
    for family in (zo_jax.rademacher(), zo_jax.gaussian(), LOW_RANK):
        perturbed = family.perturb(params, jax.random.key(0), 0.1)
        with zo_jax.record_formed() as formed:
            jaxpr = jax.make_jaxpr(zo_jax.lazily(model))(perturbed)
        calls = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "layer"]
        assert len(calls) == 5 and len({id(eqn.params["jaxpr"]) for eqn in calls}) == 1
        assert len(formed) == (family is not LOW_RANK)
        np.testing.assert_allclose(
            zo_jax.lazily(model)(perturbed), model(form(perturbed)), rtol=1e-5, atol=1e-5
        )
