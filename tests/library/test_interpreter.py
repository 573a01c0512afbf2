"""Any function under `lazily` is what it is on formed arrays: values, derivatives, what is formed and when."""

import functools
import os

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from programs import Program, programs, values

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


def assert_close(lazy, formed, tolerance):
    lazy, formed = np.float64(lazy), np.float64(formed)
    assert lazy.shape == formed.shape
    np.testing.assert_array_equal(np.isfinite(lazy), np.isfinite(formed))
    formed = np.where(np.isfinite(formed), formed, 0)
    largest = max(1.0, np.max(np.abs(formed), initial=0))
    np.testing.assert_allclose(
        np.where(np.isfinite(lazy), lazy, 0), formed, rtol=0, atol=tolerance * largest
    )


@settings(
    max_examples=int(os.environ.get("ZO_JAX_FUZZ_EXAMPLES", 60)),
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
        assert_close(a, b, 16 * narrowest)
