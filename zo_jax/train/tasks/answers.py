"""How near a written answer is to those that count as right, as SQuAD has it.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016.
"""

import collections
from collections.abc import Sequence
import re
import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether it is one of them, but for case, punctuation, articles and spaces.

    >>> exact_match("The  Eiffel tower.", ["Eiffel Tower", "tower"])
    True
    """
    return any(_words(answer) == _words(reference) for reference in references)


def f1(answer: str, references: Sequence[str]) -> float:
    """The highest F1 of its words with those of a reference.

    >>> round(f1("in Paris, France", ["Paris"]), 3)
    0.5
    """
    return max((_f1(_words(answer), _words(reference)) for reference in references), default=0.0)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (collections.Counter(answer) & collections.Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))


def _words(text: str) -> list[str]:
    text = text.lower().translate(_NO_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
