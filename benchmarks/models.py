"""What the estimator costs on models that were not written for it.

  python benchmarks/models.py               the tables, some five minutes on 2 CPU cores
  python benchmarks/models.py --rounds=3    fewer rounds, coarser medians

R is the time of the whole estimate (gradient included) over that of the 2 q plain evaluations of
the same loss on the same data. All programs are jitted; every round runs each once, in turn, and a
figure is the median of the rounds' ratios. "formed" is what `zo_jax.record_formed` saw of low-rank
directions, by primitive; dense signs are formed in every product by design. Then the rank-1
estimate of the Llama as one would write it by hand, beside the library's. The last table has the
seconds of tracing and compiling a model of 24 layers that are written out, each a call of one
`jax.jit`.
"""

import argparse
import collections
from collections.abc import Callable
import functools
import os
from typing import Any, NamedTuple

import equinox as eqx
from estimator import (
    compile_timed,
    plain_evaluations,
    print_table,
    ratio,
    time_in_turn,
)
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import zo_jax

FAMILIES = {"rademacher": zo_jax.rademacher(), "low_rank(1)": zo_jax.low_rank(1)}


class Model(NamedTuple):
    """A loss with its parameters, and the shape of the inputs of one evaluation: tokens if they are
    of integers.
    """

    loss: Callable[..., jax.Array]
    params: Any
    batch: jax.Array


def normal(seed: int, *shape: int) -> jax.Array:
    """Weights of a matrix [..., in, out] or [out, in], of unit variance in its products."""
    scale = max(shape[-2:]) ** -0.5 if len(shape) > 1 else 1.0
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(vocab_size: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, vocab_size, shape), jnp.int32)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def llama(num_layers: int = 4, C: int = 256, heads: int = 4, V: int = 4096) -> Model:
    """RMSNorm, rotary positions, SwiGLU; every weight [out, in], as PyTorch keeps them; a list of
    layers.
    """
    H = 2 * C + C // 2

    def rms(x, weight):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * weight

    def rotate(x):
        half = x.shape[-1] // 2
        angle = jnp.arange(x.shape[1])[:, None] * 10000 ** (-jnp.arange(half) / half)
        cos, sin = (f(angle)[None, :, None, :] for f in (jnp.cos, jnp.sin))
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def block(p, x):
        B, T, _ = x.shape
        h = rms(x, p["norm_1"])
        q, k, v = ((h @ p[name].T).reshape(B, T, heads, -1) for name in ("q", "k", "v"))
        x = x + attention(rotate(q), rotate(k), v).reshape(B, T, C) @ p["o"].T
        h = rms(x, p["norm_2"])
        return x + (jax.nn.silu(h @ p["gate"].T) * (h @ p["up"].T)) @ p["down"].T

    def loss(params, ids):
        x = params["embed"][ids[:, :-1]]
        for p in params["layers"]:
            x = block(p, x)
        return cross_entropy(rms(x, params["norm"]) @ params["head"].T, ids[:, 1:])

    shapes = dict(q=(C, C), k=(C, C), v=(C, C), o=(C, C), gate=(H, C), up=(H, C), down=(C, H))
    layer = lambda i: (
        {name: normal(i, *shape) for name, shape in shapes.items()}
        | {
            "norm_1": jnp.ones(C),
            "norm_2": jnp.ones(C),
        }
    )
    params = {
        "embed": normal(98, V, C),
        "layers": [layer(i) for i in range(num_layers)],
        "norm": jnp.ones(C),
        "head": normal(99, V, C),
    }
    return Model(loss, params, tokens(V, 2, 257))


def flax_attention(num_layers: int = 4, C: int = 256) -> Model:
    """Flax's MultiHeadDotProductAttention, whose kernels are [C, H, D] and [H, D, C]."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm()(x)
            mask = nn.make_causal_mask(x[..., 0])
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, mask=mask)
            return x + nn.Dense(C)(nn.gelu(nn.Dense(4 * C)(nn.LayerNorm()(x))))

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(1024, C)
            x = embed(ids)
            for _ in range(num_layers):
                x = Block()(x)
            return embed.attend(nn.LayerNorm()(x))

    model, ids = Decoder(), tokens(1024, 2, 257)
    params = model.init(jax.random.key(0), ids[:1, :8])
    loss = lambda params, ids: cross_entropy(model.apply(params, ids[:, :-1]), ids[:, 1:])
    return Model(loss, params, ids)


def experts(num_experts: int = 8, C: int = 256, H: int = 512) -> Model:
    """Two layers of experts by einsum, each of which gets 512 of 4096 tokens, and a fused gate and
    value that is split.
    """

    def layer(p, x):
        share = x.reshape(num_experts, -1, C)
        both = jnp.einsum("enc,ech->enh", share, p["in"])
        gate, value = jnp.split(both, 2, axis=-1)
        out = jnp.einsum("enh,ehc->enc", jax.nn.silu(gate) * value, p["out"])
        weight = jax.nn.softmax(x @ p["router"])
        return x + out.reshape(x.shape) * jnp.max(weight, -1, keepdims=True)

    def loss(params, x):
        for p in params:
            x = layer(p, x)
            x = x[jnp.argsort(x[:, 0])]  # other experts' turn
        return jnp.mean(x**2)

    layer_params = lambda i: {
        "in": normal(i, num_experts, C, 2 * H),
        "out": normal(i + 50, num_experts, H, C),
        "router": normal(i + 70, C, num_experts),
    }
    return Model(loss, [layer_params(i) for i in range(2)], normal(1, 4096, C))


def equinox_transformer(num_layers: int = 3, C: int = 256) -> Model:
    """Equinox's MultiheadAttention, MLP and LayerNorm, for one sequence and mapped over a batch."""

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP
        norms: list[eqx.nn.LayerNorm]

        def __init__(self, key):
            keys = jax.random.split(key)
            self.attention = eqx.nn.MultiheadAttention(4, C, key=keys[0])
            self.mlp = eqx.nn.MLP(C, C, 4 * C, 1, jax.nn.gelu, key=keys[1])
            self.norms = [eqx.nn.LayerNorm(C), eqx.nn.LayerNorm(C)]

        def __call__(self, x):
            h = jax.vmap(self.norms[0])(x)
            x = x + self.attention(h, h, h, mask=jnp.tri(len(x), dtype=bool))
            return x + jax.vmap(lambda row: self.mlp(self.norms[1](row)))(x)

    blocks = [Block(key) for key in jax.random.split(jax.random.key(0), num_layers)]
    params, static = eqx.partition(blocks, eqx.is_inexact_array)

    def loss(params, x):
        for block in eqx.combine(params, static):
            x = jax.vmap(block)(x)
        return jnp.mean(x**2)

    return Model(loss, params, normal(1, 2, 256, C))


def convolutions(channels: int = 64) -> Model:
    """Four convolutions of 3 x 3 on images of 32 x 32, pooled, and a linear classifier."""

    def loss(params, images):
        x = images
        for kernel, bias in params["convolutions"]:
            x = lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + bias)
        return cross_entropy(jnp.mean(x, (1, 2)) @ params["head"], jnp.arange(len(images)))

    widths = [3, *[channels] * 4]
    params = {
        "convolutions": [
            (0.1 * normal(i, 3, 3, widths[i], widths[i + 1]), jnp.zeros(widths[i + 1]))
            for i in range(4)
        ],
        "head": normal(9, channels, 10),
    }
    return Model(loss, params, normal(1, 4, 32, 32, 3))


def lstm(C: int = 512, batch: int = 32, length: int = 16) -> Model:
    """A scan over time with the weights among its constants."""

    def loss(params, x):
        def step(carry, x):
            h, c = carry
            gates = x @ params["input"] + h @ params["hidden"] + params["bias"]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros(x.shape[1:])
        return jnp.mean(lax.scan(step, (zero, zero), x)[1] ** 2)

    params = {"input": normal(0, C, 4 * C), "hidden": normal(1, C, 4 * C), "bias": jnp.zeros(4 * C)}
    return Model(loss, params, normal(2, length, batch, C))


MODELS = {
    "Llama, [out, in]": llama,
    "Flax attention": flax_attention,
    "experts by einsum": experts,
    "Equinox transformer": equinox_transformer,
    "convolutions": convolutions,
    "LSTM": lstm,
}


def count_formed(model: Model, family: zo_jax.Family) -> str:
    """What was formed of low-rank directions, without the vectors."""
    with zo_jax.record_formed() as formed:
        jax.eval_shape(
            lambda: zo_jax.project(
                model.loss, model.params, jax.random.key(0), model.batch, perturbation=family
            )
        )
    matrices = [f for f in formed if f.kind == "LowRank" and len(f.shape) > 1]
    counts = collections.Counter(f.primitive for f in matrices)
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "nothing"


def benchmark_time(names: list[str], rounds: int, q: int = 4) -> None:
    rows = []
    for name in names:
        model = MODELS[name]()
        batches = jnp.broadcast_to(model.batch, (q, *model.batch.shape))
        floor, _ = compile_timed(plain_evaluations(model.loss, 2 * q), model.params, batches)
        programs = {"floor": (floor, model.params, batches)}
        for family_name, family in FAMILIES.items():
            options = dict(num_queries=q, perturbation=family, batch_per_query=True)
            compiled, _ = compile_timed(
                lambda p, k, b, loss=model.loss, o=options: zo_jax.estimate_gradient(
                    loss, p, k, b, **o
                ),
                model.params,
                jax.random.key(2),
                batches,
            )
            programs[family_name] = (compiled, model.params, jax.random.key(2), batches)
        seconds = time_in_turn(programs, rounds)
        num_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        rows.append(
            [
                name,
                f"{num_params / 1e6:.1f}",
                f"{np.median(seconds['floor']):.2f}",
                *(ratio(seconds[family_name], seconds["floor"]) for family_name in FAMILIES),
                count_formed(model, FAMILIES["low_rank(1)"]),
            ]
        )
        print(f"  {' | '.join(rows[-1])}", flush=True)
    print_table(
        f"R of the whole estimate, {q} queries, central",
        [
            "model",
            "parameters, M",
            f"{2 * q} plain evaluations, s",
            *(f"R, {family_name}" for family_name in FAMILIES),
            "low rank formed",
        ],
        rows,
    )


class RankOne(NamedTuple):
    """A weight [out, in] and its change s u vᵀ, by hand: what the Llama does with a weight."""

    w: jax.Array
    u: jax.Array
    v: jax.Array
    s: jax.Array

    @property
    def T(self) -> "RankOne":
        return self

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return x @ self.w.T + (self.s * (x @ self.v))[..., None] * self.u

    def __getitem__(self, ids: jax.Array) -> jax.Array:  # pyright: ignore
        return self.w[ids] + self.s * self.u[ids][..., None] * self.v


def estimate_by_hand(
    loss: Callable[..., jax.Array], params: Any, key: jax.Array, batches: jax.Array
) -> Any:
    """The rank-1 estimate of a batch for each query, without this library; only for the Llama."""
    leaves, treedef = jax.tree.flatten(params)

    def draw(key: jax.Array) -> list[Any]:
        keys = jax.random.split(key, len(leaves))
        signs = [
            jax.random.rademacher(k, (sum(x.shape),), jnp.float32)
            for k, x in zip(keys, leaves, strict=True)
        ]
        return [
            (z[: x.shape[0]], z[x.shape[0] :]) if x.ndim > 1 else z
            for x, z in zip(leaves, signs, strict=True)
        ]

    def project(key: jax.Array, batch: jax.Array) -> jax.Array:
        z = draw(key)

        def side(s: jax.Array) -> jax.Array:
            moved = [
                RankOne(x, *part, s) if x.ndim > 1 else x + s * part
                for x, part in zip(leaves, z, strict=True)
            ]
            return loss(jax.tree.unflatten(treedef, moved), batch)

        above, below = lax.map(side, jnp.array([1e-3, -1e-3]))
        return (above - below) / 2e-3

    keys = jax.random.split(key, len(batches))
    weights = lax.map(lambda of_query: project(*of_query), (keys, batches)) / len(batches)
    z = jax.vmap(draw)(keys)
    outer = lambda u, v: sum(w * a[:, None] * b for w, a, b in zip(weights, u, v, strict=True))
    total = [
        outer(*part) if x.ndim > 1 else weights @ part for x, part in zip(leaves, z, strict=True)
    ]
    return weights, jax.tree.unflatten(treedef, total)


def benchmark_by_hand(rounds: int, q: int = 4) -> None:
    model = llama()
    batches = jnp.broadcast_to(model.batch, (q, *model.batch.shape))
    key = jax.random.key(2)
    options = dict(num_queries=q, perturbation=zo_jax.low_rank(1), batch_per_query=True)
    functions = {
        "by hand": estimate_by_hand,
        "zo_jax": functools.partial(zo_jax.estimate_gradient, **options),
    }
    floor, _ = compile_timed(plain_evaluations(model.loss, 2 * q), model.params, batches)
    programs: dict[str, Any] = {"floor": (floor, model.params, batches)}
    for name, function in functions.items():
        estimate = functools.partial(function, model.loss)
        compiled, _ = compile_timed(estimate, model.params, key, batches)
        programs[name] = compiled, model.params, key, batches
    seconds = time_in_turn(programs, rounds)
    print_table(
        f"R of a Llama's rank-1 estimate, {q} queries, central",
        ["written", "R"],
        [[name, ratio(seconds[name], seconds["floor"])] for name in functions],
    )


def benchmark_compilation(rounds: int, num_layers: int = 24, C: int = 128) -> None:
    """A model of layers written out, each a call of one jitted function."""

    @jax.jit
    def layer(p, x):
        q, k, v = jnp.split(x @ p["qkv"] + p["bias"], 3, axis=-1)
        heads = lambda y: y.reshape(*y.shape[:-1], 4, -1)
        x = x + attention(heads(q), heads(k), heads(v)).reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"]

    def loss(params, x):
        for p in params:
            x = layer(p, x)
        return jnp.mean(x**2)

    layer_params = lambda i: {
        "qkv": normal(i, C, 3 * C),
        "bias": jnp.zeros(3 * C),
        "out": normal(i + 100, C, C),
        "up": normal(i + 200, C, 4 * C),
        "down": normal(i + 300, 4 * C, C),
    }
    params, x = [layer_params(i) for i in range(num_layers)], normal(1, 2, 256, C)
    programs = {"`jax.value_and_grad`": (lambda: jax.value_and_grad(loss), (params, x))}
    for name, family in FAMILIES.items():
        for function in (zo_jax.project, zo_jax.estimate_gradient):
            make = lambda function=function, family=family: functools.partial(
                function, loss, num_queries=4, perturbation=family
            )
            programs[f"`{function.__name__}`, {name}"] = make, (params, jax.random.key(0), x)
    seconds = {what: [] for what in programs}
    for _ in range(rounds):
        for what, (make, args) in programs.items():
            jax.clear_caches()
            seconds[what].append(compile_timed(make(), *args)[1])
    seconds = {what: np.array(s) for what, s in seconds.items()}
    floor = next(iter(seconds.values()))
    print_table(
        f"Tracing and compiling {num_layers} layers written out, median of {rounds}",
        ["what", "seconds", "over backprop's"],
        [[what, f"{np.median(s):.1f}", ratio(s, floor)] for what, s in seconds.items()],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every measurement")
    parser.add_argument("--only", default="", help="models whose name contains this")
    arguments = parser.parse_args()
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    benchmark_time([name for name in MODELS if arguments.only in name], arguments.rounds)
    if not arguments.only:
        benchmark_by_hand(3 * arguments.rounds)
        benchmark_compilation(min(5, arguments.rounds))
