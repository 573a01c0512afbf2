"""Rows of a leaf in tiers, by how often they are used.

Of a table of tokens most of the gradient is that of few rows: what comes often. Tiers end at 64,
512, 4,096, 32,768, .. rows, each end `_STEP` times the one before, so that tokens whose counts fall
like one over their rank have in every tier about as much use.
"""

import base64
import bz2
from collections.abc import Mapping
from typing import Any

import numpy as np

# (path of a leaf [R, ...], the tier of each row, a byte each), sorted: what can be hashed.
Tiers = tuple[tuple[str, bytes], ...]

# Rows of the first tier, and how many times as far each next one reaches.
_FIRST, _STEP = 64, 8


def sort_into_tiers(counts: Mapping[str, Any]) -> Tiers:
    """The tiers of the rows of some leaves, from how often each row is used.

    Args:
      counts: path of a leaf -> [R] numbers, such as `np.bincount(tokens, minlength=R)`. Of rows
        that are used as often the first count as more used.

    Raises:
      ValueError: a leaf has no list of finite numbers of at least 0.

    >>> ((path, tiers),) = sort_into_tiers({"wte": [5] * 70 + [9]})
    >>> path, list(tiers).count(0), tiers[62], tiers[63], tiers[70]
    ('wte', 64, 0, 1, 0)
    """
    found = []
    for path, given in sorted(counts.items()):
        numbers = np.asarray(given)
        is_number = np.issubdtype(numbers.dtype, np.number) and numbers.ndim == 1 and numbers.size
        if not is_number or not np.all(np.isfinite(numbers) & (numbers >= 0)):
            raise ValueError(
                f"counts[{path!r}] must be finite numbers of at least 0, one for each row of that "
                f"leaf; got {numbers.dtype} {list(numbers.shape)}"
            )
        rank = np.empty(len(numbers), np.int64)
        rank[np.argsort(-numbers.astype(np.float64), kind="stable")] = np.arange(len(numbers))
        tier, end = np.zeros(len(numbers), np.uint8), _FIRST
        while end < len(numbers):
            tier, end = tier + (rank >= end).astype(np.uint8), end * _STEP
        found.append((path, tier.tobytes()))
    return tuple(found)


def pack(rows: bytes) -> str:
    """The tiers of a leaf's rows as a text, some kilobytes for 50,000 rows.

    >>> unpack(pack(b"\\0\\1\\1"))
    b'\\x00\\x01\\x01'
    """
    # Of bz2 there is one implementation: the text is the same everywhere.
    return base64.b85encode(bz2.compress(rows, 9)).decode()


def unpack(text: str) -> bytes:
    """What `pack` was given.

    Raises:
      ValueError: the text is not from there.
    """
    try:
        return bz2.decompress(base64.b85decode(text))
    except (ValueError, OSError) as error:
        raise ValueError(f"this tells no tiers of rows: {error}") from None
