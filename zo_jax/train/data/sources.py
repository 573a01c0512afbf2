"""Where text comes from: the embedded corpus, local files, saved data sets, the Hugging Face Hub.

`datasets` and `huggingface_hub` are imported inside the functions that need them: importing
`datasets` takes more than a second and freezes its settings from the environment, and the default
run (embedded text) needs neither.
"""

from collections.abc import Iterator, Sequence
import contextlib
import difflib
import glob
import importlib.resources
import itertools
import os
from pathlib import Path
import threading
from typing import Any, NamedTuple, NoReturn

from zo_jax.train.config import DataConfig


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


def read_documents(config: DataConfig) -> list[str]:
    """The documents of the configured source, one text a row or a file.

    Raises:
      DataError: there are none, or they cannot be read.
    """
    known = ["shakespeare", "text", "disk", *HUB_DATASETS]
    if config.source not in known:
        raise_unknown("data.source", config.source, known)
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
        asset = importlib.resources.files("zo_jax.train.data") / "assets" / "shakespeare.txt"
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
    unreachable = hub_unreachable()
    import datasets

    try:
        with offline_mode() if unreachable else contextlib.nullcontext():
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


def hub_unreachable() -> str:
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
def offline_mode() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does if set before the import: only the cache is read, at once."""
    import datasets
    from huggingface_hub import constants

    saved = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = saved


def raise_unknown(field: str, value: str, known: Sequence[str]) -> NoReturn:
    """Says that a field has none of the values it can have, and which is near."""
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise DataError(f"{field} must be one of {', '.join(known)}; got {value!r}{hint}")
