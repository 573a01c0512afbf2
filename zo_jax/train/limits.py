"""What a run needs in memory at the least, by arithmetic; refused where the machine has less,
explained where it ran out.

T stands for the tokens of a block.
"""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.layout import Layout
from zo_jax.train.config import FEEDBACK_MODES, GRADIENT_MODES, QUERY_MODES, Config, blocks_per_step
from zo_jax.train.settings import ConfigError
from zo_jax.train.signals import RunStopped

# Float32 numbers that an optimiser keeps for each parameter, at the least.
_MOMENTS = {"sgd": 0, "adam": 2, "adamw": 2, "muon": 1, "mudamw": 2}
# What a container may have, in the two versions of Linux's control groups.
_CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
# How XLA says so: when it allocates, and when a computation that was dispatched does.
_SIGNS = ("RESOURCE_EXHAUSTED", "Out of memory", "bad_alloc")


class OutOfMemory(RunStopped):
    """The machine has too little memory for a step; EX_OSERR of sysexits.h."""

    exit_code = 71


def least_memory(config: Config, model: Any, layout: Layout | None = None) -> dict[str, int]:
    """Bytes that a device needs at the least, by what they are for. No array is made, and no shape
    traced.

    Of the activations only those are counted that no compiler can avoid: of one layer, the residual
    stream beside queries, keys, values and scores, or beside the hidden layer of its MLP; of
    backprop, what the products of all layers read, or with checkpoints the stream below each; of
    feedback, the stream before each sublayer.

    Args:
      config: resolved.
      model: a `GPT` or a `Pretrained`.
      layout: of a run on many devices.
    """
    train, mesh = config.train, layout.mesh.shape if layout else {"data": 1, "model": 1}
    # Of a task's examples it is not known yet how long they are.
    T = config.data.block_size - 1 if config.task.name == "text" else 1
    needs = {"parameters": model.num_bytes // mesh["model"]}
    if config.scope == "full":  # else the trained part may be small
        moments = _MOMENTS[config.optimizer.name] + (config.optimizer.momentum > 0)
        needs["optimiser state"] = 4 * model.num_params * moments // mesh["model"]
        if config.optimizer.anchor:
            needs["anchor"] = 4 * model.num_params // mesh["model"]
        if config.mode in GRADIENT_MODES:
            needs["gradient"] = 4 * model.num_params // mesh["model"]
    size = jnp.dtype(config.model.compute_dtype).itemsize
    stream, scores = T * model.width * size, model.num_heads * T * T * size  # of an example
    layer = max(4 * stream + scores, 5 * stream)
    activations = 0
    if config.mode in QUERY_MODES:
        at_once = config.zo.parallel_batch_size
        if config.objective.name == "reward":
            at_once = 2 * config.zo.num_queries
        rows = train.batch_size // config.zo.batch_chunks * at_once
        activations = rows * layer
    if config.mode != "zo":
        rows = (config.fo.batch_size or train.batch_size) // config.fo.gradient_accumulation_steps
        checkpointed = config.mode in FEEDBACK_MODES or config.model.checkpoint_activations
        kept = stream if checkpointed else 12 * stream + scores
        if config.mode == "feedback" and not config.model.path:
            kept = 2 * stream
        activations = max(activations, rows * (model.num_layers * kept + layer))
    needs["activations"] = activations // mesh["data"]
    needs["tokens"] = 4 * blocks_per_step(config) * T // mesh["data"]
    return needs


def device_memory() -> int:
    """Bytes that one device can have: a GPU's own, or its part of what the machine or the container
    has.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or host_memory() // jax.local_device_count()


def host_memory() -> int:
    """Bytes that the machine or the container has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in map(Path, _CONTAINER_LIMITS):
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word max
            total = min(total, int(file.read_text()))
    return total


def check_memory(config: Config, model: Any, layout: Layout | None = None) -> None:
    """Whether the machine has the memory that a run needs at the least.

    Raises:
      ConfigError: it has not; the message has the numbers, and what to lower.
    """
    needs, there = least_memory(config, model, layout), device_memory()
    if sum(needs.values()) > there:
        raise ConfigError(
            f"{_tell(needs)}, but {jax.devices()[0].device_kind} has {there / 1e9:.1f} GB; "
            f"{_remedy(config, needs)}"
        )


@contextlib.contextmanager
def explain_memory(config: Config, model: Any, layout: Layout | None = None) -> Iterator[None]:
    """Inside, running out of memory says how much a step needs, and what to lower.

    Raises:
      OutOfMemory: instead of what Python, NumPy or XLA raise.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not isinstance(error, MemoryError) and not any(sign in reason for sign in _SIGNS):
            raise
        needs = least_memory(config, model, layout)
        raise OutOfMemory(
            f"out of memory ({reason}): {_tell(needs)}, of the {device_memory() / 1e9:.1f} GB of "
            f"{jax.devices()[0].device_kind}; {_remedy(config, needs)}, in another --workdir or "
            f"with --restart"
        ) from error


def _tell(needs: dict[str, int]) -> str:
    parts = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in needs.items() if size)
    return f"this run needs at least {sum(needs.values()) / 1e9:.1f} GB a device ({parts})"


def _remedy(config: Config, needs: dict[str, int]) -> str:
    """What to change, by what needs the most."""
    model, zo, train = config.model, config.zo, config.train
    long = f"data.block_size={config.data.block_size}"
    if config.task.name != "text":
        long = f"task.max_tokens={config.task.max_tokens}"
    batch = f"lower train.batch_size={train.batch_size} or {long}"
    most = max(needs, key=lambda what: needs[what])
    if most == "activations" and config.mode == "zo":
        return f"{batch}, or raise zo.batch_chunks={zo.batch_chunks}"
    if most == "activations" and config.mode in FEEDBACK_MODES:
        return batch
    if most == "activations":
        parts = config.fo.gradient_accumulation_steps
        return f"{batch}, or raise fo.gradient_accumulation_steps={parts}"
    if most == "tokens":
        return f"lower train.batch_size={train.batch_size} or zo.num_queries={zo.num_queries}"
    smaller = (
        f"lower model.width={model.width}, model.num_layers={model.num_layers} or "
        f"model.context_length={model.context_length}"
    )
    if model.path:
        smaller = (
            "take a smaller model, or set model.param_dtype=bfloat16, or model.quantized=int8 "
            "with scope=lora"
        )
    has_moments = bool(needs.get("optimiser state"))
    return smaller + (", or set optimizer.name=sgd, which keeps no state" if has_moments else "")
