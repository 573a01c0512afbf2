"""What a direction for every example costs beside the plain passes of the batch.

  python benchmarks/per_example.py             some two minutes on 2 CPU cores

Each figure is the time of `Grzo.project`, two passes of which every example has its own direction,
over that of two plain passes of the same batch; the median of the rounds' ratios. A multilayer
perceptron, and the GPT of 20M with 16 examples.
"""

import argparse

from estimator import compile_timed, make_loss, print_table, ratio, time_in_turn
import jax
from jax import lax
import jax.numpy as jnp

import zo_jax
from zo_jax.methods import Grzo
from zo_jax.methods.method import Step


def perceptron(width: int = 1024, depth: int = 4):
    keys = jax.random.split(jax.random.key(0), depth)
    params = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys]

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    return params, loss


def programs_of(params, loss, batch):
    """Two plain passes, and those of each kind of directions, compiled."""
    key, q = jax.random.key(2), len(batch)
    step = Step(jax.random.key_data(key), jnp.int32(0))
    estimator = zo_jax.Estimator(num_queries=q, perturbation="low_rank")
    kinds = {
        "Flipout": Grzo(estimator),
        "low rank": Grzo(estimator, use_flipout=False),
    }
    # Two batches, which XLA cannot know to be equal.
    twice = jnp.stack([batch, batch])
    plain = lambda params, batches: lax.map(lambda batch: loss(params, batch), batches)
    programs = {"plain": (compile_timed(plain, params, twice)[0], params, twice)}
    for name, method in kinds.items():
        project = lambda p, b, m=method: m.project(loss, p, (), step, b)
        programs[name] = (compile_timed(project, params, batch)[0], params, batch)
    return programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = []
    params, loss = perceptron()
    x = jax.random.normal(jax.random.key(1), (16, 64, 1024))
    for what, programs in {
        "perceptron, 4 x 1024 x 1024, 16 examples of 64 vectors": programs_of(params, loss, x),
        "GPT 20M, 16 examples of 128 tokens": programs_of(*gpt()),
    }.items():
        seconds = time_in_turn(programs, rounds)
        rows.append([what, *(ratio(seconds[k], seconds["plain"]) for k in ("Flipout", "low rank"))])
    print_table(
        "Passes with a direction an example, over plain ones", ["model", "Flipout", "rank 1"], rows
    )


def gpt():
    model, loss = make_loss("20M")
    tokens = jax.random.randint(jax.random.key(1), (16, 129), 0, 50257)
    return model.fresh(jax.random.key(0)), loss, tokens


if __name__ == "__main__":
    main()
