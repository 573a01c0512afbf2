"""What the estimator costs beside the loss evaluations that it needs: time, compilation, memory.

  python benchmarks/estimator.py               all tables, some five minutes on 2 CPU cores
  python benchmarks/estimator.py --rounds=3    fewer rounds, coarser medians

R is the time of the whole estimate (gradient included) over that of the 2 q plain evaluations of
the same loss on the same data by `lax.map`. Both are jitted; every round runs all programs once, in
turn, and a figure is the median of the rounds' ratios. Memory is argument + temp + output - alias
of XLA's `memory_analysis()`; nothing is allocated for it.
"""

import argparse
from collections.abc import Callable, Sequence
import math
import os
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import zo_jax
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import GPT, SIZES

VOCAB_SIZE = 50257
FAMILIES = {
    "rademacher": zo_jax.rademacher(),
    "gaussian": zo_jax.gaussian(),
    "sphere": zo_jax.sphere(),
    "low_rank(1)": zo_jax.low_rank(1),
}


def make_loss(size: str) -> tuple[GPT, Callable[..., jax.Array]]:
    model = GPT(VOCAB_SIZE, *SIZES[size], context_length=1024)
    return model, lambda params, tokens: next_token_loss(model, params, tokens)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def compile_timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """(compiled function, seconds of tracing and compiling)."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, time.perf_counter() - start


def time_in_turn(programs: dict[str, tuple[Any, ...]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each (compiled function, *args) in each round, one more round left out as a
    warm-up.
    """
    seconds = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, (compiled, *args) in programs.items():
            start = time.perf_counter()
            result = jax.block_until_ready(compiled(*args))
            seconds[name].append(time.perf_counter() - start)
            del result
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def ratio(a: np.ndarray, b: np.ndarray) -> str:
    return f"{np.median(a / b):.2f}"


def plain_evaluations(loss: Callable[..., jax.Array], count: int) -> Callable[..., jax.Array]:
    """`count` evaluations, two on each query's data, one after the other."""
    return lambda params, tokens: lax.map(lambda i: loss(params, tokens[i // 2]), jnp.arange(count))


def benchmark_time(rounds: int, q: int = 8) -> None:
    model, loss = make_loss("20M")
    params = model.fresh(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (q, 2, 129), 0, VOCAB_SIZE)
    key = jax.random.key(2)
    floor, _ = compile_timed(plain_evaluations(loss, 2 * q), params, tokens)
    backprop, backprop_seconds = compile_timed(jax.value_and_grad(loss), params, tokens[0])
    programs = {"floor": (floor, params, tokens), "backprop": (backprop, params, tokens[0])}
    compile_seconds = {}
    for name, family in FAMILIES.items():
        options = dict(num_queries=q, perturbation=family, batch_per_query=True)
        for function in (zo_jax.estimate_gradient, zo_jax.project):
            compiled, compile_seconds[name, function.__name__] = compile_timed(
                lambda p, k, t, f=function, o=options: f(loss, p, k, *(t,), **o),
                params,
                key,
                tokens,
            )
            programs[name, function.__name__] = (compiled, params, key, tokens)
    seconds = time_in_turn(programs, rounds)
    rows = [
        [
            name,
            ratio(seconds[name, "estimate_gradient"], seconds["floor"]),
            ratio(seconds[name, "project"], seconds["floor"]),
            f"{compile_seconds[name, 'estimate_gradient'] / backprop_seconds:.1f}",
        ]
        for name in FAMILIES
    ]
    floor_seconds = np.median(seconds["floor"])
    print_table(
        f"GPT 20M, {q} queries of 2 x 128 tokens, central: the {2 * q} plain evaluations take "
        f"{floor_seconds:.2f} s, one backprop gradient {np.median(seconds['backprop']):.2f} s, its "
        f"compilation {backprop_seconds:.1f} s",
        ["directions", "R", "`project` alone", "compilation / backprop's"],
        rows,
    )


def benchmark_small_batches(rounds: int, q: int = 64) -> None:
    model, loss = make_loss("20M")
    params = model.fresh(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (q, 1, 17), 0, VOCAB_SIZE)
    programs = {}
    for name in ("rademacher", "low_rank(1)"):
        for at_once in (1, q):
            options = dict(
                num_queries=q,
                perturbation=FAMILIES[name],
                batch_per_query=True,
                parallel_batch_size=at_once,
            )
            compiled, _ = compile_timed(
                lambda p, k, t, o=options: zo_jax.estimate_gradient(loss, p, k, t, **o),
                params,
                jax.random.key(2),
                tokens,
            )
            programs[name, at_once] = (compiled, params, jax.random.key(2), tokens)
    seconds = time_in_turn(programs, rounds)
    print_table(
        f"GPT 20M, {q} queries of 16 tokens, estimate with gradient",
        ["directions", "queries at once", "seconds", "rademacher at once / this"],
        [
            [name, str(n), f"{np.median(s):.2f}", ratio(seconds["rademacher", q], s)]
            for (name, n), s in seconds.items()
        ],
    )


def benchmark_memory() -> None:
    model, loss = make_loss("gpt2")
    params = jax.eval_shape(lambda key: model.fresh(key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 129), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    leaves = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)]
    megabytes = {}

    def measure(name: str, function: Callable[..., Any], *args: Any, donate: bool = False) -> None:
        jitted = jax.jit(function, donate_argnums=0 if donate else ())
        memory = jitted.lower(*args).compile().memory_analysis()
        megabytes[name] = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        ) / 1e6

    measure("plain loss", loss, params, tokens)
    for name, family in FAMILIES.items():

        def sgd_step(params, key, tokens, family=family):
            loss_value, projections = zo_jax.project(loss, params, key, tokens, perturbation=family)
            keys = jax.random.split(key, 8)
            weights = -1e-3 * zo_jax.mean_weights(projections)
            return zo_jax.apply_directions(params, keys, weights, family), loss_value

        project = lambda p, k, t, f=family: zo_jax.project(loss, p, k, t, perturbation=f)
        estimate = lambda p, k, t, f=family: zo_jax.estimate_gradient(loss, p, k, t, perturbation=f)
        measure(f"{name}: `project`", project, params, key, tokens)
        measure(
            f"{name}: SGD step by `apply_directions`", sgd_step, params, key, tokens, donate=True
        )
        measure(f"{name}: `estimate_gradient`", estimate, params, key, tokens)
    for name, optimizer in (("SGD", optax.sgd(1e-3)), ("Adam", optax.adam(1e-3))):
        opt_state = jax.eval_shape(optimizer.init, params)

        def step(state, tokens, optimizer=optimizer):
            params, opt_state = state
            gradient = jax.grad(loss)(params, tokens)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        measure(f"backprop: {name} step", step, (params, opt_state), tokens, donate=True)
    plain = megabytes["plain loss"]
    print_table(
        f"gpt2, {sum(leaves) / 4e6:.0f} M parameters ({sum(leaves) / 1e6:.0f} MB, largest leaf "
        f"{max(leaves) / 1e6:.0f} MB), 1 x 128 tokens, 8 queries, central",
        ["what", "MB", "over the plain loss, MB", "in largest leaves"],
        [
            [
                name,
                f"{value:.0f}",
                f"{value - plain:.0f}",
                f"{(value - plain) * 1e6 / max(leaves):.2f}",
            ]
            for name, value in megabytes.items()
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every measurement")
    rounds = parser.parse_args().rounds
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    benchmark_time(rounds)
    benchmark_small_batches(rounds)
    benchmark_memory()
