"""What the output's error lacks as the error of a block below, and what could mend it.

  python benchmarks/depth.py --layers=8 --steps=400          cosines by layer, a minute
  python benchmarks/depth.py --layers=16 --steps=600 --train what they learn, three minutes

The model, data and optimiser are those of configs/default.py, with more layers; every block is
differentiated by itself, as in mode block_local, so that what is handed to it is all that differs:

  identity  the output's error as it is (the mode itself)
  learned   through the mean Jacobian of the blocks above, tokens taken one by one, found by signs
            added to the block's output: two evaluations of what lies above, for two layers a step,
            in a moving average
  exits     the error of the block's own output, as if the last norm and the head stood behind it
  both      the mean of identity and exits

Cosines are to the true error of a block's output, after steps of mode block_local; that of the best
linear map, found by least squares of the true errors on the output's, bounds any learned matrix.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import learning

from zo_jax.train import feedback, run_state, steps
from zo_jax.train.data.batches import read_batches
from zo_jax.train.model import Block
from zo_jax.train.sublayers import output

WAYS = ("identity", "learned", "exits", "both")
# Of the learned Jacobians: draws a step, the share of the newest, the size of the signs.
DRAWS, NEWEST, SIZE = 2, 0.3, 1e-2
COSINE_DRAWS, EVAL_BLOCKS = 8, 64


class Blocks:
    """The blocks of a model, and the errors of their outputs."""

    def __init__(self, model: Any):
        block = Block(model.num_layers, model.num_heads, model.dtype, model.param_dtype)
        self.model, self.num_layers = model, model.num_layers
        self.apply = lambda params, x_BTC: block.apply({"params": params}, x_BTC)[0]

    def forward(self, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The stream's end, and the stream before every block [L, B, T, C]."""
        step = lambda x_BTC, block: (self.apply(block, x_BTC), x_BTC)
        return jax.lax.scan(step, feedback.embed(params, tokens_BT[:, :-1]), params["blocks"])

    def end(self, params: Any, x_BTC: jax.Array, tokens_BT: jax.Array) -> Any:
        return output(params["ln_f"], self.model.head(params), x_BTC, tokens_BT[:, 1:])

    def mean_jacobian(self, params: Any, x_BTC: jax.Array, above: Any, key: jax.Array) -> jax.Array:
        """[C, C]: what the end of the stream has of a change before the block `above`, by one draw
        of signs, tokens taken one by one.
        """
        step = SIZE * jnp.sqrt(jnp.mean(jnp.square(x_BTC)))
        signs_BTC = jax.random.rademacher(key, x_BTC.shape, x_BTC.dtype)

        def climb(x_BTC: jax.Array) -> jax.Array:
            own = lambda i: jax.tree.map(lambda leaf: leaf[i], params["blocks"])
            climb_one = lambda i, x_BTC: self.apply(own(i), x_BTC)
            return jax.lax.fori_loop(above, self.num_layers, climb_one, x_BTC)

        moved_BTC = climb(x_BTC + step * signs_BTC) - climb(x_BTC - step * signs_BTC)
        moved_BTC /= 2 * step * x_BTC.shape[0] * x_BTC.shape[1]
        return jnp.einsum("btc,btd->cd", signs_BTC, moved_BTC)


def tell_cosines(trainer: Any, blocks: Blocks, num_steps: int) -> None:
    state, _ = trainer.take(run_state.init_state(trainer.config, trainer.model), 0, num_steps)
    params, tokens_BT = state.params, trainer.held_out[:EVAL_BLOCKS]
    x_BTC, kept = jax.jit(blocks.forward)(params, tokens_BT)
    outputs = [*kept[1:], x_BTC]
    error_of = jax.jit(lambda x_BTC: blocks.end(params, x_BTC, tokens_BT).error_BTC)
    jacobian = jax.jit(lambda i, x, key: blocks.mean_jacobian(params, x, i, key))
    end_BTC = true_BTC = error_of(x_BTC)

    def cosine(a: jax.Array, b: jax.Array) -> str:
        return f"{float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)):.3f}"

    print("| block | identity | learned | best linear map | exits | norm of the true error |")
    print("|" + "---|" * 6)
    for i in reversed(range(blocks.num_layers)):
        y_BTC, keys = outputs[i], jax.random.split(jax.random.key(i), COSINE_DRAWS)
        mean_CC = sum(jacobian(i + 1, y_BTC, key) for key in keys) / len(keys)
        flat = lambda e_BTC: e_BTC.reshape(-1, e_BTC.shape[-1])
        best_CC = jnp.linalg.lstsq(flat(end_BTC), flat(true_BTC))[0]
        found = (end_BTC, end_BTC @ mean_CC.T, end_BTC @ best_CC, error_of(y_BTC))
        relative = jnp.linalg.norm(true_BTC) / jnp.linalg.norm(end_BTC)
        cells = [cosine(one, true_BTC) for one in found]
        print(f"| {i} | {' | '.join(cells)} | {float(relative):.2f} |", flush=True)
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        _, pull = jax.vjp(functools.partial(blocks.apply, own), kept[i])
        (true_BTC,) = pull(true_BTC)


def make_step(config: Any, blocks: Blocks, way: str) -> Any:
    rules, L = steps.make_rules(config, blocks.model), blocks.num_layers

    def gradient(params, tokens_BT, jacobians_LCC):
        x_BTC, kept = blocks.forward(params, tokens_BT)
        end = blocks.end(params, x_BTC, tokens_BT)

        def of_block(_, args):
            i, block, x_BTC, jacobian_CC = args
            y_BTC, pull = jax.vjp(blocks.apply, block, x_BTC)
            error_BTC = end.error_BTC
            if way == "learned":
                error_BTC = jnp.where(i == L - 1, error_BTC, error_BTC @ jacobian_CC.T)
            elif way != "identity":
                own_BTC = blocks.end(params, y_BTC, tokens_BT).error_BTC
                error_BTC = own_BTC if way == "exits" else (own_BTC + error_BTC) / 2
            own, below_BTC = pull(error_BTC)
            return below_BTC, own

        args = jnp.arange(L), params["blocks"], kept, jacobians_LCC
        below_BTC, own = jax.lax.scan(of_block, end.error_BTC, args, reverse=True)
        embeddings = lambda p: feedback.embed(p, tokens_BT[:, :-1])
        _, pull = jax.vjp(embeddings, {name: params[name] for name in ("wte", "wpe")})
        (lowest,) = pull(below_BTC)
        head = {"head": {"embedding": end.head_VC}}
        return end.loss, {"blocks": own, "ln_f": end.norm} | lowest | head, kept

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state, jacobians_LCC, key, tokens_BT):
        loss, found, kept = gradient(state.params, tokens_BT, jacobians_LCC)
        for draw in range(DRAWS if way == "learned" else 0):
            own = jax.random.fold_in(key, draw)
            above = jax.random.randint(own, (), 1, L)
            new_CC = blocks.mean_jacobian(state.params, kept[above], above, own)
            mixed_CC = (1 - NEWEST) * jacobians_LCC[above - 1] + NEWEST * new_CC
            jacobians_LCC = jacobians_LCC.at[above - 1].set(mixed_CC)
        train, _ = rules.from_gradient(state.train, key, loss, rules.subset.select(found))
        return run_state.RunState(train, state.history, state.num_flat), jacobians_LCC

    return step


def train(trainer: Any, blocks: Blocks, way: str) -> tuple[float, float]:
    """The validation loss, and the core seconds of the steps."""
    config, C = trainer.config, blocks.model.width
    step = make_step(config, blocks, way)
    state = run_state.init_state(config, blocks.model)
    jacobians_LCC = jnp.tile(jnp.eye(C)[None], (blocks.num_layers, 1, 1))
    start = 0.0
    for i in range(config.train.num_steps):
        _, tokens_BT = read_batches(config, trainer.train_NT, i)
        state, jacobians_LCC = step(state, jacobians_LCC, jax.random.key(i), tokens_BT)
        if i == 0:
            jax.block_until_ready(state)
            start = time.process_time()
    jax.block_until_ready(state)
    seconds = time.process_time() - start
    return float(trainer.evaluate(state.params, trainer.held_out)), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--train", action="store_true", help="train with every way")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = learning.make_config("block_local", options.layers, options.seed, options.steps)
    trainer = learning.Trainer(config)
    blocks = Blocks(trainer.model)
    if not options.train:
        tell_cosines(trainer, blocks, options.steps)
        return
    print("| error of a block's output | validation loss | core seconds |\n|---|---|---|")
    for way in WAYS:
        loss, seconds = train(trainer, blocks, way)
        print(f"| {way} | {loss:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
