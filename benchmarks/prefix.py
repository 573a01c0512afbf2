"""What estimates of a part of the parameters cost, where what lies below it is evaluated once.

  python benchmarks/prefix.py               the table, some five minutes on 2 CPU cores
  python benchmarks/prefix.py --rounds=3    fewer rounds, coarser medians

R is the time of `project` with 8 queries of one batch, 2 x 128 tokens, over that of the 16 plain
evaluations of the whole loss. "expected" is (prefix + 16 suffixes) / (16 whole), all timed: the
prefix is the loss up to the first layer that is trained, the suffix what comes after. The model is
the GPT of 20M with an output head of its own, once with its layers scanned, once written out. All
programs are jitted; every round runs each once, in turn, and a figure is the median of the rounds'
ratios.
"""

import argparse
from collections.abc import Callable
import dataclasses
import os
from typing import Any

from estimator import VOCAB_SIZE, compile_timed, print_table, ratio, time_in_turn
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

import zo_jax
from zo_jax.train.losses import head_losses
from zo_jax.train.model import GPT, SIZES, Block

QUERIES = 8
# Which layers are trained, of six, and whether the last norm and the head are.
SCOPES = {
    "last quarter of the layers": (5, False),
    "last half of the layers": (3, False),
    "last block, norm and head": (5, True),
    "last norm and head": (6, True),
    "everything": (0, True),
}


class Model:
    """The GPT with its layers scanned, as a stack, or written out, as a list."""

    def __init__(self, is_scanned: bool):
        self.gpt = dataclasses.replace(
            GPT(VOCAB_SIZE, *SIZES["20M"], context_length=1024), tied_head=False
        )
        self.is_scanned = is_scanned
        self.params = self.gpt.fresh(jax.random.key(0))
        if not is_scanned:
            layer = lambda i: jax.tree.map(lambda x: x[i], self.params["blocks"])
            self.params["blocks"] = [layer(i) for i in range(self.gpt.num_layers)]
        self.block = Block(
            self.gpt.num_layers, self.gpt.num_heads, self.gpt.dtype, self.gpt.param_dtype
        )

    def embed(self, params: Any, tokens_BT: jax.Array) -> jax.Array:
        positions = params["wpe"]["embedding"][None, : tokens_BT.shape[1] - 1]
        return params["wte"]["embedding"][tokens_BT[:, :-1]] + positions

    def through(self, layers: Any, x_BTC: jax.Array) -> jax.Array:
        step = lambda x, p: self.block.apply({"params": p}, x)
        if self.is_scanned:
            return lax.scan(step, x_BTC, layers)[0]
        for p in layers:
            x_BTC, _ = step(x_BTC, p)
        return x_BTC

    def head_loss(self, params: Any, x_BTC: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        x_BTC = nn.LayerNorm(epsilon=1e-5).apply({"params": params["ln_f"]}, x_BTC)
        hidden_NC = x_BTC.reshape(-1, self.gpt.width)
        targets_N = tokens_BT[:, 1:].reshape(-1)
        return jnp.mean(head_losses(hidden_NC, self.gpt.head(params), targets_N))

    def loss(self, params: Any, tokens_BT: jax.Array) -> jax.Array:
        x_BTC = self.through(params["blocks"], self.embed(params, tokens_BT))
        return self.head_loss(params, x_BTC, tokens_BT)

    def layers(self, params: Any, first: int, end: int) -> Any:
        """Those from `first` to before `end`."""
        if self.is_scanned:
            return jax.tree.map(lambda x: x[first:end], params["blocks"])
        return params["blocks"][first:end]

    def split(self, first: int, with_head: bool) -> tuple[Any, Callable[[Any, Any], Any]]:
        """(what is trained, (frozen, trained) -> parameters)."""
        trained = {"blocks": self.layers(self.params, first, self.gpt.num_layers)}
        if with_head:
            trained |= {name: self.params[name] for name in ("ln_f", "head")}
        if first == 0:
            trained |= self.params

        def merge(params, trained):
            merged = params | trained
            if not self.is_scanned and first:
                merged["blocks"] = params["blocks"][:first] + trained["blocks"]
            elif first:
                put = lambda old, new: old.at[first:].set(new)
                merged["blocks"] = jax.tree.map(put, params["blocks"], trained["blocks"])
            return merged

        return trained, merge


def benchmark(model: Model, rounds: int) -> list[list[str]]:
    tokens = jax.random.randint(jax.random.key(1), (2, 129), 0, VOCAB_SIZE)
    params, num_layers, key = model.params, model.gpt.num_layers, jax.random.key(2)
    # A copy of the data for every query, so that XLA does not find the evaluations equal.
    copies = lambda x: jnp.broadcast_to(x, (QUERIES, *x.shape))
    repeat = lambda fn: (
        lambda params, *xs: lax.map(
            lambda i: fn(params, *(x[i // 2] for x in xs)), jnp.arange(2 * QUERIES)
        )
    )
    args = params, copies(tokens)
    programs = {"whole": (compile_timed(repeat(model.loss), *args)[0], *args)}
    for name, (first, with_head) in SCOPES.items():
        trained, merge = model.split(first, with_head)

        def project(frozen, trained, key, tokens, merge=merge):
            loss = lambda trained, tokens: model.loss(merge(frozen, trained), tokens)
            return zo_jax.project(loss, trained, key, tokens, num_queries=QUERIES)

        def prefix(params, tokens, first=first):
            return model.through(model.layers(params, 0, first), model.embed(params, tokens))

        def suffix(params, x, tokens, first=first):
            if first < num_layers:
                x = model.through(model.layers(params, first, num_layers), x)
            return model.head_loss(params, x, tokens)

        x = jax.jit(prefix)(params, tokens)
        for part, function, args in (
            ("project", project, (params, trained, key, tokens)),
            ("prefix", prefix, (params, tokens)),
            ("suffix", repeat(suffix), (params, copies(x), copies(tokens))),
        ):
            programs[name, part] = (compile_timed(function, *args)[0], *args)
    seconds = time_in_turn(programs, rounds)
    rows = []
    for name in SCOPES:
        expected = seconds[name, "prefix"] + seconds[name, "suffix"]
        rows.append(
            [
                "scanned" if model.is_scanned else "written out",
                name,
                ratio(seconds[name, "project"], seconds["whole"]),
                ratio(expected, seconds["whole"]),
                ratio(seconds[name, "project"], expected),
            ]
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every measurement")
    rounds = parser.parse_args().rounds
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    print_table(
        f"GPT 20M, {QUERIES} queries of 2 x 128 tokens, central",
        ["layers", "trained", "R", "expected", "R / expected"],
        [row for is_scanned in (True, False) for row in benchmark(Model(is_scanned), rounds)],
    )
