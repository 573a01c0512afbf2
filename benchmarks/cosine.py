"""Cosine of the estimate to the true gradient: against the number of queries, and a second.

  python benchmarks/cosine.py                prints the table of families of directions and writes
                                             docs/cosine.png, about a minute on 2 CPU cores
  python benchmarks/cosine.py --per-second   squared cosine a second, against directions of signs of
                                             all parameters: some four minutes
  python benchmarks/cosine.py --per-second --models=character --directions=scale

By queries: a small GPT at its initial parameters, a batch of Shakespeare, exact directional
derivatives (difference "jvp"), several keys.

Per second: a GPT after some steps of backprop with Adam, on text; a batch; central differences. The
squared cosine is (mean <estimate, g>)^2 / (mean |estimate|^2 |g|^2) over the keys, g the gradient
of the batch: what the average of many steps makes of it. Seconds are the median of whole estimates,
sum of the directions included, each way in turn. What is promised is the squared cosine over that
of signs, by the norms of the gradient in the groups. What `zo_jax.grouped` learns it learns from
projections at these parameters, on other batches, before anything is measured; `zo_jax.scaled` is
given the norms of the gradient of another batch.
"""

import argparse
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax

import zo_jax
from zo_jax.grouped import Grouped
from zo_jax.groups import find_groups, sizes_of
from zo_jax.scaled import Scaled
from zo_jax.tiers import sort_into_tiers
from zo_jax.train.config import DataConfig, ModelConfig
from zo_jax.train.data.corpus import load_corpus
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model

FAMILIES = {
    "rademacher": zo_jax.rademacher(),
    "gaussian": zo_jax.gaussian(),
    "sphere": zo_jax.sphere(),
    "low_rank(1)": zo_jax.low_rank(1),
    "low_rank(4)": zo_jax.low_rank(4),
}
QUERIES = (1, 4, 16, 64, 256, 1024)
NUM_KEYS = 4


def flatten(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# Model: (its settings, its tokenizer, steps of backprop, blocks, their length, queries, epsilon).
CHARACTER = dict(num_layers=6, num_heads=4, width=128)
MODELS = {
    "character GPT after 50 steps": (CHARACTER, "char", 50, 8, 64, 64, 1e-3),
    "character GPT after 300 steps": (CHARACTER, "char", 300, 8, 64, 64, 1e-3),
    "20M after 30 steps": (dict(size="20M"), "bpe", 30, 2, 128, 24, 1e-3),
}
# As many words as GPT-2's vocabulary: of the rows of tokens that the text has not, the gradient is
# that of a softmax.
LARGE_VOCABULARY = 50257
LEARNING_STEPS, PER_SECOND_KEYS = 40, 24


def below(config: ModelConfig, num_layers: int) -> dict[str, float]:
    """What an evaluation costs along a direction of each group, relative to a whole one: the layers
    from the group on, for what lies below is evaluated once. The output head counts as a layer.
    """
    whole = num_layers + 1
    costs = {f"blocks/{i}": (whole - i) / whole for i in range(num_layers)}
    return costs | {"ln_f": 1 / whole} | ({} if config.tied_head else {"head": 1 / whole})


def norms_of(gradient: Any, counts: dict[str, np.ndarray]) -> dict[str, float]:
    """Norms of a gradient in each leaf, or in rows that are used as often."""
    found = find_groups("leaves", gradient, sort_into_tiers(counts))
    return {name: float(optax.global_norm(part.select(gradient))) for name, part in found}


def promised(family: Any, gradient: Any) -> float:
    """What the groups of a family bring in squared cosine, if their norms are known: d n² / (Σ √d_g
    n_g)².
    """
    if not isinstance(family, Grouped | Scaled):
        return 1.0
    found = find_groups(family.groups, gradient, family.tiers)
    squared = np.square([float(optax.global_norm(part.select(gradient))) for _, part in found])
    sizes = sizes_of(found, gradient)
    return float(sizes.sum() * squared.sum() / np.sum(np.sqrt(sizes * squared)) ** 2)


def train(model: Any, blocks_NT: np.ndarray, num_steps: int, batch_size: int) -> Any:
    """Parameters after steps of backprop."""
    optimizer, params = optax.adam(1e-3), model.fresh(jax.random.key(0))

    @jax.jit
    def step(params, state, tokens_BT):
        gradient = jax.grad(lambda p: next_token_loss(model, p, tokens_BT))(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(num_steps):
        tokens_BT = blocks_NT[rng.integers(0, len(blocks_NT), batch_size)]
        params, state = step(params, state, tokens_BT)
    return params


class Way:
    """A way to estimate the gradient, and what it does over the keys."""

    def __init__(self, label: str, loss_fn: Any, params: Any, gradient: Any, options: dict):
        estimator = zo_jax.Estimator(**options)
        self.label, self.params, self.seconds = label, params, []
        self.products: list[tuple[float, float]] = []
        self.family = estimator.start(params)
        using = lambda family: dict(estimator=estimator, perturbation=family)

        @jax.jit
        def estimate(family, key, tokens_BT):
            found = zo_jax.estimate_gradient(loss_fn, params, key, tokens_BT, **using(family))
            return found.gradient, found.projections

        @jax.jit
        def learn(family, key, projections):
            return zo_jax.Estimator(**options | dict(perturbation=family)).learn(
                params, key, projections
            )

        @jax.jit
        def products(estimated):
            dot = lambda a, b: sum(
                jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
            )
            return dot(estimated, gradient), dot(estimated, estimated)

        self._estimate, self._learn, self._products = estimate, learn, products

    def learn(self, key: jax.Array, tokens_BT: np.ndarray) -> None:
        _, projections = self._estimate(self.family, key, tokens_BT)
        self.family = self._learn(self.family, key, projections)

    def measure(self, key: jax.Array, tokens_BT: np.ndarray) -> None:
        start = time.perf_counter()
        estimated, _ = jax.block_until_ready(self._estimate(self.family, key, tokens_BT))
        self.seconds.append(time.perf_counter() - start)
        self.products.append(tuple(map(float, self._products(estimated))))

    def squared_cosine(self, norm: float) -> float:
        along, squared = np.mean(self.products, axis=0)
        return along**2 / (squared * norm**2)


def per_second(name: str, directions: str) -> None:
    settings, tokenizer, num_steps, batch_size, length, num_queries, epsilon = MODELS[name]
    corpus = load_corpus(DataConfig(block_size=length, tokenizer=tokenizer))
    config = ModelConfig(context_length=length, **settings)
    vocab_size = corpus.tokenizer.vocab_size if tokenizer == "char" else LARGE_VOCABULARY
    model = make_model(config, vocab_size)
    params = train(model, corpus.train_NT, num_steps, 2 * batch_size)
    loss_fn = lambda params, tokens_BT: next_token_loss(model, params, tokens_BT)
    batches = lambda i: corpus.train_NT[i * batch_size : (i + 1) * batch_size]
    loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(params, batches(0))
    norm = float(optax.global_norm(gradient))
    options = dict(num_queries=num_queries, epsilon=epsilon)
    costs = below(config, model.num_layers)
    common = np.bincount(np.ravel(corpus.train_NT), minlength=vocab_size)
    counts = {path: common for path in model.tables}
    other = jax.jit(jax.grad(loss_fn))(params, batches(1))
    scaled = lambda counts: zo_jax.scaled(norms_of(other, counts), counts=counts)
    families = {
        "signs of a layer": zo_jax.grouped(),
        "signs of a layer, costs told": zo_jax.grouped(costs=costs),
        "signs of all, a scale for each leaf": scaled({}),
    }
    if tokenizer != "char":
        families |= {
            "signs of a layer, or of tokens as common": zo_jax.grouped(counts=counts),
            "signs of all, a scale for each leaf, or for tokens as common": scaled(counts),
        }
    chosen = {label: family for label, family in families.items() if directions in label}
    ways = [
        Way(label, loss_fn, params, gradient, options | dict(perturbation=family))
        for label, family in {"signs of all parameters": "rademacher", **chosen}.items()
    ]
    for way in ways:
        for i in range(LEARNING_STEPS if isinstance(way.family, Grouped) else 0):
            way.learn(jax.random.key(i), batches(1 + i))
    for i in range(-1, PER_SECOND_KEYS):
        for way in ways:
            way.measure(jax.random.key(1000 + i), batches(0))
            if i < 0:  # compiles
                way.seconds, way.products = [], []
    print(
        f"\n{name}: {model.num_params:,} parameters, loss {loss:.3f}; {num_queries} queries of "
        f"{batch_size} x {length - 1} tokens, {PER_SECOND_KEYS} keys, "
        f"{jax.devices()[0].device_kind}\n"
    )
    print("| directions | promised | squared cosine | seconds | x, a second |\n|" + "---|" * 5)
    rates = [way.squared_cosine(norm) / np.median(way.seconds) for way in ways]
    for way, rate in zip(ways, rates, strict=True):
        found = promised(way.family, gradient), way.squared_cosine(norm), np.median(way.seconds)
        numbers = "{:.2f} | {:.2e} | {:.3f}".format(*found)
        print(f"| {way.label} | {numbers} | {rate / rates[0]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--per-second", action="store_true", help="squared cosine a second")
    parser.add_argument(
        "--models", default="", help="of --per-second: those with this in their name"
    )
    parser.add_argument(
        "--directions", default="", help="of --per-second: those with this in their label"
    )
    args = parser.parse_args()
    if not args.per_second:
        by_queries()
    for name in MODELS:
        if args.per_second and args.models in name:
            per_second(name, args.directions)


def by_queries() -> None:
    corpus = load_corpus(DataConfig(block_size=32))
    config = ModelConfig(num_layers=1, num_heads=2, width=32, context_length=32)
    model = make_model(config, corpus.tokenizer.vocab_size)
    params = model.fresh(jax.random.key(0))
    tokens = corpus.train_NT[:4]
    loss_fn = lambda params: next_token_loss(model, params, tokens)
    true = flatten(jax.jit(jax.grad(loss_fn))(params))
    d = model.num_params
    print(
        f"{d:,} parameters; mean of {NUM_KEYS} keys\n\n| q | √(q / (q + d - 1)) | "
        + " | ".join(FAMILIES)
        + " |"
    )
    print("|" + "---|" * (2 + len(FAMILIES)))
    cosines = {name: [] for name in FAMILIES}
    for q in QUERIES:
        for name, family in FAMILIES.items():

            @jax.jit
            def cosine(key, family=family, q=q):
                options = dict(num_queries=q, perturbation=family, difference="jvp")
                estimate = zo_jax.estimate_gradient(loss_fn, params, key, **options)
                g = flatten(estimate.gradient)
                return g @ true / (jnp.linalg.norm(g) * jnp.linalg.norm(true))

            cosines[name].append(np.mean([cosine(jax.random.key(i)) for i in range(NUM_KEYS)]))
        row = " | ".join(f"{cosines[name][-1]:.4f}" for name in FAMILIES)
        print(f"| {q} | {np.sqrt(q / (q + d - 1)):.4f} | {row} |", flush=True)
    plt.figure(figsize=(6, 4))
    for name, values in cosines.items():
        plt.loglog(QUERIES, values, marker="o", markersize=4, label=name)
    q = np.array(QUERIES)
    plt.loglog(q, np.sqrt(q / (q + d - 1)), "k:", label="√(q / (q + d − 1))")
    plt.xlabel("queries q")
    plt.ylabel("cosine to the gradient")
    plt.title(f"GPT of {d:,} parameters")
    plt.legend()
    plt.grid(alpha=0.3, which="both")
    plt.tight_layout()
    path = Path(__file__).parent.parent / "docs" / "cosine.png"
    plt.savefig(path, dpi=120)
    print(f"\nwrote {path.relative_to(path.parent.parent)}")


if __name__ == "__main__":
    main()
