"""What devices exchange in a step: collectives and bytes, read from the compiled programs of the
20M model on eight virtual devices.

  python benchmarks/scaling.py              five minutes on 2 CPU cores

Nothing is run and no parameter is allocated. Bytes are of the results of the collectives on one
device, those in loops counted as often as the loop turns. Virtual devices share the same cores, so
seconds would say nothing.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from collections import Counter
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax import families
from zo_jax.layout import Layout
from zo_jax.train import run_state, steps
from zo_jax.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ZOConfig,
)
from zo_jax.train.mesh import make_mesh
from zo_jax.train.model import RULES, make_model
from zo_jax.train.validation import resolve

_COLLECTIVE = re.compile(
    r"= (\(?)([^=]*?)(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("  # noqa: E501
)
_BYTES = {"f32": 4, "u32": 4, "s32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1, "u16": 2}


def exchanged(compiled: Any) -> tuple[Counter, int]:
    """(how often each kind of collective runs, bytes of their results) in one call of a compiled
    function.
    """
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in compiled.as_text().splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)
    memo: dict[str, tuple[Counter, int]] = {}

    def of(name: str) -> tuple[Counter, int]:
        if name in memo:
            return memo[name]
        counts, size = Counter(), 0
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                counts[found[3]] += 1
                size += sum(
                    _BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
                    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[2])
                )
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(
                r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line
            ):
                inner, inner_size = of(called)
                times = int(turns[1]) if turns and f"body=%{called}" in line else 1
                for kind, count in inner.items():
                    counts[kind] += count * times
                size += inner_size * times
        memo[name] = counts, size
        return memo[name]

    return of(entry)


def programs(mode: str, q: int, batch_size: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The compiled parts of a step of the 20M model on a mesh."""
    config = Config(
        mode=mode,
        model=ModelConfig(size="20M"),
        data=DataConfig(block_size=128),
        zo=ZOConfig(num_queries=q),
        optimizer=OptimizerConfig(name="adam"),
        train=TrainConfig(num_steps=1, batch_size=batch_size),
    )
    config = resolve(config, 1)
    model = make_model(config.model, 50257)
    devices = jax.devices()[: math.prod(shape)]
    layout = Layout(make_mesh(*shape, devices=devices), RULES)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.eval_shape(lambda: run_state.init_state(config, model))
    state = jax.tree.map(place, state, layout.shardings(state))
    everywhere = lambda shape, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=layout.split(len(shape), None)
    )
    tokens = place(jax.ShapeDtypeStruct((batch_size, 128), jnp.int32), layout.split(2, 0, "data"))
    if mode == "fo":
        return {"step": steps.make_fo_step(config, model, layout).lower(state, tokens).compile()}
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    key = place(key, layout.split(0, None))
    loss, c = everywhere((), jnp.float32), everywhere((q,), jnp.float32)
    project = steps.make_project(config, model, layout).lower(state.params, key, tokens)
    update = steps.make_update(config, model, layout).lower(state, key, loss, c)
    return {"project": project.compile(), "update": update.compile()}


def report(what: str, mode: str, q: int, batch_size: int, shape: tuple[int, int, int]) -> None:
    """A row of the table."""
    cells = []
    for part, compiled in programs(mode, q, batch_size, shape).items():
        counts, size = exchanged(compiled)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
        cells.append(f"{part}: {kinds}; {size:,} bytes")
    print(f"| {what} | {shape} | {q} | {batch_size} | {' / '.join(cells)} |", flush=True)


def recomputation() -> None:
    """Seconds to sum one direction of the 20M model, which every device of a query group does for
    every query.
    """
    model = make_model(ModelConfig(size="20M"), 50257)
    config = resolve(Config(model=ModelConfig(size="20M"), train=TrainConfig(num_steps=1)), 1)
    params = run_state.init_state(config, model).params
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for family in (families.rademacher(), families.low_rank(1), families.gaussian()):
        keys, weights = jax.random.split(jax.random.key(0, impl="threefry2x32"), 8), jnp.ones(8)
        add = jax.jit(family.add, donate_argnums=0)
        params = jax.block_until_ready(add(params, keys, weights))
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            params = jax.block_until_ready(add(params, keys, weights))
            seconds.append(time.perf_counter() - start)
        one = sorted(seconds)[2] / 8
        print(f"{family}: {1e3 * one:.2f} ms a direction, {1e12 * one / size:.0f} ps an entry")


def main() -> None:
    print("| what | mesh (query, data, model) | q | blocks | exchanged by one device in a step |")
    print("|---|---|---|---|---|")
    for n in (1, 2, 4, 8):
        report("strong scaling, queries", "zo", 8, 2, (n, 1, 1))
    for n in (2, 4, 8):
        report("weak scaling, queries", "zo", 8 * n, 2, (n, 1, 1))
    for n in (2, 8):
        report("strong scaling, data", "zo", 8, 8, (1, n, 1))
    for n in (2, 4):
        report("strong scaling, model", "zo", 8, 2, (1, 1, n))
    report("all three", "zo", 8, 2, (2, 2, 2))
    for n in (2, 8):
        report("backprop, data parallel", "fo", 8, 8, (1, n, 1))
    print()
    recomputation()


if __name__ == "__main__":
    main()
