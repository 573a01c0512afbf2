"""Small networks drawn at random, of whose parameters some are moved: for the property that what
they share may be evaluated once.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from programs import opaque, values

WIDTH, LAYERS = 4, 4


@dataclasses.dataclass
class Net:
    """A function of parameters that are moved, whatever else it reads.

    Attributes:
      moved: the parameters that are moved.
      run: (parameters) -> results.
      words: what it does, for people.
    """

    moved: dict[str, Any]
    layers: list[Callable[[dict[str, Any], Any], Any]]
    words: list[str]

    def run(self, moved):
        x, outs = values((3, WIDTH), 9), []
        for layer in self.layers:
            x = layer(moved, x)
            outs.append(x)
        return outs

    def __repr__(self):
        return ", then ".join(self.words)


@st.composite
def nets(draw):
    net = Net({}, [], [])
    for i in range(draw(st.integers(1, 4))):
        words, layer = draw(st.sampled_from(LAYERS_OF_NETS))(draw, net, f"p{i}")
        net.layers.append(layer)
        net.words.append(words)
    if not net.moved:
        net.moved["bias"] = values((WIDTH,), 5)
        net.layers.append(lambda p, x: x * p["bias"][None])
        net.words.append("a moved scale")
    return net


def parameter(draw, net, name, shape):
    """(words, the parameter from those that are moved)."""
    value = 0.5 * values(shape, len(name) + len(net.moved))
    if draw(st.integers(0, 3)):
        return "known", lambda p: value
    net.moved[name] = value
    return "moved", lambda p: p[name]


def merged(stack, moved, how, rows):
    """A stack with some of its rows moved."""
    if how == "indices":
        return stack.at[np.array(rows)].set(moved)
    if how == "window":
        return stack.at[rows[0] :].set(moved)
    return jnp.concatenate([stack[: rows[0]], moved])


def stack_of(draw, net, name, shape, casts):
    """(words, a stack of layers of which some are moved)."""
    stack = 0.5 * values((LAYERS, *shape), len(name))
    how = draw(st.sampled_from(["known", "indices", "indices", "window", "concatenation", "all"]))
    rows = draw(st.sampled_from([[3], [3], [2, 3], [1, 3], [1, 2, 3], [2, 1], [0, 2]]))
    if how == "known":
        return how, lambda p: stack
    if how == "all":
        net.moved[name] = stack
        return how, lambda p: p[name]
    if how != "indices":
        rows = list(range(max(1, rows[0]), LAYERS))
    net.moved[name] = stack[np.array(rows)]
    dtype = jnp.bfloat16 if casts else jnp.float32
    return f"{how} {rows}", lambda p: merged(stack, p[name], how, rows).astype(dtype)


def dense(draw, net, name):
    w_words, w = parameter(draw, net, f"{name}w", (WIDTH, WIDTH))
    b_words, b = parameter(draw, net, f"{name}b", (WIDTH,))
    wrapper = draw(st.sampled_from(list(WRAPPERS)))
    of = WRAPPERS[wrapper](lambda w, b, x: opaque(jnp.tanh(x @ w)) + b[None])
    return f"a {w_words} product and a {b_words} bias in {wrapper}", lambda p, x: of(w(p), b(p), x)


WRAPPERS = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "jit twice": lambda f: lambda w, b, x: jax.jit(f)(w, b, jax.jit(f)(w, b, x)),
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda w, b, x: lax.cond(x.size > 0, f, lambda w, b, x: x, w, b, x),
    "while": lambda f: (
        lambda w, b, x: lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, f(w, b, s[1])), (0, x)
        )[1]
    ),
    "vmap": lambda f: lambda w, b, x: jax.vmap(lambda x: f(w, b, x[None])[0])(x),
    "jit of a known part": lambda f: (
        lambda w, b, x: (lambda pair: pair[0] + f(w, b, pair[1]))(
            jax.jit(lambda w, x: (x @ w, x))(w, x)
        )
    ),
}


def blocks(draw, net, name):
    casts = draw(st.booleans())
    w_words, w = stack_of(draw, net, f"{name}w", (WIDTH, WIDTH), casts)
    b_words, b = stack_of(draw, net, f"{name}b", (WIDTH,), casts)
    reverse, unroll = (
        draw(st.sampled_from([False, False, False, True])),
        draw(st.sampled_from([1, 3])),
    )
    options = dict(reverse=reverse, unroll=unroll)
    is_jitted = draw(st.booleans())
    keys = jax.random.split(jax.random.key(3), LAYERS)

    def step(carry, slices):
        (x, i), (w, b, key) = carry, slices
        x = x + jnp.tanh(x @ w.astype(jnp.float32)) * jax.random.bernoulli(key, 0.9, x.shape)
        x = x + b.astype(jnp.float32)[None] * i
        return (x, i + 1), jnp.sum(x, 1)

    def run(w, b, x):
        (x, i), sums = lax.scan(step, (x, jnp.float32(0)), (w, b, keys), **options)
        return x * i + sums[-2][:, None] + sums[0][:, None]

    run = jax.jit(run) if is_jitted else run
    words = f"a scan over layers, weights {w_words}, biases {b_words}, {casts=} {is_jitted=}"
    return f"{words} {options}", lambda p, x: run(w(p), b(p), x)


def loop(draw, net, name):
    words, w = parameter(draw, net, f"{name}w", (WIDTH, WIDTH))
    return f"a loop with a {words} constant", lambda p, x: lax.fori_loop(
        0, 2, lambda i, x: jnp.tanh(x @ w(p)), x
    )


def mixture(draw, net, name):
    """Look-ups, sums and a mask, of which a part is larger than what it is made of."""
    words, table = parameter(draw, net, f"{name}t", (7, WIDTH))
    ids = jnp.array([0, 6, 3])

    def run(p, x):
        rows = table(p)[ids] + x
        weights = jax.nn.softmax(jnp.where(jnp.cumsum(x, 0) > 0, rows, 0), axis=-1)
        mean = jnp.broadcast_to(jnp.sum(rows, 1)[:, None], x.shape)
        return weights + mean + (jax.nn.one_hot(ids, 7) @ table(p))

    return f"look-ups in a {words} table", run


LAYERS_OF_NETS = [dense, dense, blocks, blocks, loop, mixture]
