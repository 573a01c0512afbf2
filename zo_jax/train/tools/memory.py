"""What training needs in memory: the model sizes of the reference script, each way of training,
against plain inference.

zo-jax memory                                    the four sizes
zo-jax memory --config=default --sizes=config --vocab_size=65 --config.model.param_dtype=bfloat16
zo-jax memory --config=finetune_lora:MODEL --config.model.quantized=file

A pretrained model is measured as it is, on the next token of blocks of text.

Steps are compiled for shapes alone: no parameter is allocated. Memory is argument + temp + output -
alias of XLA's memory analysis; of a zeroth-order step, the larger of `project` and `update`, which
are two programs.
"""

from collections.abc import Callable, Iterator, Sequence
import copy
import dataclasses
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from zo_jax.train import choices, run_state, steps
from zo_jax.train.arguments import Parser, add_experiment, fail, parse, read_experiment
from zo_jax.train.config import (
    Config,
    ConfigError,
    ObjectiveConfig,
    OptimizerConfig,
    TaskConfig,
    keeps_ledger,
)
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import SIZES, make_model
from zo_jax.train.pretrained import open_pretrained
from zo_jax.train.validation import resolve, validate

DEFAULT_SIZES = ("20M", "200M", "500M", "1B")


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
    stats: Any = jitted.lower(*args).compile().memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )


def inference(config: Config, vocab_size: int) -> Need:
    """The loss of one batch, and nothing else."""
    model = _model(config, vocab_size)
    params = model.shapes()
    loss = lambda params, tokens_BT: next_token_loss(model, params, tokens_BT)
    return Need(measure(loss, params, _tokens(config, config.train.batch_size)), _bytes(params))


def zeroth_order(config: Config, vocab_size: int) -> Need:
    """A step of mode zo."""
    model, state = _model(config, vocab_size), _state(config, vocab_size)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    tokens = _tokens(config, config.train.batch_size, per_query=config.zo.batch_per_query)
    if not keeps_ledger(config):
        step = steps.make_unrecorded_step(config, model)
        return Need(measure(step, state, key, tokens), _bytes(state.params))
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    c = jax.ShapeDtypeStruct((choices.num_numbers(config),), jnp.float32)
    # While `project` runs, the optimiser's state waits.
    waiting = _bytes(state) - _bytes(state.params)
    step = state.train.family, state.step
    forward = measure(steps.make_project(config, model), state.params, key, tokens, *step) + waiting
    update = measure(steps.make_update(config, model), state, key, loss, c)
    return Need(max(forward, update), _bytes(state.params))


def backprop(config: Config, vocab_size: int) -> Need:
    """A step of mode fo."""
    model, state = _model(config, vocab_size), _state(config, vocab_size)
    tokens = _tokens(config, config.fo.batch_size or config.train.batch_size)
    return Need(measure(steps.make_fo_step(config, model), state, tokens), _bytes(state.params))


# Row: (its measure, mode, optimiser, whether activations are checkpointed); inference has no mode.
STEPS = {
    "inference": (inference, "", "sgd", False),
    "ZO-SGD": (zeroth_order, "zo", "sgd", False),
    "ZO-Adam": (zeroth_order, "zo", "adam", False),
    "FO-SGD": (backprop, "fo", "sgd", False),
    "FO-SGD, activations checkpointed": (backprop, "fo", "sgd", True),
    "FO-Adam": (backprop, "fo", "adam", False),
    "FO-Adam, activations checkpointed": (backprop, "fo", "adam", True),
}


def table(config: Config, vocab_size: int, sizes: Sequence[str]) -> Iterator[str]:
    """The lines of a Markdown table, each once it is known: GB of each size and step, and the
    factor to inference.
    """
    yield "| model | step | GB | over inference | without optimiser state |"
    yield "|---|---|---|---|---|"
    for size in sizes:
        plain = inference(_sized(config, size, vocab_size), vocab_size)
        for name, (measure_step, mode, optimizer, checkpointed) in STEPS.items():
            one = _sized(config, size, vocab_size)
            one.mode, one.model.checkpoint_activations = mode or one.mode, checkpointed
            one.optimizer = dataclasses.replace(OptimizerConfig(), name=optimizer)
            need = measure_step(one, vocab_size) if mode else plain
            state = _state(one, vocab_size)
            moments = _bytes(state) - _bytes(state.params) if mode else 0
            factor, without = (x / plain.total for x in (need.total, need.total - moments))
            yield f"| {size} | {name} | {need.total / 1e9:.3g} | {factor:.2f} | {without:.2f} |"


def _sized(config: Config, size: str, vocab_size: int) -> Config:
    one = copy.deepcopy(config)
    if size != "config":
        one.model.size = size
        one.model.num_layers = one.model.num_heads = one.model.width = 0
    return resolve(one, 1, lambda: np.ones(_model(one, vocab_size).vocab_size))


def _state(config: Config, vocab_size: int) -> Any:
    return run_state.state_shapes(config, _model(config, vocab_size))


def _model(config: Config, vocab_size: int) -> Any:
    return open_pretrained(config) or make_model(config.model, vocab_size)


def _tokens(config: Config, num_blocks: int, per_query: bool = False) -> jax.ShapeDtypeStruct:
    shape = (num_blocks, config.data.block_size)
    return jax.ShapeDtypeStruct((config.zo.num_queries, *shape) if per_query else shape, jnp.int32)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main(args: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = Parser(
        prog="zo-jax memory",
        usage="zo-jax memory [--sizes=SIZE,...] [--vocab_size=N] [--config=NAME] [--config.FIELD=VALUE ...]",  # noqa: E501
        description=__doc__,
    )
    parser.add_argument(
        "--sizes",
        default=",".join(DEFAULT_SIZES),
        metavar="SIZE,...",
        help=f"named sizes, of {', '.join(SIZES)}; or config, the experiment's own (default: %(default)s)",  # noqa: E501
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=50257,
        metavar="N",
        help="words of the vocabulary (default: GPT-2's %(default)s)",
    )
    add_experiment(parser, default="gpt2_20m")
    try:
        options = parse(parser, args)
        config, sizes = read_experiment(options), options.sizes.split(",")
        # What is measured are losses of blocks, and whole steps.
        config.task, config.objective = TaskConfig(), ObjectiveConfig()
        config.train.keep_activations, config.zo.tiers = False, ""
        validate(config)
        if config.model.path:
            sizes = ["config"]
        if unknown := [size for size in sizes if size not in (*SIZES, "config")]:
            raise ConfigError(
                f"--sizes must be of {', '.join((*SIZES, 'config'))}; got {unknown[0]!r}"
            )
        if options.vocab_size < 1:
            raise ConfigError(f"--vocab_size must be at least 1; got {options.vocab_size}")
    except ConfigError as error:
        return fail(error)
    zo, data = config.zo, config.data
    print(
        f"{config.train.batch_size} blocks of {data.block_size} tokens, {zo.num_queries} "
        f"{zo.perturbation} queries, "
        f"{zo.parallel_batch_size} at once; parameters {config.model.param_dtype}, products "
        f"{config.model.compute_dtype}; on {jax.default_backend()}\n"
    )
    lines = table(config, options.vocab_size, sizes)
    with tqdm.tqdm(total=len(sizes) * len(STEPS), unit="step", leave=False) as bar:
        for i, line in enumerate(lines):
            bar.write(line)
            sys.stdout.flush()
            bar.update(i > 1)  # not of the header
    return 0
