"""What training needs in memory: the model sizes of the reference script, each way of training, against plain inference.

  python -m zo_jax.train.tools.memory                                          the four sizes
  python -m zo_jax.train.tools.memory --config=configs/gpt2_20m.py --config.model.param_dtype=bfloat16 --sizes=config

Steps are compiled for shapes alone: no parameter is allocated. Memory is argument + temp + output - alias of XLA's memory analysis; of a
zeroth-order step, the larger of `project` and `update`, which are two programs.
"""

from collections.abc import Callable, Sequence
import copy
import dataclasses
from pathlib import Path
import sys
from typing import Any, NamedTuple

from absl import app, flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags

from zo_jax.train import cli, steps
from zo_jax.train.config import Config, ConfigError, OptimizerConfig
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model
from zo_jax.train.validation import resolve, validate

SIZES = ("20M", "200M", "500M", "1B")


class Need(NamedTuple):
    """Bytes.

    Attributes:
      total: of the step at its peak, what it is given included.
      parameters: of them, the parameters.
    """

    total: int
    parameters: int


def measure(function: Callable[..., Any], *args: Any, donate: Sequence[int] = ()) -> int:
    """Bytes that a call needs: arguments, temporaries and outputs, less what is donated.

    Args:
      function: of arrays.
      args: pytrees of `jax.ShapeDtypeStruct`.
      donate: positions of the arguments whose memory the outputs take over.
    """
    jitted = function if hasattr(function, "lower") else jax.jit(function, donate_argnums=donate)
    stats = jitted.lower(*args).compile().memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )


def inference(config: Config, vocab_size: int) -> Need:
    """The loss of one batch, and nothing else."""
    model = make_model(config.model, vocab_size)
    params = _state(config, vocab_size).params
    loss = lambda params, tokens_BT: next_token_loss(model, params, tokens_BT)
    return Need(measure(loss, params, _tokens(config, config.train.batch_size)), _bytes(params))


def zeroth_order(config: Config, vocab_size: int) -> Need:
    """A step of mode zo."""
    model, state = make_model(config.model, vocab_size), _state(config, vocab_size)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    tokens = _tokens(config, config.train.batch_size, per_query=config.zo.batch_per_query)
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    c = jax.ShapeDtypeStruct((config.zo.num_queries,), jnp.float32)
    # While `project` runs, the optimiser's state waits.
    waiting = _bytes(state) - _bytes(state.params)
    forward = measure(steps.make_project(config, model), state.params, key, tokens) + waiting
    update = measure(steps.make_update(config, model), state, key, loss, c)
    return Need(max(forward, update), _bytes(state.params))


def backprop(config: Config, vocab_size: int) -> Need:
    """A step of mode fo."""
    model, state = make_model(config.model, vocab_size), _state(config, vocab_size)
    tokens = _tokens(config, config.fo.batch_size or config.train.batch_size)
    return Need(measure(steps.make_fo_step(config, model), state, tokens), _bytes(state.params))


def table(config: Config, vocab_size: int, sizes: Sequence[str]) -> str:
    """A Markdown table, a row for each size and way of training: GB, and the factor to inference."""
    lines = [
        "| model | step | GB | over inference | without optimiser state |",
        "|---|---|---|---|---|",
    ]
    for size in sizes:
        one = copy.deepcopy(config)
        if size != "config":
            one.model.size = size
            one.model.num_layers = one.model.num_heads = one.model.width = 0
        plain = inference(resolve(one, 1), vocab_size)
        rows = [("inference", plain, 0)]
        for name, step, optimizer, checkpointed in (
            ("ZO-SGD", zeroth_order, "sgd", False),
            ("ZO-Adam", zeroth_order, "adam", False),
            ("FO-SGD", backprop, "sgd", False),
            ("FO-SGD, activations checkpointed", backprop, "sgd", True),
            ("FO-Adam", backprop, "adam", False),
            ("FO-Adam, activations checkpointed", backprop, "adam", True),
        ):
            one.mode = "zo" if step is zeroth_order else "fo"
            one.optimizer = dataclasses.replace(OptimizerConfig(), name=optimizer)
            one.model.checkpoint_activations = checkpointed
            resolved = resolve(one, 1)
            state = _state(resolved, vocab_size)
            moments = _bytes(state) - _bytes(state.params)
            rows.append((name, step(resolved, vocab_size), moments))
        for name, need, moments in rows:
            factor, without = (x / plain.total for x in (need.total, need.total - moments))
            lines.append(
                f"| {size} | {name} | {need.total / 1e9:.2f} | {factor:.2f} | {without:.2f} |"
            )
    return "\n".join(lines)


def _state(config: Config, vocab_size: int) -> Any:
    model = make_model(config.model, vocab_size)
    return jax.eval_shape(lambda: steps.init_state(config, model))


def _tokens(config: Config, num_blocks: int, per_query: bool = False) -> jax.ShapeDtypeStruct:
    shape = (num_blocks, config.data.block_size)
    return jax.ShapeDtypeStruct((config.zo.num_queries, *shape) if per_query else shape, jnp.int32)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    """The command line."""
    config = config_flags.DEFINE_config_file("config", None, "The experiment.")
    sizes = flags.DEFINE_list(
        "sizes", list(SIZES), "Named sizes, or config for the experiment's own."
    )
    vocab_size = flags.DEFINE_integer("vocab_size", 50257, "Words of the vocabulary.")

    def run(_: list[str]) -> None:
        try:
            validate(config.value)
            known = {*SIZES, "gpt2", "gpt2-medium", "gpt2-large", "config"}
            if unknown := set(sizes.value) - known:
                raise ConfigError(
                    f"--sizes must be of {', '.join(sorted(known))}; got {unknown.pop()}"
                )
            zo, data, train = config.value.zo, config.value.data, config.value.train
            print(
                f"{train.batch_size} blocks of {data.block_size} tokens, {zo.num_queries} {zo.perturbation} queries, "
                f"{zo.parallel_batch_size} at once; parameters {config.value.model.param_dtype}, products "
                f"{config.value.model.compute_dtype}; on {jax.default_backend()}\n"
            )
            print(table(config.value, vocab_size.value, sizes.value), flush=True)
        except ConfigError as error:
            cli.fail(error)

    default = Path(__file__).parent.parent / "configs" / "gpt2_20m.py"
    try:
        argv = [sys.argv[0], *cli.prepare_arguments(sys.argv[1:], default)]
    except ConfigError as error:
        cli.fail(error)
    app.run(run, argv=argv)


if __name__ == "__main__":
    main()
