"""Low-precision parameters: rounding to nearest against stochastic rounding, and int8 storage.

  python benchmarks/precision.py            ten minutes on 2 CPU cores

The model and data of configs/zo_plain.py with a constant learning rate of 1e-4, whose updates are
below half the spacing of most bfloat16 weights, by backprop and by forward passes; validation loss
in nats after so many steps. int8: between steps every row of a matrix is 8-bit integers and one
float32 scale, 1/100 of its largest entry when training began and doubled when a row outgrows it;
updates are rounded to the integers stochastically.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from configs import zo_plain
from zo_jax.train import evaluate, run_state, steps
from zo_jax.train.config import Config
from zo_jax.train.data import batches
from zo_jax.train.model import make_model
from zo_jax.train.validation import resolve


def quantize(params: Any, scales: Any, key: jax.Array) -> tuple[Any, Any]:
    """int8 matrices and the scales of their rows, rounded stochastically; other leaves as they
    are.
    """

    def of_leaf(path, x, scale):
        if scale is None:
            return x, None
        fits = jnp.max(jnp.abs(x), axis=-1, keepdims=True) <= 126 * scale
        scale = jnp.where(fits, scale, 2 * scale)
        noise = jax.random.uniform(jax.random.fold_in(key, len(str(path))), x.shape)
        return jnp.clip(jnp.floor(x / scale + noise), -127, 127).astype(jnp.int8), scale

    flat, treedef = jax.tree.flatten_with_path(params)
    both = [
        of_leaf(path, x, s)
        for (path, x), s in zip(flat, treedef.flatten_up_to(scales), strict=True)
    ]
    return tuple(treedef.unflatten(part) for part in zip(*both, strict=True))


def dequantize(stored: Any, scales: Any) -> Any:
    """float32 parameters."""
    return jax.tree.map(
        lambda s, x: x if s is None else x.astype(jnp.float32) * s,
        scales,
        stored,
        is_leaf=lambda s: s is None,
    )


def validation_loss(config: Config, num_steps: int, int8: bool = False) -> float:
    """Of a run of so many steps."""
    corpus = batches.load_corpora(config)
    config = resolve(config, len(corpus.train_NT))
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    train_step, state = steps.make_train_step(config, model), run_state.init_state(config, model)
    if int8:
        rows = lambda x: jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 100 if x.ndim > 2 else None
        scales = jax.tree.map(rows, state.params)
        scales["wte"] = {"embedding": rows(state.params["wte"]["embedding"][None])[0]}
        store, load = jax.jit(quantize), jax.jit(dequantize)
    for step in range(num_steps):
        pair = batches.read_batches(config, corpus.train_NT, step)
        state, *_ = train_step(state, step, *pair)
        if int8:
            stored, scales = store(state.params, scales, jax.random.key(step))
            state = state._replace(params=load(stored, scales))
    held_out = evaluate.choose_blocks(corpus.validation_NT, 512)
    return float(evaluate.make_evaluate(model)(state.params, held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=1000)
    options = parser.parse_args()
    print(
        f"| parameters | rounding | backprop | forward passes | (after {options.num_steps} steps)"
    )
    print("|---|---|---|---|")
    for dtype, rounding, int8 in (
        ("float32", "nearest", False),
        ("bfloat16", "nearest", False),
        ("bfloat16", "stochastic", False),
        ("int8", "stochastic", True),
    ):
        losses = []
        for mode in ("fo", "zo"):
            config = zo_plain.get_config()
            config.mode = mode
            config.model.param_dtype = "float32" if int8 else dtype
            config.optimizer.rounding = rounding
            config.optimizer.learning_rate, config.optimizer.schedule = 1e-4, "constant"
            losses.append(validation_loss(config, options.num_steps, int8))
        print(f"| {dtype} | {rounding} | {losses[0]:.3f} | {losses[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
