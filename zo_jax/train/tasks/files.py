"""Examples from a file of one's own: its columns put into a template, and what follows by the label
or from a column.
"""

from collections.abc import Callable, Iterator
import csv
import json
from pathlib import Path
import string
from typing import Any

from zo_jax.train.config import TaskConfig
from zo_jax.train.data.sources import DataError
from zo_jax.train.tasks.example import Example

# A row of a file: its columns by name.
Row = dict[str, Any]
# Conversations to text, by the model's template: see `models.tokenizer.Tokenizer.chat`.
Chat = Callable[..., str]


def read_examples(
    config: TaskConfig, path: str, chat: Chat | None, for_reward: bool = False
) -> list[Example]:
    """The examples of a file, in its order.

    Args:
      config: `template`, and `labels` or `target`.
      path: JSON lines or CSV with a header, by its ending.
      chat: of the model's tokenizer; None where there is none.
      for_reward: whether they keep their rows, and need neither labels nor a target.

    Raises:
      DataError: the file cannot be read, or a row lacks what the template or the labels ask for;
        the message has its line.
    """
    labels = read_labels(config.labels) if config.labels else None
    examples = []
    for line, row in _rows(Path(path).expanduser()):
        try:
            example = _example(config, row, labels, chat, for_reward)
            examples.append(example._replace(row=row) if for_reward else example)
        except DataError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
    if not examples:
        raise DataError(f"{path} holds no rows; give a file with some")
    return examples


def read_labels(text: str) -> dict[str, str]:
    """What follows the prompt for each value of the column of labels.

    Raises:
      DataError: it is no JSON of two texts or more, each of another text.

    >>> read_labels('{"0": " terrible", "1": " great"}')
    {'0': ' terrible', '1': ' great'}
    """
    try:
        labels = json.loads(text)
    except ValueError as error:
        raise DataError(f"task.labels is no JSON ({error}); {_LABELS}") from None
    if not isinstance(labels, dict) or not all(isinstance(x, str) and x for x in labels.values()):
        raise DataError(f"task.labels must map each label to a text; got {text}; {_LABELS}")
    if len(set(labels.values())) < max(2, len(labels)):
        raise DataError(f"task.labels must have two texts or more, all different; got {text}")
    return labels


_LABELS = """set it like '{"0": " terrible", "1": " great"}'"""


def template_fields(template: str) -> list[str]:
    """The columns that a template names.

    Raises:
      DataError: its braces are not those of a template.

    >>> template_fields("{text} It was")
    ['text']
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"task.template {template!r} cannot be read: {error}") from None
    fields = [name for _, name, _, _ in parts if name is not None]
    # Attributes and indices would reach into what a column holds.
    if wrong := [name for name in fields if not name.isidentifier()]:
        raise DataError(f"task.template must name columns alone, like {{text}}; got {{{wrong[0]}}}")
    return fields


def _example(
    config: TaskConfig,
    row: Row,
    labels: dict[str, str] | None,
    chat: Chat | None,
    for_reward: bool,
) -> Example:
    if labels is not None:
        value = _column(row, config.label_column)
        value = str(int(value)) if isinstance(value, bool) else str(value)
        if value not in labels:
            raise DataError(f"the label {value!r} is none of {', '.join(labels)}")
        prompt = _prompt(config, row, chat)
        return Example(prompt, tuple(labels.values()), (list(labels).index(value),))
    if for_reward and not config.target:
        return Example(_prompt(config, row, chat), (), ())
    target = _column(row, config.target)
    if isinstance(target, list):
        return _conversation(target, config.target, chat)
    answer, prompt = str(target), _prompt(config, row, chat)
    if not answer.strip():
        raise DataError(f"the column {config.target} is empty; every example needs an answer")
    if config.chat:
        messages = _as_user(_filled(config.template, row))
        return _conversation([*messages, _message("assistant", answer)], config.target, chat)
    # A word follows a word with a space between.
    space = "" if prompt[-1:].isspace() or answer[:1].isspace() or not prompt else " "
    return Example(prompt, (f"{space}{answer}",), (0,), (answer.strip(),))


def _prompt(config: TaskConfig, row: Row, chat: Chat | None) -> str:
    text = _filled(config.template, row)
    return _chat(chat, _as_user(text)) if config.chat else text


def _conversation(messages: list[Any], column: str, chat: Chat | None) -> Example:
    """The last message is the answer, with all that the template puts after it."""
    wrong = [m for m in messages if not isinstance(m, dict) or {"role", "content"} - m.keys()]
    if wrong or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"a conversation in {column} must be messages with role and content, the last one the "
            f"assistant's; got {messages!s:.80}"
        )
    prompt = _chat(chat, messages[:-1])
    whole = _chat(chat, messages, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise DataError("the model's chat template changes a prompt once it is answered")
    return Example(prompt, (whole[len(prompt) :],), (0,), (messages[-1]["content"].strip(),))


def _chat(chat: Chat | None, messages: list[Any], **options: Any) -> str:
    if chat is None:
        raise DataError("conversations need the tokenizer of the model, whose folder has none")
    try:
        return chat(messages, **options)
    except ValueError as error:
        raise DataError(str(error)) from None


def _as_user(text: str) -> list[dict[str, str]]:
    return [_message("user", text)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _filled(template: str, row: Row) -> str:
    return template.format(**{name: _column(row, name) for name in template_fields(template)})


def _column(row: Row, name: str) -> Any:
    if name not in row or row[name] is None:
        raise DataError(f"there is no column {name!r}; there are {', '.join(map(str, row))}")
    return row[name]


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of a file."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise DataError(f"task.path must end in .jsonl or .csv; got {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task.path={path} cannot be read: {error}") from error
    try:
        yield from readers[path.suffix](text)
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: {error}") from error


def _read_jsonl(text: str) -> Iterator[tuple[int, Row]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
            raise ValueError(f"line {line} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {line} must be an object of columns; got {content:.80}")
        yield line, row


def _read_csv(text: str) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not as many cells as the header")
        yield reader.line_num, row
