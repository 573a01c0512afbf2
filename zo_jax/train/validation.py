"""What a configuration must be, checked before anything is compiled."""

from collections.abc import Mapping, Sequence
import copy
import difflib
import math
from typing import Any

from zo_jax.guided import METHODS
from zo_jax.train.config import (
    Config,
    ConfigError,
    InstructConfig,
    OptimizerConfig,
    blocks_per_step,
    walk,
)
from zo_jax.train.data.sources import HUB_DATASETS
from zo_jax.train.model import SIZES

MODES = ("zo", "fo", "calibrate", "instruct")
DTYPES = ("float32", "bfloat16", "float16")
PERTURBATIONS = ("rademacher", "gaussian", "sphere", "low_rank")
DIFFERENCES = ("central", "forward", "jvp")
OPTIMIZERS = ("sgd", "adam", "adamw", "muon", "mudamw")
SCHEDULES = ("constant", "cosine")
ROUNDINGS = ("stochastic", "nearest")
SOURCES = ("shakespeare", "text", "disk", *HUB_DATASETS)
MESH = ("mesh.query", "mesh.data", "mesh.model")
TOKENIZERS = ("char", "bpe", "gpt2")


def resolve(config: Config, num_train_blocks: int) -> Config:
    """A copy of a valid configuration with everything that it leaves open filled in.

    Args:
      config: passed `validate`.
      num_train_blocks: training blocks of the corpus, from which epochs become steps.

    Raises:
      ConfigError: the warm-up is as long as the run.
    """
    config = copy.deepcopy(config)
    for name, field, value in walk(config):
        if field.type is float:  # an integer is a number too, but saved configs compare as text
            section, _, leaf = name.rpartition(".")
            setattr(getattr(config, section) if section else config, leaf, float(value))
    if config.model.size in SIZES:
        for name, value in SIZES[config.model.size]._asdict().items():
            setattr(config.model, name, value)
    if not config.train.num_steps:
        blocks = config.train.num_epochs * num_train_blocks
        config.train.num_steps = max(1, blocks // blocks_per_step(config))
    config.zo.parallel_batch_size = min(config.zo.parallel_batch_size, config.zo.num_queries)
    _check_warmup(config)
    return config


def validate(config: Any) -> None:
    """Checks everything that can be checked without reading the data.

    Raises:
      ConfigError: the first problem found, with the field, what it must be, and what it is.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            "get_config() must return a zo_jax.train.config.Config; got " + type(config).__name__
        )
    for name, field, value in walk(config):
        _check_type(name, field.type, value)
    _check_choices(config)
    _check_ranges(config)
    _check_combinations(config)


def _check_type(name: str, kind: type, value: Any) -> None:
    accepted = (int, float) if kind is float else kind
    # A bool is an int to Python, but never meant as one here.
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{name} must be of type {kind.__name__}; got {value!r}")


def _check_choices(config: Config) -> None:
    for name, value, choices in (
        ("mode", config.mode, MODES),
        ("model.size", config.model.size, ("custom", *SIZES)),
        ("model.param_dtype", config.model.param_dtype, DTYPES),
        ("model.compute_dtype", config.model.compute_dtype, DTYPES),
        ("data.source", config.data.source, SOURCES),
        ("fo.source", config.fo.source, ("", *SOURCES)),
        ("train.eval_source", config.train.eval_source, ("", *SOURCES)),
        ("data.tokenizer", config.data.tokenizer, TOKENIZERS),
        ("zo.perturbation", config.zo.perturbation, PERTURBATIONS),
        ("zo.difference", config.zo.difference, DIFFERENCES),
        ("instruct.method", config.instruct.method, METHODS),
        ("optimizer.name", config.optimizer.name, OPTIMIZERS),
        ("optimizer.schedule", config.optimizer.schedule, SCHEDULES),
        ("optimizer.rounding", config.optimizer.rounding, ROUNDINGS),
    ):
        if value not in choices:
            raise ConfigError(f"{name} must be one of {_choices(value, choices)}")


def _choices(value: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, choices, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{', '.join(choices)}; got {value!r}{hint}"


def _check_ranges(config: Config) -> None:
    values = {name: value for name, _, value in walk(config)}
    positive = "an integer of at least 1", lambda x: x >= 1
    natural = "an integer of at least 0", lambda x: x >= 0
    above_zero = "finite and above 0", lambda x: 0 < x < math.inf
    not_negative = "finite and at least 0", lambda x: 0 <= x < math.inf
    decay = "at least 0 and below 1", lambda x: 0 <= x < 1
    for (what, holds), names in (
        (("at least 0 and below 2**32", lambda x: 0 <= x < 2**32), ["seed"]),
        (natural, ["model.num_layers", "model.num_heads", "model.width", "data.max_samples"]),
        (natural, ["optimizer.warmup_steps", "train.num_steps", "train.sample_tokens"]),
        (positive, ["model.context_length", "zo.num_queries", "zo.rank"]),
        (positive, ["zo.batch_chunks", "zo.parallel_batch_size", "fo.gradient_accumulation_steps"]),
        (positive, ["train.num_epochs", "train.batch_size", "train.log_interval"]),
        (positive, ["train.eval_interval", "train.eval_blocks", "train.keep_checkpoints"]),
        (natural, ["train.checkpoint_interval", "train.max_skipped"]),
        (("at least 2", lambda x: x >= 2), ["data.block_size"]),
        (("at least 257", lambda x: x >= 257), ["data.bpe_vocab_size"]),
        (("above 0 and below 1", lambda x: 0 < x < 1), ["data.validation_fraction"]),
        # What float32 rounds to zero or infinity is no perturbation.
        (("above 1e-37 and below 1e37", lambda x: 1e-37 < x < 1e37), ["zo.epsilon"]),
        (above_zero, ["optimizer.learning_rate", "optimizer.eps", "train.sample_temperature"]),
        (
            not_negative,
            ["optimizer.min_learning_rate", "train.snapshot_delta", "train.checkpoint_minutes"],
        ),
        (natural, ["fo.max_samples", "train.eval_max_samples"]),
        (natural, ["fo.bp_interval", "fo.batch_size", "instruct.num_guided"]),
        (("at least 0 and below 1", lambda x: 0 <= x < 1), ["fo.corpus_fraction"]),
        (("from 0 to 1", lambda x: 0 <= x <= 1), ["instruct.blend_ratio"]),
        (
            ("from -1 to 1", lambda x: -1 <= x <= 1),
            ["instruct.cosine_target", "instruct.cosine_max"],
        ),
        (not_negative, ["instruct.noise_scale", "instruct.grad_clip_norm", "instruct.noise_min"]),
        (not_negative, ["instruct.cosine_step", "instruct.noise_step"]),
        (above_zero, ["instruct.adaptive_start", "instruct.adaptive_interval"]),
        (("at least 1, or -1 for what is left", lambda x: x >= 1 or x == -1), MESH),
        (decay, ["optimizer.b1", "optimizer.b2", "optimizer.momentum", "optimizer.weight_decay"]),
    ):
        for name in names:
            if not holds(values[name]):
                raise ConfigError(f"{name} must be {what}; got {values[name]}")


def _check_combinations(config: Config) -> None:
    model, data, zo, optimizer, train = (
        config.model, config.data, config.zo, config.optimizer, config.train,
    )  # fmt: skip
    shape = {name: getattr(model, name) for name in ("num_layers", "num_heads", "width")}
    if model.size == "custom":
        if missing := [f"model.{name}" for name, value in shape.items() if not value]:
            raise ConfigError(
                f"model.size=custom needs {', '.join(missing)} of at least 1; or set model.size "
                f"to one of {', '.join(SIZES)}"
            )
        if model.width % model.num_heads:
            raise ConfigError(
                "model.width must be divisible by model.num_heads; got "
                f"{model.width} and {model.num_heads}"
            )
    else:
        for name, value in SIZES[model.size]._asdict().items():
            if shape[name] not in (0, value):
                raise ConfigError(
                    f"model.size={model.size} has {name} {value}, but model.{name}={shape[name]}; "
                    "leave it 0, or set model.size=custom"
                )
    if data.block_size > model.context_length:
        raise ConfigError(
            f"data.block_size={data.block_size} is longer than the model can read "
            f"(model.context_length={model.context_length}); make it at most that"
        )
    if "float16" in (model.param_dtype, model.compute_dtype) and zo.epsilon < 2**-14:
        raise ConfigError(
            f"zo.epsilon={zo.epsilon:g} underflows in float16, whose least normal number is 6.1e-05; use a larger "
            "one, such as 1e-2, or bfloat16"
        )
    if data.tokenizer_path and data.tokenizer != "gpt2":
        raise ConfigError(
            f"data.tokenizer_path is read by data.tokenizer=gpt2 alone, but data.tokenizer="
            f"{data.tokenizer}; set one or the other"
        )
    for name, source, path, max_samples in (
        ("data.", data.source, data.path, data.max_samples),
        ("fo.", config.fo.source, config.fo.path, config.fo.max_samples),
        ("train.eval_", train.eval_source, train.eval_path, train.eval_max_samples),
    ):
        if max_samples and not source:
            raise ConfigError(
                f"{name}max_samples={max_samples} is of the corpus that {name}source names, which "
                "is empty; set both or neither"
            )
        local = source in ("text", "disk")
        if local != bool(path):
            raise ConfigError(
                f"{name}source={source} "
                + (f"needs {name}path" if local else f"does not read {name}path={path}")
                + f"; set {name}path for source text or disk, and leave it empty for any other"
            )
    if zo.rank != 1 and zo.perturbation != "low_rank":
        raise ConfigError(
            f"zo.rank={zo.rank} is read by zo.perturbation=low_rank alone, but zo.perturbation="
            f"{zo.perturbation}; set one or the other"
        )
    if train.batch_size % zo.batch_chunks:
        raise ConfigError(
            "train.batch_size must be divisible by zo.batch_chunks; got "
            f"{train.batch_size} and {zo.batch_chunks}"
        )
    for name, value, default, what, holds in (
        ("zo.batch_chunks", zo.batch_chunks, 1, "queries: any mode but fo", config.mode != "fo"),
        (
            *("model.checkpoint_activations", model.checkpoint_activations, False),
            *("backprop: any mode but zo", config.mode != "zo"),
        ),
        (
            *("optimizer.rounding", optimizer.rounding, "stochastic"),
            *("model.param_dtype of 16 bits", model.param_dtype != "float32"),
        ),
    ):
        if value != default and not holds:
            raise ConfigError(
                f"{name}={value} has an effect only with {what}; leave it at {default}"
            )
    _check_modes(config)
    if optimizer.schedule == "cosine" and optimizer.min_learning_rate > optimizer.learning_rate:
        raise ConfigError(
            "optimizer.min_learning_rate must be at most optimizer.learning_rate; got "
            f"{optimizer.min_learning_rate} and {optimizer.learning_rate}"
        )
    for field, names in (
        ("momentum", ("sgd",)),
        ("weight_decay", ("adamw", "muon", "mudamw")),
        ("cautious", ("mudamw",)),
        ("orthogonalize_embedding", ("muon", "mudamw")),
    ):
        value = getattr(optimizer, field)
        if optimizer.name not in names and value != getattr(OptimizerConfig(), field):
            raise ConfigError(
                f"optimizer.{field}={value} is read by {' and '.join(names)} alone, but "
                f"optimizer.name={optimizer.name}; set one or the other"
            )
    if train.num_steps:
        _check_warmup(config)


def _check_modes(config: Config) -> None:
    """Fields that a mode needs, and fields that it would ignore."""
    fo, hybrid = config.fo, config.mode in ("calibrate", "instruct")
    if hybrid and not fo.bp_interval:
        raise ConfigError(
            f"mode {config.mode} needs fo.bp_interval, the steps from one backprop gradient to the "
            "next; set it to 1 or more"
        )
    if not hybrid and (fo.bp_interval or fo.corpus_fraction or fo.source):
        raise ConfigError(
            f"fo.bp_interval={fo.bp_interval}, fo.corpus_fraction={fo.corpus_fraction} and fo.source="
            f"{fo.source!r} are read by modes calibrate and instruct alone, but mode={config.mode}; "
            "leave them at 0 and empty"
        )
    if fo.source and fo.corpus_fraction:
        raise ConfigError(
            f"fo.source={fo.source} gives backprop its own corpus, and fo.corpus_fraction="
            f"{fo.corpus_fraction} a part of the run's; set one or the other"
        )
    if config.mode == "zo" and (fo.gradient_accumulation_steps != 1 or fo.batch_size):
        raise ConfigError(
            f"fo.gradient_accumulation_steps={fo.gradient_accumulation_steps} and fo.batch_size="
            f"{fo.batch_size} have no effect in mode zo; leave them at 1 and 0"
        )
    if config.mode != "zo":
        size = fo.batch_size or config.train.batch_size
        if size % fo.gradient_accumulation_steps:
            raise ConfigError(
                "the backprop batch must be divisible by fo.gradient_accumulation_steps; got "
                f"{size} and {fo.gradient_accumulation_steps}"
            )
    if config.mode != "instruct" and config.instruct != InstructConfig():
        raise ConfigError(
            f"the fields of instruct are read by mode instruct alone, but mode={config.mode}; leave "
            "them as they are, or set mode=instruct"
        )
    if config.instruct.num_guided > config.zo.num_queries:
        raise ConfigError(
            f"instruct.num_guided={config.instruct.num_guided} is more than zo.num_queries="
            f"{config.zo.num_queries}; make it at most that"
        )


def check_mesh(config: Config, sizes: Mapping[str, int]) -> None:
    """Whether batches divide over the data axis of a mesh of these sizes.

    Raises:
      ConfigError: they do not.
    """
    batches = {"train.batch_size": config.train.batch_size}
    if config.mode != "zo":
        parts = config.fo.gradient_accumulation_steps
        batches["the backprop batch"] = config.fo.batch_size or config.train.batch_size
        batches["the backprop micro-batch"] = batches["the backprop batch"] // parts
    for name, size in batches.items():
        if size % sizes["data"]:
            raise ConfigError(
                f"{name} must be divisible by mesh.data; got {size} and {sizes['data']}; set a batch that is, or a "
                "smaller mesh.data"
            )


def _check_warmup(config: Config) -> None:
    optimizer, num_steps = config.optimizer, config.train.num_steps
    if optimizer.schedule == "cosine" and optimizer.warmup_steps >= num_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be less than the run's "
            f"{num_steps} steps; shorten it, or set a larger train.num_steps"
        )
