"""What a step reads: batches that depend on nothing but the configuration, the corpus and the step.

Axes: N blocks of a corpus, B blocks of a batch, T tokens of a block, q queries.
"""

from typing import Any

import numpy as np

from zo_jax.layout import Layout
from zo_jax.train.config import GRADIENT_MODES, Config, blocks_per_step
from zo_jax.train.data.corpus import Corpus, batch_indices, load_blocks, load_corpus
from zo_jax.train.data.tokenization import Tokenizer


def read_batches(
    config: Config,
    train_NT: np.ndarray,
    step: int,
    fo_NT: np.ndarray | None = None,
    layout: Layout | None = None,
) -> tuple[Any, Any]:
    """The tokens of a step (from 0): int32 [B, T] for its queries, or [q, B, T] with
    `zo.batch_per_query`, and for backprop.

    None where the step does not read them. With a layout they are on its devices, and each process
    reads the blocks of its own devices alone.
    """
    read = layout.put_blocks if layout else lambda blocks_NT, indices: blocks_NT[indices]
    for_queries, for_backprop = reads(config, step)
    zo_NT, own_NT = split_corpus(config, train_NT)
    fo_NT = own_NT if fo_NT is None else fo_NT
    tokens = fo_tokens = None
    if for_queries:
        indices = batch_indices(len(zo_NT), blocks_per_step(config), config.seed, step)
        if config.zo.batch_per_query:
            indices = indices.reshape(config.zo.num_queries, config.train.batch_size)
        tokens = read(zo_NT, indices)
    if for_backprop:
        size = config.fo.batch_size or config.train.batch_size
        fo_tokens = read(fo_NT, batch_indices(len(fo_NT), size, config.seed, step))
    return tokens, fo_tokens


def split_corpus(config: Config, train_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blocks for queries and those for backprop: all of them for both, or disjoint parts."""
    if not config.fo.corpus_fraction:
        return train_NT, train_NT
    num_fo = min(max(round(len(train_NT) * config.fo.corpus_fraction), 1), len(train_NT) - 1)
    return train_NT[num_fo:], train_NT[:num_fo]


def load_corpora(config: Config, tokenizer: Tokenizer | None = None) -> Corpus:
    """The run's corpus, with those that backprop and evaluation have of their own in their places;
    by a tokenizer that is given or the one configured.
    """
    corpus, fo, train = load_corpus(config.data, tokenizer), config.fo, config.train
    load = lambda *source: load_blocks(config.data, *source, corpus.tokenizer)
    texts = [corpus.text]
    if fo.source:
        blocks_NT, text = load(fo.source, fo.path, fo.max_samples)
        corpus, texts = corpus._replace(fo_NT=blocks_NT), [*texts, text]
    if train.eval_source:
        blocks_NT, text = load(train.eval_source, train.eval_path, train.eval_max_samples)
        corpus, texts = corpus._replace(validation_NT=blocks_NT), [*texts, text]
    return corpus._replace(text="-".join(texts))


def reads(config: Config, step: int) -> tuple[bool, bool]:
    """Whether a step (from 0) reads a batch for its queries, and whether it reads one for
    backprop.
    """
    interval = {"zo": 0}.get(config.mode, config.fo.bp_interval)
    if config.mode in GRADIENT_MODES:
        interval = 1
    backprop = bool(interval) and (step + 1) % interval == 0
    return config.mode in ("zo", "instruct") or not backprop, backprop
