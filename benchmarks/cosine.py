"""Cosine of the estimate to the true gradient against the number of queries, for each family of
directions.

  python benchmarks/cosine.py    prints the table and writes docs/cosine.png, about a minute on 2
                                 CPU cores

A small GPT at its initial parameters, a batch of Shakespeare, exact directional derivatives
(difference "jvp"), several keys.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import zo_jax
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


def main() -> None:
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
