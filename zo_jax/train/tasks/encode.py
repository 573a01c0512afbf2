"""Examples as tokens: padded arrays, with where what is scored begins and ends.

Axes: N examples, K options of an example, T tokens of the longest sequence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from zo_jax.train.data.sources import DataError
from zo_jax.train.tasks.example import Example


class Labelled(NamedTuple):
    """Prompts that are followed by one of a few tokens, the same for all of them.

    Attributes:
      tokens: int32 [N, T], of the prompt.
      length: int32 [N], of the prompt.
      right: int32 [N], which of the tokens follows.
    """

    tokens: np.ndarray
    length: np.ndarray
    right: np.ndarray


class Chosen(NamedTuple):
    """Prompts each with its own options, which are scored whole.

    Attributes:
      tokens: int32 [N, K, T], of the prompt and an option.
      start: int32 [N, K], the first token of the option.
      end: int32 [N, K], past its last token; 0 where an example has fewer options.
      right: bool [N, K], which ones are right.
    """

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray
    right: np.ndarray


class Written(NamedTuple):
    """Prompts with the answers to learn.

    Attributes:
      tokens: int32 [N, T], of both.
      start: int32 [N], the first token of the answer.
      end: int32 [N], past its last token.
    """

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray


Encoded = Labelled | Chosen | Written


class Tokens(NamedTuple):
    """Tokens of a prompt and what follows it.

    Attributes:
      ids: int32 [T].
      start: where what follows begins.
    """

    ids: np.ndarray
    start: int


def encode(
    tokenizer: Any, prompt: str, option: str, max_tokens: int, special: bool = True
) -> Tokens:
    """A prompt and what follows it, at most `max_tokens`: of a longer prompt the end is kept.

    What follows begins where the tokens of both together part from those of the prompt alone. What
    the tokenizer puts before a text stays, if it puts something there.

    Args:
      tokenizer: a `models.tokenizer.Tokenizer`.
      special: whether the tokenizer puts its special tokens around a text.

    Raises:
      DataError: nothing follows, or there is no room for it beside one token before it.
    """
    before = tokenizer.encode(prompt, special=special)
    first = int(special and len(tokenizer.encode("", special=True)) > 0)
    ids = tokenizer.encode(prompt + option, special=special)
    shorter = min(len(before), len(ids))
    differs = np.flatnonzero(before[:shorter] != ids[:shorter])
    start = int(differs[0]) if differs.size else shorter
    if not 1 <= start < len(ids):
        raise DataError(
            f"a token must come before {option!r:.60}, and one of its own; got the prompt "
            f"{prompt!r:.60} in {len(before)} tokens, {len(ids)} with it"
        )
    cut = max(0, len(ids) - max_tokens)
    if start - cut < 1 + first:
        raise DataError(
            f"task.max_tokens={max_tokens} has no room for {option!r:.60}, which takes "
            f"{len(ids) - start} tokens, and a prompt; raise it"
        )
    return Tokens(np.concatenate([ids[:first], ids[first + cut :]]), start - cut)


def label_tokens(
    tokenizer: Any, examples: Sequence[Example], special: bool = True
) -> list[int] | None:
    """The token of each option, if all examples have the same options of one token; else None."""
    options = examples[0].options
    if any(example.options != options or len(example.right) != 1 for example in examples):
        return None
    found = set()
    for example in examples:
        before = tokenizer.encode(example.prompt, special=special)
        ids = [tokenizer.encode(example.prompt + x, special=special) for x in options]
        if any(len(x) != len(before) + 1 or np.any(x[:-1] != before) for x in ids):
            return None
        found.add(tuple(int(x[-1]) for x in ids))
    (tokens, *others) = found
    return None if others or len(set(tokens)) < len(tokens) else list(tokens)


def encode_labelled(
    tokenizer: Any, examples: Sequence[Example], max_tokens: int, special: bool = True
) -> Labelled:
    """Of examples that `label_tokens` has tokens for."""
    rows = [
        encode(tokenizer, x.prompt, x.options[x.right[0]], max_tokens, special) for x in examples
    ]
    prompts = [row.ids[: row.start] for row in rows]
    right = np.asarray([x.right[0] for x in examples], np.int32)
    return Labelled(_pad(prompts), _numbers(map(len, prompts)), right)


def encode_chosen(
    tokenizer: Any, examples: Sequence[Example], max_tokens: int, special: bool = True
) -> Chosen:
    """Each example with all of its options."""
    K = max(len(example.options) for example in examples)
    rows = [
        [encode(tokenizer, x.prompt, option, max_tokens, special) for option in x.options]
        for x in examples
    ]
    nothing = Tokens(np.zeros(1, np.int32), 0)
    flat = [row for options in rows for row in [*options, *[nothing] * (K - len(options))]]
    is_there = lambda row: row is not nothing
    N = len(examples)
    shaped = lambda x: x.reshape(N, K, *x.shape[1:])
    right = np.zeros((N, K), bool)
    for row, example in zip(right, examples, strict=True):
        row[list(example.right)] = True
    return Chosen(
        shaped(_pad([row.ids for row in flat])),
        shaped(_numbers(row.start for row in flat)),
        shaped(_numbers(len(row.ids) if is_there(row) else 0 for row in flat)),
        right,
    )


def encode_written(
    tokenizer: Any, examples: Sequence[Example], max_tokens: int, special: bool = True
) -> Written:
    """Each example with the first of its right options."""
    rows = [
        encode(tokenizer, x.prompt, x.options[x.right[0]], max_tokens, special) for x in examples
    ]
    return Written(
        _pad([row.ids for row in rows]),
        _numbers(row.start for row in rows),
        _numbers(len(row.ids) for row in rows),
    )


def lengths(encoded: Encoded) -> np.ndarray:
    """Tokens of the longest sequence of each example, int64 [N]."""
    if isinstance(encoded, Labelled):
        return encoded.length.astype(np.int64)
    return encoded.end.reshape(len(encoded.end), -1).max(axis=1).astype(np.int64)


def take(encoded: Encoded, indices: np.ndarray, width: int) -> Encoded:
    """Some of the examples, in `width` tokens, of which they have no more."""
    chosen = [x[indices] for x in encoded]
    return type(encoded)(chosen[0][..., :width], *chosen[1:])


def _pad(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of one length, zeros behind."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(list(values), np.int32)
