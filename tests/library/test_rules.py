"""What primitives do with perturbed arrays without forming them, and rules of one's own."""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import zo_jax
from zo_jax import composed, products

KEY = jax.random.key(3)
FAMILIES = {
    "rademacher": zo_jax.rademacher(),
    "gaussian": zo_jax.gaussian(),
    "low_rank_1": zo_jax.low_rank(1),
    "low_rank_2": zo_jax.low_rank(2),
}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


W, S, X = normal(6, 8), normal(3, 6, 8), normal(5, 6)


def form(tree):
    is_perturbed = lambda x: isinstance(x, zo_jax.Perturbed)
    return jax.tree.map(lambda x: x.form() if is_perturbed(x) else x, tree, is_leaf=is_perturbed)


def both(function, params, family, scale=0.1):
    """(the value lazily, the value of the formed arrays, what was formed of matrices), in one
    program whose casts round.
    """

    def run(params):
        perturbed = family.perturb(params, KEY, scale)
        return zo_jax.lazily(function)(perturbed), function(form(perturbed))

    run = jax.jit(run, compiler_options={"xla_allow_excess_precision": False})
    with zo_jax.record_formed() as formed:
        lazy, whole = run(params)
    return lazy, whole, formed


@families
@pytest.mark.parametrize("narrow", ["bfloat16", "float16", "float8_e4m3fn"])
def test_a_cast_to_fewer_bits_rounds(family, narrow):
    round_trip = lambda w: w.astype(narrow).astype(jnp.float32)
    widen = lambda w: w.astype(jnp.float32)
    params = {"w": W, "of its own": W.astype(narrow), "half": W.astype("bfloat16")}
    lazy, formed, _ = both(
        lambda p: {
            "exact": (round_trip(p["w"]), widen(p["of its own"])),
            "near": (X @ round_trip(p["w"]), X @ widen(p["half"])),
        },
        params,
        family,
    )
    jax.tree.map(np.testing.assert_array_equal, lazy["exact"], formed["exact"])
    assert not np.array_equal(lazy["exact"][0], form(family.perturb(params, KEY, 0.1))["w"])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, lazy["near"], formed["near"])


def test_a_cast_that_loses_nothing_is_undone():
    x = zo_jax.low_rank(1).perturb(W.astype(jnp.bfloat16), KEY, 0.1)
    assert isinstance(x.cast(jnp.float32), zo_jax.perturbed.Cast)
    assert x.cast(jnp.float32).cast(jnp.bfloat16) is x
    assert x.cast(jnp.float16).cast(jnp.bfloat16) is not x  # float16 has a smaller range


@families
@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_look_ups_out_of_bounds(family, mode):
    ids = (
        jnp.array([[0, -1, 5], [6, 99, -7]])
        if mode != "promise_in_bounds"
        else jnp.array([[0, 5, -1]])
    )
    fill = dict(fill_value=0) if mode == "fill" else {}
    look_up = lambda w: [
        w.at[(*(slice(None),) * axis, ids)].get(mode=mode, **fill) for axis in range(w.ndim)
    ]
    lazy, formed, _ = both(lambda tables: [look_up(w) for w in tables], [W, S, normal(6)], family)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, lazy, formed)


@families
def test_padding_has_no_gradient(family):
    ids = jnp.array([0, 99, 2, -100])
    loss = lambda w: jnp.sum(w.at[ids].get(mode="fill", fill_value=0) * 5)
    slope = jax.jit(jax.grad(lambda s: zo_jax.lazily(loss)(family.perturb(W, KEY, s))))(0.0)
    z = jax.jit(family.direction)(W, KEY)
    np.testing.assert_allclose(slope, 5 * jnp.sum(z[jnp.array([0, 2])]), rtol=1e-5)


@families
def test_look_ups_in_a_cast_table(family):
    ids = jnp.array([0, 99, 2])
    rows = lambda w, fill: w.astype(jnp.float32).at[ids].get(mode="fill", fill_value=fill)
    # 0.1 is no number of bfloat16: there the table is formed.
    look_up = lambda w: [rows(w, fill) for fill in (jnp.nan, 0, 0.1)]
    table = W.astype(jnp.bfloat16)
    lazy, formed, log = both(look_up, table, family)
    jax.tree.map(np.testing.assert_array_equal, lazy, formed)
    assert [f.primitive for f in log].count("gather") == 1


@families
@pytest.mark.parametrize("mode", ["drop", "clip", "promise_in_bounds"])
def test_layers_put_in_a_stack(family, mode):
    is_kept = lambda indices: mode != "promise_in_bounds" or all(-3 <= i < 3 for i in indices)
    places = [i for i in ([2, 0], [1, 1], [7, 1], [-1, 0], [-9, 2]) if is_kept(i)]
    put = lambda w, i: jnp.ones(S.shape).at[jnp.array(i)].set(w, mode=mode)
    layers = lambda w, i: lax.scan(lambda carry, layer: (carry, X @ layer), 0, put(w, i))[1]
    lazy, formed, _ = both(lambda w: [(put(w, i), layers(w, i)) for i in places], S[:2], family)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, lazy, formed)


def test_layers_of_low_rank_in_a_stack_are_not_formed():
    put = lambda w: jnp.ones(S.shape).at[jnp.array([2, 0])].set(w)
    layers = lambda w: lax.scan(lambda carry, layer: (carry, X @ layer), 0, put(w))[1]
    assert both(layers, S[:2], zo_jax.low_rank(1))[2] == []


NOT_FORMED = {
    "experts": (S, lambda w: jnp.einsum("ebi,eio->ebo", normal(3, 5, 6), w)),
    "mapped layers": (S, lambda w: jax.vmap(lambda x, w: x @ w)(normal(3, 5, 6), w)),
    "[H, D, C]": (S, lambda w: jnp.einsum("bhd,hdc->bc", normal(5, 3, 6), w)),
    "all experts": (S, lambda w: jnp.einsum("bi,eio->beo", X, w)),
    "from the right": (W, lambda w: jnp.einsum("oi,bi->bo", w, normal(5, 8))),
    "split": (W, lambda w: [X @ part for part in jnp.split(w, 2, axis=1)]),
    "columns": (W, lambda w: X @ w[:, 2:7] + X @ lax.dynamic_slice(w, (0, 3), (6, 5))),
    "scaled": (W, lambda w: X @ (w * 0.5) + X @ (-w / 3) + X @ (jnp.float32(2) * w)),
    "transposed": (W, lambda w: normal(5, 8) @ w.T),
    "swapped in a stack": (
        S,
        lambda w: jnp.einsum("bi,eoi->beo", normal(5, 6), jnp.swapaxes(w, 1, 2)),
    ),
    "merged": (S, lambda w: normal(5, 6) @ w[:1].reshape(6, 8)),
    "divided": (W, lambda w: jnp.einsum("bi,ihd->bhd", X, w.reshape(6, 2, 4))),
    "in heads": (W, lambda w: jnp.einsum("bhd,hdo->bo", normal(5, 2, 3), w.reshape(2, 3, 8))),
    "a new axis": (W, lambda w: jnp.einsum("bi,iko->bko", X, w[:, None])),
    "copied": (
        W,
        lambda w: jnp.einsum("ebi,eio->ebo", normal(2, 5, 6), jnp.broadcast_to(w, (2, 6, 8))),
    ),
    "flipped": (W, lambda w: X @ w[::-1]),
    "cast": (W, lambda w: X.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)),
    "constrained": (
        W,
        lambda w: (
            X @ lax.with_sharding_constraint(w, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        ),
    ),
    "copy and no gradient": (W, lambda w: X @ jnp.array(w) + X @ lax.stop_gradient(w)),
    "rows": (W, lambda w: w[jnp.array([0, 3])]),
    "some matrices": (S, lambda w: jnp.einsum("bi,bio->bo", X, w[jnp.array([0, 2, 1, 1, 0])])),
    "one of a stack": (S, lambda w: X @ w[1] + X @ w[jnp.int32(2)]),
}


@pytest.mark.parametrize("family", [zo_jax.low_rank(1), zo_jax.low_rank(2)], ids=["1", "2"])
@pytest.mark.parametrize("name", NOT_FORMED)
def test_low_rank_is_not_formed(name, family):
    params, function = NOT_FORMED[name]
    lazy, formed, record = both(function, params, family)
    assert record == []
    tolerance = 2**-5 if name == "cast" else 1e-5
    close = lambda a, b: np.testing.assert_allclose(
        np.float32(a), np.float32(b), tolerance, tolerance
    )
    jax.tree.map(close, lazy, formed)


def test_only_a_row_of_a_scanned_matrix_is_formed():
    scan = lambda w: lax.scan(lambda carry, row: (carry, 2 * row + 1), 0, w)[1]
    lazy, formed, record = both(scan, W, zo_jax.low_rank(1))
    np.testing.assert_allclose(lazy, formed, rtol=1e-6)
    assert [f.shape for f in record] == [(8,)]


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_large_tables_are_perturbed_in_parts(kind, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK_ENTRIES", 16)
    monkeypatch.setattr(products, "MIN_BLOCKED", 32)
    through = lambda w: w.astype(jnp.bfloat16).astype(jnp.float32)
    products_of = lambda w, s: [
        normal(2, 4, 8) @ w.T,
        w @ normal(8, 3),
        through(w) @ normal(8, 3),
        jnp.einsum("bei,eio->beo", normal(5, 3, 6), s),
        jnp.einsum("eio,bie->ebo", through(s), normal(5, 6, 3)),
    ]
    lazy, formed, record = both(lambda p: products_of(*p), (W, S), FAMILIES[kind])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, lazy, formed)
    assert record == []


@families
def test_a_dense_table_on_its_side(family):
    there_and_back = lambda w, p: jnp.transpose(jnp.transpose(w, p), np.argsort(p))
    turned = lambda w: [there_and_back(w, p) for p in ((0, 2, 1), (2, 0, 1), (1, 2, 0))]
    across = lambda w: jnp.einsum("abc,db->dca", jnp.transpose(w, (2, 1, 0)), normal(4, 6))
    lazy, formed, _ = both(lambda w: (turned(w), across(w)), S, family)
    jax.tree.map(np.testing.assert_array_equal, lazy[0], formed[0])
    np.testing.assert_allclose(lazy[1], formed[1], rtol=1e-5, atol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shifted(zo_jax.Perturbed):
    """base + scale in every entry."""

    base: jax.Array
    scale: jax.Array

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def form(self):
        return self.base + self.scale


def test_a_class_and_a_rule_of_ones_own():
    sums = []

    @zo_jax.register_rule(lax.reduce_sum_p, Shifted)
    def sum_of_shifted(x, *, axes, **params):
        if axes != (0, 1):
            return NotImplemented
        sums.append(axes)
        return jnp.sum(x.base) + x.scale * x.size

    x = Shifted(W, jnp.float32(0.5))
    for function in (
        jnp.sum,
        jax.jit(jnp.sum),
        lambda w: lax.map(lambda i: i * jnp.sum(w), jnp.ones(2)),
    ):
        with zo_jax.record_formed() as formed:
            lazy = zo_jax.lazily(function)(x)
        np.testing.assert_allclose(lazy, function(W + 0.5), rtol=1e-5)
        assert formed == [] and sums
        sums.clear()
    with zo_jax.record_formed() as formed:
        lazy = zo_jax.lazily(lambda w: jnp.sum(w.T @ jnp.ones(6)) + jnp.sum(w, 0))(x)
    np.testing.assert_allclose(lazy, np.sum(W + 0.5) + np.sum(W + 0.5, 0), rtol=1e-5)
    assert {(f.primitive, f.kind) for f in formed} == {
        ("transpose", "Shifted"),
        ("reduce_sum", "Shifted"),
    }


def test_a_rule_of_ones_own_is_asked_first(monkeypatch):
    monkeypatch.setattr(zo_jax.rules, "_rules", dict(zo_jax.rules._rules))
    zo_jax.register_rule(lax.dot_general_p, zo_jax.LowRank)(lambda x, w, **params: x @ w.base * 0)
    assert not np.any(both(lambda w: X @ w, W, zo_jax.low_rank(1))[0])
    zo_jax.register_rule(lax.dot_general_p, zo_jax.LowRank)(
        lambda *operands, **params: NotImplemented
    )
    lazy, formed, record = both(lambda w: X @ w, W, zo_jax.low_rank(1))
    np.testing.assert_allclose(lazy, formed, rtol=1e-5, atol=1e-5)
    assert record == []


def test_what_is_no_rule_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="needs a primitive such as"):
        zo_jax.register_rule("dot_general", zo_jax.LowRank)  # pyright: ignore
    with pytest.raises(ValueError, match=r"needs zo_jax\.Perturbed"):
        zo_jax.register_rule(lax.exp_p, jax.Array)  # pyright: ignore
    monkeypatch.setattr(zo_jax.rules, "_rules", dict(zo_jax.rules._rules))
    zo_jax.register_rule(lax.exp_p, zo_jax.Dense)(lambda x, **_: jnp.exp(x.base[0]))
    with pytest.raises(ValueError, match=r"rule for exp must return .*\(6, 8\)"):
        zo_jax.lazily(jnp.exp)(zo_jax.rademacher().perturb(W, KEY, 0.1))


def test_a_stack_is_what_it_stands_for():
    trained = zo_jax.rademacher().perturb(S[:2], KEY, 0.1)
    stack = composed.Stack(jnp.ones(S.shape), jnp.array([1, -1, 0]), trained)
    expected = np.stack([trained.form()[1], np.ones((6, 8)), trained.form()[0]])
    np.testing.assert_array_equal(stack.form(), expected)
    for i in range(3):
        np.testing.assert_array_equal(stack.layer(i).form(), expected[i])
