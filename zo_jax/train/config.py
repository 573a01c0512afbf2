"""Experiment configuration: typed fields with help texts."""

from collections.abc import Iterator
import dataclasses
import re
from typing import Any


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
    checkpoint_activations: bool = _field(
        False,
        "backprop keeps the inputs of a block alone, and computes the rest again (less memory)",
    )


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
    text_column: str = _field(
        "", "column that holds the text (source disk or a Hub data set; empty: its usual one)"
    )
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
    batch_chunks: int = _field(
        1, "chunks of a batch that are evaluated one after the other (less memory for activations)"
    )
    batch_per_query: bool = _field(
        False, "a fresh batch for every query, rather than one batch shared by all"
    )


@dataclasses.dataclass
class FOConfig:
    """The backprop gradient (modes fo, calibrate, instruct)."""

    gradient_accumulation_steps: int = _field(1, "micro-batches that a batch is split into")
    bp_interval: int = _field(
        0, "steps from one backprop gradient to the next (calibrate, instruct)"
    )
    batch_size: int = _field(0, "blocks of a backprop batch (0: as train.batch_size)")
    source: str = _field("", "corpus of its own for backprop, as data.source (empty: the run's)")
    path: str = _field("", "file, glob or folder of that corpus")
    max_samples: int = _field(0, "read only so many documents of that corpus (0: all)")
    corpus_fraction: float = _field(
        0.0, "part of the training blocks kept for backprop, the rest for queries (0: all for both)"
    )


@dataclasses.dataclass
class InstructConfig:
    """Directions guided by a backprop gradient (mode instruct)."""

    method: str = _field(
        "hybrid", "hybrid (its largest coordinates, noise elsewhere) or gram_schmidt"
    )
    cosine_target: float = _field(0.9, "cosine of a guided direction to the gradient")
    noise_scale: float = _field(0.5, "noise of hybrid directions, relative to the gradient")
    num_guided: int = _field(0, "guided directions of a step, random ones besides (0: all guided)")
    blend_ratio: float = _field(0.0, "part of the backprop gradient in the update, from 0 to 1")
    grad_clip_norm: float = _field(0.0, "largest global norm of the estimate (0: any)")
    adaptive: bool = _field(False, "raise the cosine and lower the noise as the loss falls")
    adaptive_start: float = _field(7.0, "ten-step mean loss below which that begins (adaptive)")
    adaptive_interval: float = _field(0.2, "fall of the loss from one level to the next (adaptive)")
    cosine_step: float = _field(0.1, "rise of the cosine target a level (adaptive)")
    cosine_max: float = _field(0.99, "highest cosine target (adaptive)")
    noise_step: float = _field(1.0, "fall of the noise scale a level (adaptive)")
    noise_min: float = _field(0.1, "lowest noise scale (adaptive)")


@dataclasses.dataclass
class OptimizerConfig:
    """The optimiser and its learning rate."""

    name: str = _field("adam", "sgd, adam, adamw, muon or mudamw")
    learning_rate: float = _field(1e-3, "peak learning rate")
    schedule: str = _field("constant", "constant, or cosine (linear warm-up, then cosine decay)")
    warmup_steps: int = _field(300, "steps of linear warm-up (schedule cosine)")
    min_learning_rate: float = _field(1e-6, "learning rate at the last step (schedule cosine)")
    momentum: float = _field(0.0, "decay of the momentum (sgd; 0: none)")
    b1: float = _field(0.9, "decay of the first moment (all but sgd)")
    b2: float = _field(0.999, "decay of the second moment (all but sgd)")
    eps: float = _field(1e-8, "term added to the denominator (all but sgd)")
    weight_decay: float = _field(0.0, "decoupled decay of matrices (adamw, muon, mudamw)")
    rounding: str = _field(
        "stochastic",
        "of updates to bfloat16 or float16 parameters: stochastic (unbiased, from the step's key) or "
        "nearest (small updates are lost)",
    )
    cautious: bool = _field(False, "move only where momentum and gradient agree (mudamw)")
    orthogonalize_embedding: bool = _field(
        True, "whether the embeddings count as matrices to orthogonalise (muon, mudamw)"
    )


@dataclasses.dataclass
class MeshConfig:
    """How the devices are arranged: sizes of three axes, of which one may be -1, what is left."""

    query: int = _field(-1, "groups of devices that evaluate different queries")
    data: int = _field(1, "parts that a batch is split into")
    model: int = _field(1, "parts that parameters and optimiser state are split into")


@dataclasses.dataclass
class TrainConfig:
    """Length of the run, and what is reported when."""

    num_steps: int = _field(0, "optimiser steps (0: as many as num_epochs takes)")
    num_epochs: int = _field(1, "passes over the training blocks, if num_steps is 0")
    batch_size: int = _field(8, "blocks of a batch (of each query's own, with batch_per_query)")
    log_interval: int = _field(10, "steps between rows of metrics.csv")
    eval_interval: int = _field(100, "steps between evaluations on held-out blocks")
    eval_blocks: int = _field(128, "held-out blocks of an evaluation, at most")
    eval_source: str = _field(
        "", "corpus of its own for evaluation, as data.source (empty: the run's held-out blocks)"
    )
    eval_path: str = _field("", "file, glob or folder of that corpus")
    eval_max_samples: int = _field(0, "read only so many documents of that corpus (0: all)")
    checkpoint_interval: int = _field(200, "steps between checkpoints (0: none but by the minutes)")
    checkpoint_minutes: float = _field(0.0, "minutes between checkpoints besides (0: none)")
    keep_checkpoints: int = _field(2, "the latest so many checkpoints are kept")
    max_skipped: int = _field(
        50, "stop after so many steps in a row without a finite loss (0: never)"
    )
    snapshot_delta: float = _field(
        0.0, "keep a snapshot each time the validation loss has fallen by as much more (0: none)"
    )
    sample_tokens: int = _field(200, "tokens of the text sampled at the end (0: none)")
    sample_temperature: float = _field(0.8, "temperature of that sampling; lower is more certain")


@dataclasses.dataclass
class Config:
    """One experiment, whole."""

    mode: str = _field(
        "zo",
        "zo (forward passes only), fo (backprop), calibrate (zo, and every fo.bp_interval steps fo "
        "instead) or instruct (zo, and every fo.bp_interval steps along guided directions)",
    )
    scope: str = _field(
        "full",
        "what is trained: full, reduced (the last block's MLP and its LayerNorm, and the output "
        "head), or a regular expression over paths like blocks/3/fc/kernel",
    )
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
    instruct: InstructConfig = dataclasses.field(
        default_factory=InstructConfig, metadata={"help": "directions guided by backprop"}
    )
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=OptimizerConfig, metadata={"help": "optimiser and learning rate"}
    )
    train: TrainConfig = dataclasses.field(
        default_factory=TrainConfig, metadata={"help": "length of the run, and reports"}
    )
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig, metadata={"help": "devices"})


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


def from_dict(fields: Any, kind: type = Config) -> Any:
    """The configuration that `dataclasses.asdict` made `fields` of; absent fields have their defaults.

    Raises:
      ConfigError: it is no dictionary, or has fields that no configuration has. Types are left to `validate`.
    """
    if not isinstance(fields, dict):
        raise ConfigError(f"a configuration is a dictionary of its fields; got {fields!r:.80}")
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    if unknown := [name for name in fields if name not in known]:
        raise ConfigError(f"{unknown[0]!r:.80} is no field of {kind.__name__}")
    nested = lambda name, value: (
        from_dict(value, known[name]) if dataclasses.is_dataclass(known[name]) else value
    )
    return kind(**{name: nested(name, value) for name, value in fields.items()})


def default_run_name(config: Config) -> str:
    """Folder name of a run that is given none: the settings of the reference script that its mode reads."""
    mode, parts = config.mode, [config.mode, re.sub(r"[^A-Za-z0-9_.-]+", "-", config.scope)]
    if mode != "fo":
        parts.append(f"q{config.zo.num_queries}")
    if mode in ("calibrate", "instruct"):
        parts.append(f"bp{config.fo.bp_interval}")
    parts.append(f"opt{config.optimizer.name}_lr{config.optimizer.learning_rate:g}")
    parts.append(f"bs{config.train.batch_size}")
    if mode == "instruct":
        parts.append(f"ct{config.instruct.cosine_target:g}_ns{config.instruct.noise_scale:g}")
    return "_".join(parts)


def blocks_per_step(config: Config) -> int:
    """Training blocks that one step reads (in hybrid modes, for its queries)."""
    if config.mode == "fo":
        return config.fo.batch_size or config.train.batch_size
    per_query = config.zo.batch_per_query
    return config.train.batch_size * (config.zo.num_queries if per_query else 1)
