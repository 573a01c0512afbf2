"""The alternatives behind the decisions in docs/design.md, timed one by one.

  python benchmarks/parts.py        a minute on 2 CPU cores

Each line is the median of several calls of a jitted function, on the shapes of the 20M model: its
output head of 50257 x 280 entries, 8 directions.
"""

from collections.abc import Callable
import math
import time
from typing import Any

import jax
from jax import lax
from jax.extend.random import threefry2x32_p
import jax.numpy as jnp
import numpy as np

import zo_jax
from zo_jax import noise
from zo_jax.guided import largest_coordinates
from zo_jax.kinds import Signs
from zo_jax.perturbed import outer

ROWS, WIDTH, QUERIES = 50257, 280, 8
NUM_WORDS = 700_000
KEY = jnp.array([3, 4], jnp.uint32)


def report(name: str, function: Callable[..., Any], *args: Any, donate: bool = False) -> None:
    """Prints milliseconds a call, the first argument donated or not, and megabytes of
    temporaries.
    """
    compiled = jax.jit(function, donate_argnums=0 if donate else ()).lower(*args).compile()
    seconds = []
    for _ in range(8):
        fresh = [jax.tree.map(jnp.copy, args[0]) if donate else args[0], *args[1:]]
        jax.block_until_ready(fresh)
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*fresh))
        seconds.append(time.perf_counter() - start)
        del result, fresh
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e6
    print(f"| {name} | {np.median(seconds[1:]) * 1e3:.1f} | {temporaries:.0f} |", flush=True)


def title(text: str) -> None:
    print(f"\n{text}\n\n| how | ms | temporaries, MB |\n|---|---|---|", flush=True)


def by_primitive(key):
    index = jnp.arange(NUM_WORDS // 2, dtype=jnp.uint32)
    zeros = jnp.zeros_like(index)
    words = threefry2x32_p.bind(zeros + key[0], zeros + key[1], zeros, index)
    return jnp.stack(words, -1).reshape(-1)


def by_chunks(key, chunk=2**16):
    offsets = jnp.arange(chunk, dtype=jnp.uint32)
    draw = lambda start: jnp.stack(
        noise._threefry2x32(key[0], key[1], jnp.zeros_like(offsets), start + offsets), -1
    )
    starts = jnp.arange(-(-NUM_WORDS // 2 // chunk), dtype=jnp.uint32) * chunk
    return lax.map(draw, starts).reshape(-1)[:NUM_WORDS]


def xla_normals(words, num_rounds):
    shape = (words.shape[0], WIDTH)
    column = jnp.broadcast_to(jnp.arange(WIDTH, dtype=jnp.uint32), shape)
    keys = [jnp.broadcast_to(words[:, i : i + 1], shape) for i in (0, 1)]
    word, _ = noise._threefry2x32(*keys, jnp.zeros_like(column), column, num_rounds)
    odd = ((word >> jnp.uint32(9)).astype(jnp.int32) * 2 + (1 - 2**23)).astype(jnp.float32)
    return math.sqrt(2) * lax.erf_inv(odd * jnp.float32(2**-23))


def signs(words):
    return noise.sign_bits(words, WIDTH)


def sum_one_at_a_time(x, words, weights):
    add = lambda x, query: (x + noise.with_signs(query[0], signs(query[1])), None)
    return lax.scan(add, x, (weights, words))[0]


def sum_by_row_blocks(x, words, weights, num_blocks=16):
    rows = ROWS // num_blocks

    def step(i, x):
        part = lax.dynamic_slice_in_dim(x, i * rows, rows)
        part_words = lax.dynamic_slice_in_dim(words, i * rows, rows, axis=1)
        for j in range(QUERIES):
            part = part + noise.with_signs(weights[j], signs(part_words[j]))
        return lax.dynamic_update_slice_in_dim(x, part, i * rows, 0)

    return lax.fori_loop(0, num_blocks, step, x)


def sum_by_table(x, words, weights):
    is_minus = (jnp.arange(2**QUERIES)[:, None] >> jnp.arange(QUERIES)) & 1
    table = jnp.sum(jnp.where(is_minus == 1, -weights, weights), axis=1)
    index = sum(signs(words[j]) >> jnp.uint32(31 - j) for j in range(QUERIES))
    return x + table[index]


def in_blocks(x, keys, weights):
    return zo_jax.apply_directions(x, keys, weights)


def in_one_pass_after_words(x, keys, weights):
    size = ROWS * noise.sign_words_per_row(WIDTH)
    words = jax.vmap(lambda key: noise.stream(key, size))(noise.key_words(keys))
    return x + Signs().total(x, words.reshape(QUERIES, ROWS, -1), weights)


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (ROWS, WIDTH))
    words = jax.random.bits(jax.random.key(1), (QUERIES, ROWS, noise.sign_words_per_row(WIDTH)))
    weights = jnp.linspace(-1e-3, 1e-3, QUERIES)

    title(f"Drawing {NUM_WORDS:,} words that are not to be fused into their uses")
    report("eight rounds a turn (`noise.stream`)", lambda key: noise.stream(key, NUM_WORDS), KEY)
    report("JAX's primitive, four rounds a turn", by_primitive, KEY)
    report("chunks of words by `lax.map`", by_chunks, KEY)

    title("Perturbing the head with normals")
    row_keys = jax.random.bits(jax.random.key(2), (ROWS, 2))
    report("`noise.normals`", lambda x, w: x + noise.normals(w, WIDTH), x, row_keys, donate=True)
    for rounds in (13, 20):
        report(
            f"XLA's erf_inv, {rounds} rounds",
            lambda x, w, n=rounds: x + xla_normals(w, n),
            x,
            row_keys,
            donate=True,
        )

    title(f"Adding {QUERIES} directions of signs to the head")
    in_one_pass = lambda x, words, weights: x + Signs().total(x, words, weights)
    report("one pass, output donated", in_one_pass, x, words, weights, donate=True)
    report("one pass, fresh output", in_one_pass, x, words, weights)
    report("a pass for each direction, donated", sum_one_at_a_time, x, words, weights, donate=True)
    report(
        "block by block of rows, write fused, donated",
        sum_by_row_blocks,
        x,
        words,
        weights,
        donate=True,
    )
    report("look-up in a table of 256 sums, donated", sum_by_table, x, words, weights, donate=True)

    title(f"Drawing {QUERIES} directions of signs and adding them to the head, donated")
    keys = jax.random.split(jax.random.key(6), QUERIES)
    report("block by block of rows (`apply_directions`)", in_blocks, x, keys, weights, donate=True)
    report("all words, then one pass", in_one_pass_after_words, x, keys, weights, donate=True)

    title(f"Adding {QUERIES} rank-1 directions to the head")
    u = jax.random.rademacher(jax.random.key(3), (ROWS, QUERIES), jnp.float32)
    v = jax.random.rademacher(jax.random.key(4), (WIDTH, QUERIES), jnp.float32)
    report(
        "broadcast products, fused, donated", lambda x, u, v: x + outer(u, v), x, u, v, donate=True
    )
    report("matrix product, donated", lambda x, u, v: x + u @ v.T, x, u, v, donate=True)

    g = jax.random.normal(jax.random.key(5), (121_500, 1024))
    title(f"The largest of {g.size:,} coordinates with 0.81 of the energy")
    fraction = jnp.float32(0.81)
    report("`largest_coordinates`", largest_coordinates, g, fraction)


if __name__ == "__main__":
    main()
