"""Experiment configuration: typed fields, their help texts, and the checks made before anything is compiled."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def _section(cls: type, help: str) -> Any:
    return dataclasses.field(default_factory=cls, metadata={"help": help})


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
    sample_tokens: int = _field(200, "tokens of the text sampled at the end (0: none)")


@dataclasses.dataclass
class Config:
    """One experiment, whole."""

    mode: str = _field("zo", "zo (forward passes only) or fo (backprop)")
    seed: int = _field(0, "seed of the initial parameters, the directions and the batches")
    model: ModelConfig = _section(ModelConfig, "the GPT-2 decoder")
    data: DataConfig = _section(DataConfig, "text, tokenizer and blocks")
    zo: ZOConfig = _section(ZOConfig, "the zeroth-order estimate")
    fo: FOConfig = _section(FOConfig, "the backprop gradient")
    optimizer: OptimizerConfig = _section(OptimizerConfig, "optimiser and learning rate")
    train: TrainConfig = _section(TrainConfig, "length of the run, and reports")
