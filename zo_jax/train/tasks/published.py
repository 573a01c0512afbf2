"""The tasks of MeZO, with its prompts and the way it scores them.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023 (arXiv 2305.17333):
prompts in appendix E.2 and in its public code. Classes are told apart by what follows the prompt;
in COPA and ReCoRD the right continuation is learnt, and the likeliest a token is chosen; in SQuAD
and DROP the answer is written, up to a newline, and compared by F1.
"""

from collections.abc import Callable, Iterable
import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from zo_jax.train.data.sources import DataError, hub_unreachable, offline_mode
from zo_jax.train.tasks.example import CHOICE, WRITE, Example

Row = dict[str, Any]


class Published(NamedTuple):
    """A task.

    Attributes:
      hub_id: its data set on the Hugging Face Hub.
      config_name: the part of that, or None.
      make: a row to an example.
      learns: CHOICE or WRITE.
      is_written: whether answers are written rather than chosen.
    """

    hub_id: str
    config_name: str | None
    make: Callable[[Row], Example]
    learns: str = CHOICE
    is_written: bool = False


def _yes_or_no(prompt: str, is_yes: Any) -> Example:
    return Example(prompt, ("Yes", "No"), (0 if is_yes else 1,))


def _sst2(row: Row) -> Example:
    prompt = f"{row['sentence'].strip()} It was"
    return Example(prompt, (" terrible", " great"), (row["label"],))


def _rte(row: Row) -> Example:
    prompt = f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n'
    return _yes_or_no(prompt, row["label"] == 0)


def _cb(row: Row) -> Example:
    question = f'Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?'
    return Example(
        f"Suppose {row['premise']} {question}\n", ("Yes", "No", "Maybe"), (row["label"],)
    )


def _boolq(row: Row) -> Example:
    question = row["question"].removesuffix("?") + "?"
    return _yes_or_no(f"{row['passage']} {question[0].upper()}{question[1:]}\n", row["answer"])


def _wsc(row: Row) -> Example:
    pronoun, name = row["span2_text"].lower(), row["span1_text"]
    question = f'In the previous sentence, does the pronoun "{pronoun}" refer to {name}? Yes or No?'
    return _yes_or_no(f"{row['text']}\n{question}\n", row["label"] == 1)


def _wic(row: Row) -> Example:
    question = f'Does the word "{row["word"]}" have the same meaning in these two sentences?'
    prompt = f"{question} Yes, No?\n{row['sentence1']}\n{row['sentence2']}\n"
    return _yes_or_no(prompt, row["label"] == 1)


def _multirc(row: Row) -> Example:
    answer = f'I found this answer "{row["answer"]}". Is that correct? Yes or No?'
    prompt = f"{row['paragraph']}\nQuestion: {row['question']}\n{answer}\n"
    return _yes_or_no(prompt, row["label"] == 1)


def _copa(row: Row) -> Example:
    joined = {"effect": "so", "cause": "because"}[row["question"]]
    prompt = f"{row['premise'].rstrip().removesuffix('.')} {joined}"
    return Example(prompt, (_goes_on(row["choice1"]), _goes_on(row["choice2"])), (row["label"],))


def _goes_on(sentence: str) -> str:
    """A sentence that goes on another: its first word in small letters, unless it is I."""
    first, space, rest = sentence.partition(" ")
    return f" {first if first == 'I' else first.lower()}{space}{rest}"


def _record(row: Row) -> Example:
    passage = row["passage"].replace("@highlight\n", "- ")
    names = list(dict.fromkeys(row["entities"]))
    options = tuple(" " + row["query"].replace("@placeholder", name) for name in names)
    right = tuple(names.index(name) for name in dict.fromkeys(row["answers"]) if name in names)
    return Example(f"{passage}\n-", options, right)


def _squad(row: Row) -> Example:
    prompt = (
        f"Title: {row['title']}\nContext: {row['context']}\n"
        f"Question: {row['question'].strip()}\nAnswer:"
    )
    return _written(prompt, row["answers"]["text"])


def _drop(row: Row) -> Example:
    prompt = f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:"
    return _written(prompt, row["answers_spans"]["spans"])


def _written(prompt: str, answers: list[str]) -> Example:
    return Example(prompt, (f" {answers[0]}\n",), (0,), tuple(answers))


_SUPER_GLUE = "aps/super_glue"
PUBLISHED: dict[str, Published] = {
    "sst2": Published("nyu-mll/glue", "sst2", _sst2),
    "rte": Published(_SUPER_GLUE, "rte", _rte),
    "cb": Published(_SUPER_GLUE, "cb", _cb),
    "boolq": Published("google/boolq", None, _boolq),
    "wsc": Published(_SUPER_GLUE, "wsc.fixed", _wsc),
    "wic": Published(_SUPER_GLUE, "wic", _wic),
    "multirc": Published(_SUPER_GLUE, "multirc", _multirc),
    "copa": Published(_SUPER_GLUE, "copa", _copa, WRITE),
    "record": Published(_SUPER_GLUE, "record", _record, WRITE),
    "squad": Published("rajpurkar/squad", None, _squad, WRITE, is_written=True),
    "drop": Published("ucinlp/drop", None, _drop, WRITE, is_written=True),
}


def read_published(name: str, path: str) -> tuple[list[Example], list[Example]]:
    """The examples of a task: those of its training split, and those of its validation split.

    Args:
      name: of `PUBLISHED`.
      path: a folder with a copy of its data set, files that `datasets.load_dataset` reads or what
        `save_to_disk` wrote; empty for the Hub.

    Raises:
      DataError: the data set cannot be had, or is none of that task.
    """
    task = PUBLISHED[name]
    parts = _load_copy(name, path) if path else _load_hub(name, task)
    try:
        return tuple([task.make(row) for row in _labelled(parts[x])] for x in _SPLITS)  # type: ignore[return-value]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            f"{path or task.hub_id} is not the data set of task {name}: {error!r}"
        ) from error


_SPLITS = ("train", "validation")


def _labelled(rows: Iterable[Row]) -> Iterable[Row]:
    """Less those whose label is hidden."""
    return (row for row in rows if row.get("label") != -1)


def _load_copy(name: str, path: str) -> Any:
    import datasets

    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"task.path={path} must be a folder with a copy of the data set of {name}")
    is_saved = (folder / "dataset_dict.json").is_file()
    try:
        with offline_mode():
            parts = (datasets.load_from_disk if is_saved else datasets.load_dataset)(str(folder))
    except Exception as error:  # datasets raises all kinds
        raise DataError(f"task.path={path} cannot be read as a data set: {error}") from error
    if missing := [x for x in _SPLITS if x not in parts]:
        raise DataError(
            f"task.path={path} must have the splits train and validation; it lacks {missing[0]}"
        )
    return parts


def _load_hub(name: str, task: Published) -> Any:
    unreachable = hub_unreachable()
    import datasets

    try:
        with offline_mode() if unreachable else contextlib.nullcontext():
            return datasets.load_dataset(task.hub_id, task.config_name)
    except Exception as error:  # datasets, its file systems and the network raise all kinds
        problem = f"cannot be loaded ({error})"
        if unreachable:
            problem = f"is not in the local cache, and the Hub cannot be reached ({unreachable})"
        raise DataError(
            f"task.name={name} ({task.hub_id}) {problem}; bring a copy of the data set, and set "
            f"task.path to its folder"
        ) from error
