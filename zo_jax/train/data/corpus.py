"""Text in, blocks of token ids out: a corpus and the order of its batches.

Shapes are written as suffixes: `train_NT` is [num_blocks N, tokens of a block T].
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple
import zlib

import numpy as np

from zo_jax.train.config import DataConfig
from zo_jax.train.data.sources import HUB_DATASETS, DataError, read_documents
from zo_jax.train.data.tokenization import Tokenizer, make_tokenizer

__all__ = ["HUB_DATASETS", "Corpus", "DataError", "batch_indices", "load_blocks", "load_corpus"]

# The name of the order of batches, which a run keeps to.
ORDER = "splitmix64"
# 2⁶⁴ over the golden ratio.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Corpus(NamedTuple):
    """Packed blocks of a text. Training and validation blocks share no token position.

    Attributes:
      train_NT: int32 [num_examples, block_size].
      validation_NT: int32 [num_validation_blocks, block_size], from the end of the text.
      tokenizer: what made the ids.
      name: the source, or the path it was read from.
      num_documents: documents that hold text.
      text: a digest of all the text that was read.
      fo_NT: int32 [num_fo_blocks, block_size], of backprop's own corpus, or None.
    """

    train_NT: np.ndarray
    validation_NT: np.ndarray
    tokenizer: Tokenizer
    name: str
    num_documents: int
    text: str
    fo_NT: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return self.train_NT.size + self.validation_NT.size

    def count_tokens(self) -> np.ndarray:
        """How often the training blocks have each token, [vocabulary]."""
        return np.bincount(np.ravel(self.train_NT), minlength=self.tokenizer.vocab_size)

    @property
    def digests(self) -> dict[str, Any]:
        """What makes this corpus and the order of its batches what they are; equal only for equal
        ones.
        """
        ids = 0  # the same text can have other ids: a tokenizer's files can change too
        for blocks_NT in (self.train_NT, self.validation_NT, self.fo_NT):
            ids = ids if blocks_NT is None else zlib.crc32(blocks_NT.astype("<i4").tobytes(), ids)
        return {"num_tokens": self.num_tokens, "text": self.text, "ids": ids, "order": ORDER}

    @property
    def summary(self) -> str:
        """The corpus in one plain line."""
        return (
            f"{self.name}: {self.num_tokens:,} tokens from {self.num_documents:,} document(s), "
            f"{len(self.train_NT):,} training and {len(self.validation_NT):,} validation blocks "
            f"of {self.train_NT.shape[1]}, {self.tokenizer.name} tokenizer with "
            f"{self.tokenizer.vocab_size:,} tokens"
        )


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads, tokenizes and packs a corpus, by a tokenizer that is given or the one configured.

    A document is a row of a data set or a file of source text; blank ones are dropped.
    `max_samples` caps the documents read, so it changes nothing about the embedded Shakespeare,
    which is one document. The tokens of all documents are laid end to end and cut into blocks; the
    remainder is dropped, and the last `validation_fraction` of the blocks, rounded but at least
    one, is held out. `text_column`, if set, also overrides the column of a Hub data set.

    Raises:
      DataError: the configuration, the text or the Hub does not allow it.
    """
    if config.block_size < 1 or config.max_samples < 0 or not 0 < config.validation_fraction < 1:
        raise DataError(
            "data.block_size must be at least 1, data.max_samples at least 0 and "
            f"data.validation_fraction between 0 and 1; got {config.block_size}, "
            f"{config.max_samples} and {config.validation_fraction}"
        )
    documents, name = _read(config)
    tokenizer = tokenizer or make_tokenizer(config, documents)
    tokens = tokenizer.encode_documents(documents)

    num_blocks = len(tokens) // config.block_size
    if num_blocks < 2:
        raise DataError(
            f"{name} has {len(tokens)} tokens, but one training and one validation block of "
            f"{config.block_size} need {2 * config.block_size}; use more text or a smaller "
            "data.block_size"
        )
    blocks_NT = _pack(tokens, config.block_size)
    num_validation = min(max(round(num_blocks * config.validation_fraction), 1), num_blocks - 1)
    train_NT, validation_NT = np.split(blocks_NT, [num_blocks - num_validation])
    return Corpus(train_NT, validation_NT, tokenizer, name, len(documents), digest_text(documents))


def load_blocks(
    config: DataConfig, source: str, path: str, max_samples: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, str]:
    """Another corpus in the blocks and the tokens of a run, whole: int32 [num_blocks, block_size],
    and a digest of its text.

    Args:
      config: of the run's own corpus.
      source: of this one, like `config.source`.
      path: like `config.path`.
      max_samples: like `config.max_samples`.
      tokenizer: the run's.

    Raises:
      DataError: as `load_corpus`; or the text is too short for one block.
    """
    config = dataclasses.replace(config, source=source, path=path, max_samples=max_samples)
    documents, name = _read(config)
    tokens = tokenizer.encode_documents(documents)
    if len(tokens) < config.block_size:
        raise DataError(
            f"{name} has {len(tokens)} tokens, fewer than one block of {config.block_size}; use "
            "more text or a smaller data.block_size"
        )
    return _pack(tokens, config.block_size), digest_text(documents)


def digest_text(documents: Sequence[str]) -> str:
    """64 bits of the SHA-256 of the texts, each told apart from the next, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        raw = document.encode("utf-8", "surrogatepass")
        digest.update(f"{len(raw)} ".encode() + raw)
    return digest.hexdigest()[:16]


def _read(config: DataConfig) -> tuple[list[str], str]:
    """(the documents that hold text, what to call them)."""
    documents = [document for document in read_documents(config) if document.strip()]
    name = config.path or config.source
    if not documents:
        raise DataError(f"{name} holds no text, only blank documents; set another source")
    return documents, name


def _pack(tokens: np.ndarray, block_size: int) -> np.ndarray:
    """Tokens cut into blocks, the remainder dropped."""
    return tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)


def batch_indices(num_blocks: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which blocks make the batch of a step: int64 [batch_size].

    Epochs are permutations of the blocks, laid end to end without end; the batch is the part from
    step * batch_size to (step + 1) * batch_size. So it depends on nothing but its arguments, and a
    resumed run reads what an uninterrupted one would have. An epoch's permutation sorts the blocks
    by the hash mix(g i + mix(g epoch + mix(seed))) of their indices i: integers alone, the same in
    every version of every library. mix is the finaliser of SplitMix64 and g its increment (Steele,
    Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014); it is one to one, so
    that no two hashes are equal.

    Raises:
      DataError: no blocks, an empty batch, or a negative seed or step.
    """
    if num_blocks < 1 or batch_size < 1 or seed < 0 or step < 0:
        raise DataError(
            "num_blocks and batch_size must be at least 1, seed and step at least 0; got "
            f"{num_blocks}, {batch_size}, {seed} and {step}"
        )
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, num_blocks)
    return np.concatenate(
        [
            permutation(num_blocks, seed, epoch)[offsets[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
    )


@functools.lru_cache(maxsize=4)
def permutation(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the blocks of an epoch, int64 [num_blocks]; see `batch_indices`."""
    word = lambda number: np.array([number], np.uint64)
    of_epoch = _mix(_GOLDEN * word(epoch) + _mix(word(seed)))
    return np.argsort(_mix(_GOLDEN * np.arange(num_blocks, dtype=np.uint64) + of_epoch))


def _mix(h: np.ndarray) -> np.ndarray:
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))
