"""Experiment configuration: typed fields with help texts, and the checks made before compiling."""

from collections.abc import Iterator, Sequence
import copy
import dataclasses
import difflib
import math
import os
from typing import Any

MODES = ("zo", "fo")
DTYPES = ("float32", "bfloat16", "float16")
PERTURBATIONS = ("rademacher", "gaussian", "sphere", "low_rank")
DIFFERENCES = ("central", "forward", "jvp")
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine")
TOKENIZERS = ("char", "bpe", "gpt2")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says, in one line, what to change."""


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class ModelConfig:
    """The GPT-2 decoder."""

    size: str = _field(
        "custom",
        "named size: 20M, 200M, 500M, 1B, gpt2, gpt2-medium, gpt2-large; or custom, from the "
        "three fields below",
    )
    num_layers: int = _field(0, "transformer blocks (0: as the named size says)")
    num_heads: int = _field(0, "attention heads of a block (0: as the named size says)")
    width: int = _field(0, "width of the residual stream (0: as the named size says)")
    context_length: int = _field(1024, "learned positions: the longest block the model can read")
    param_dtype: str = _field("float32", "dtype in which parameters are stored")
    compute_dtype: str = _field("float32", "dtype of activations and matrix products")


@dataclasses.dataclass
class DataConfig:
    """Where the text comes from, and how it becomes blocks of tokens."""

    source: str = _field(
        "shakespeare",
        "shakespeare (embedded); text (local files, see path); disk (a folder written by "
        "datasets' save_to_disk, see path); or a Hub data set: cosmopedia-100k, cosmopedia, "
        "wikitext-103, openwebtext, c4, tinystories, pile-subset, fineweb, fineweb-edu, "
        "fineweb-edu-10bt",
    )
    path: str = _field("", "file or glob (source text), or folder (source disk)")
    text_column: str = _field("", "column that holds the text (source disk; empty: text)")
    max_samples: int = _field(0, "read only this many documents of the data set (0: all)")
    tokenizer: str = _field(
        "char",
        "char; bpe (byte-level, trained on the corpus and cached); gpt2 (50257 tokens)",
    )
    tokenizer_path: str = _field(
        "",
        "folder with GPT-2's vocab.json or encoder.json and merges.txt or vocab.bpe (empty: "
        "from the Hub)",
    )
    bpe_vocab_size: int = _field(4096, "vocabulary size of tokenizer bpe")
    block_size: int = _field(128, "tokens of a block: one training sequence")
    validation_fraction: float = _field(0.1, "part of the blocks held out for validation")
    cache_dir: str = _field("", "trained tokenizers are kept here (empty: ~/.cache/zo_jax)")


@dataclasses.dataclass
class ZOConfig:
    """The zeroth-order gradient estimate (mode zo)."""

    num_queries: int = _field(8, "directions evaluated in a step (q)")
    epsilon: float = _field(1e-3, "perturbation size of the finite difference")
    perturbation: str = _field(
        "rademacher", "family of directions: rademacher, gaussian, sphere or low_rank"
    )
    rank: int = _field(1, "rank of the directions (perturbation low_rank)")
    difference: str = _field(
        "central",
        "central (2 evaluations a query), forward (1 + q evaluations) or jvp (exact, forward mode)",
    )
    parallel_batch_size: int = _field(1, "queries evaluated at once (memory grows with it)")
    batch_per_query: bool = _field(
        False, "a fresh batch for every query, rather than one batch shared by all"
    )


@dataclasses.dataclass
class FOConfig:
    """The backprop gradient (mode fo)."""

    gradient_accumulation_steps: int = _field(1, "micro-batches that a batch is split into")


@dataclasses.dataclass
class OptimizerConfig:
    """The optimiser and its learning rate."""

    name: str = _field("adam", "sgd or adam")
    learning_rate: float = _field(1e-3, "peak learning rate")
    schedule: str = _field("constant", "constant, or cosine (linear warm-up, then cosine decay)")
    warmup_steps: int = _field(300, "steps of linear warm-up (schedule cosine)")
    min_learning_rate: float = _field(1e-6, "learning rate at the last step (schedule cosine)")
    b1: float = _field(0.9, "decay of the first moment (adam)")
    b2: float = _field(0.999, "decay of the second moment (adam)")
    eps: float = _field(1e-8, "term added to the denominator (adam)")


@dataclasses.dataclass
class TrainConfig:
    """Length of the run, and what is reported when."""

    num_steps: int = _field(0, "optimiser steps (0: as many as num_epochs takes)")
    num_epochs: int = _field(1, "passes over the training blocks, if num_steps is 0")
    batch_size: int = _field(8, "blocks of a batch (of each query's own, with batch_per_query)")
    log_interval: int = _field(10, "steps between rows of metrics.csv")
    eval_interval: int = _field(100, "steps between evaluations on held-out blocks")
    eval_blocks: int = _field(128, "held-out blocks of an evaluation, at most")
    checkpoint_interval: int = _field(200, "steps between checkpoints; the latest two are kept")
    sample_tokens: int = _field(200, "tokens of the text sampled at the end (0: none)")
    sample_temperature: float = _field(0.8, "temperature of that sampling; lower is more certain")


@dataclasses.dataclass
class Config:
    """One experiment, whole."""

    mode: str = _field("zo", "zo (forward passes only) or fo (backprop)")
    seed: int = _field(0, "seed of the initial parameters, the directions and the batches")
    model: ModelConfig = dataclasses.field(
        default_factory=ModelConfig, metadata={"help": "the GPT-2 decoder"}
    )
    data: DataConfig = dataclasses.field(
        default_factory=DataConfig, metadata={"help": "text, tokenizer and blocks"}
    )
    zo: ZOConfig = dataclasses.field(
        default_factory=ZOConfig, metadata={"help": "the zeroth-order estimate"}
    )
    fo: FOConfig = dataclasses.field(
        default_factory=FOConfig, metadata={"help": "the backprop gradient"}
    )
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=OptimizerConfig, metadata={"help": "optimiser and learning rate"}
    )
    train: TrainConfig = dataclasses.field(
        default_factory=TrainConfig, metadata={"help": "length of the run, and reports"}
    )


# Fields in which a run may differ from the one that it continues.
EXTENDABLE = (
    "data.cache_dir",
    "train.num_steps",
    "train.num_epochs",
    "train.log_interval",
    "train.eval_interval",
    "train.checkpoint_interval",
    "train.sample_tokens",
    "train.sample_temperature",
)


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(dotted name, field, value) of every leaf of a dataclass configuration, in order."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, field.type):
                raise ConfigError(
                    f"{prefix}{field.name} must be a {field.type.__name__}; got {value!r}"
                )
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def help_text() -> str:
    """Every field with its type, default and meaning, one paragraph a section."""
    lines, section = [], None
    sections = {f.name: f.metadata["help"] for f in dataclasses.fields(Config)}
    for name, field, _ in walk(Config()):
        head = name.rpartition(".")[0]
        if head != section:
            lines.append(f"\n{head}: {sections[head]}" if head else "")
            section = head
        default = repr(field.default) if field.type is str else str(field.default)
        lines.append(f"  --config.{name} ({field.type.__name__}, default {default})")
        lines.append(f"      {field.metadata['help']}")
    return "\n".join(lines)


def check_arguments(args: Sequence[str]) -> None:
    """Sees that --config names a file and --config.NAME a field, which a parser says less clearly.

    Raises:
      ConfigError: it does not.
    """
    names = [name for name, _, _ in walk(Config())]
    sections = {name.rpartition(".")[0] for name in names}
    for i, arg in enumerate(args):
        flag, equals, value = arg.lstrip("-").partition("=")
        if flag == "config":
            path = (value if equals else "".join(args[i + 1 : i + 2])).partition(":")[0]
            if not os.path.isfile(path):
                raise ConfigError(f"--config must name a Python file; there is no file {path!r}")
        head, dot, name = flag.partition(".")
        if arg.startswith("-") and dot and head in ("config", "noconfig") and name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists them all"
            what = "is a section, not a field" if name in sections else "is no field"
            raise ConfigError(f"--config.{name}: {name} {what} of the configuration{hint}")


def default_run_name(config: Config) -> str:
    """Folder name of a run that is given none."""
    queries = f"_q{config.zo.num_queries}" if config.mode == "zo" else ""
    return (
        f"{config.mode}_full{queries}_opt{config.optimizer.name}"
        f"_lr{config.optimizer.learning_rate:g}_bs{config.train.batch_size}"
    )


def blocks_per_step(config: Config) -> int:
    """Training blocks that one step reads."""
    per_query = config.mode == "zo" and config.zo.batch_per_query
    return config.train.batch_size * (config.zo.num_queries if per_query else 1)


def resolve(config: Config, num_train_blocks: int) -> Config:
    """A copy of a valid configuration with everything that it leaves open filled in.

    Args:
      config: passed `validate`.
      num_train_blocks: training blocks of the corpus, from which epochs become steps.

    Raises:
      ConfigError: the warm-up is as long as the run.
    """
    from zo_jax.model import SIZES  # model.py imports this module

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
            "get_config() must return a zo_jax.config.Config; got " + type(config).__name__
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
    from zo_jax.data import HUB_DATASETS
    from zo_jax.model import SIZES

    for name, value, choices in (
        ("mode", config.mode, MODES),
        ("model.size", config.model.size, ("custom", *SIZES)),
        ("model.param_dtype", config.model.param_dtype, DTYPES),
        ("model.compute_dtype", config.model.compute_dtype, DTYPES),
        ("data.source", config.data.source, ("shakespeare", "text", "disk", *HUB_DATASETS)),
        ("data.tokenizer", config.data.tokenizer, TOKENIZERS),
        ("zo.perturbation", config.zo.perturbation, PERTURBATIONS),
        ("zo.difference", config.zo.difference, DIFFERENCES),
        ("optimizer.name", config.optimizer.name, OPTIMIZERS),
        ("optimizer.schedule", config.optimizer.schedule, SCHEDULES),
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
    decay = "at least 0 and below 1", lambda x: 0 <= x < 1
    for (what, holds), names in (
        (("at least 0 and below 2**32", lambda x: 0 <= x < 2**32), ["seed"]),
        (natural, ["model.num_layers", "model.num_heads", "model.width", "data.max_samples"]),
        (natural, ["optimizer.warmup_steps", "train.num_steps", "train.sample_tokens"]),
        (positive, ["model.context_length", "zo.num_queries", "zo.rank"]),
        (positive, ["zo.parallel_batch_size", "fo.gradient_accumulation_steps"]),
        (positive, ["train.num_epochs", "train.batch_size", "train.log_interval"]),
        (positive, ["train.eval_interval", "train.eval_blocks", "train.checkpoint_interval"]),
        (("at least 2", lambda x: x >= 2), ["data.block_size"]),
        (("at least 257", lambda x: x >= 257), ["data.bpe_vocab_size"]),
        (("above 0 and below 1", lambda x: 0 < x < 1), ["data.validation_fraction"]),
        # What float32 rounds to zero or infinity is no perturbation.
        (("above 1e-37 and below 1e37", lambda x: 1e-37 < x < 1e37), ["zo.epsilon"]),
        (above_zero, ["optimizer.learning_rate", "optimizer.eps", "train.sample_temperature"]),
        (("finite and at least 0", lambda x: 0 <= x < math.inf), ["optimizer.min_learning_rate"]),
        (decay, ["optimizer.b1", "optimizer.b2"]),
    ):
        for name in names:
            if not holds(values[name]):
                raise ConfigError(f"{name} must be {what}; got {values[name]}")


def _check_combinations(config: Config) -> None:
    from zo_jax.model import SIZES

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
    if data.tokenizer_path and data.tokenizer != "gpt2":
        raise ConfigError(
            f"data.tokenizer_path is read by data.tokenizer=gpt2 alone, but data.tokenizer="
            f"{data.tokenizer}; set one or the other"
        )
    local = data.source in ("text", "disk")
    if local != bool(data.path):
        raise ConfigError(
            f"data.source={data.source} "
            + ("needs data.path" if local else f"does not read data.path={data.path}")
            + "; set data.path for source text or disk, and leave it empty for any other"
        )
    if config.mode == "zo" and zo.rank != 1 and zo.perturbation != "low_rank":
        raise ConfigError(
            f"zo.rank={zo.rank} is read by zo.perturbation=low_rank alone, but zo.perturbation="
            f"{zo.perturbation}; set one or the other"
        )
    accumulation = config.fo.gradient_accumulation_steps
    if config.mode == "zo" and accumulation != 1:
        raise ConfigError(
            f"fo.gradient_accumulation_steps={accumulation} has no effect in mode zo; leave it at 1"
        )
    if config.mode == "fo" and train.batch_size % accumulation:
        raise ConfigError(
            "train.batch_size must be divisible by fo.gradient_accumulation_steps; got "
            f"{train.batch_size} and {accumulation}"
        )
    if optimizer.schedule == "cosine" and optimizer.min_learning_rate > optimizer.learning_rate:
        raise ConfigError(
            "optimizer.min_learning_rate must be at most optimizer.learning_rate; got "
            f"{optimizer.min_learning_rate} and {optimizer.learning_rate}"
        )
    if train.num_steps:
        _check_warmup(config)


def _check_warmup(config: Config) -> None:
    optimizer, num_steps = config.optimizer, config.train.num_steps
    if optimizer.schedule == "cosine" and optimizer.warmup_steps >= num_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be less than the run's "
            f"{num_steps} steps; shorten it, or set a larger train.num_steps"
        )
