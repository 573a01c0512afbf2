"""An example of a task: a text, what may follow it, and what of that is right."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from zo_jax.train.data.corpus import digest_text, permutation
from zo_jax.train.data.sources import DataError

# How a task is learnt: which of the options is right, to write the right one, or by a reward alone.
CHOICE, WRITE, REWARD = "choice", "write", "reward"


class Example(NamedTuple):
    """One example.

    Attributes:
      prompt: a text.
      options: what may follow it, spaces included; the answer to learn alone where answers are
        written.
      right: which of the options are right.
      references: the answers that count as right, where answers are written.
      row: of the file, where a reward wants it.
    """

    prompt: str
    options: tuple[str, ...]
    right: tuple[int, ...]
    references: tuple[str, ...] = ()
    row: dict[str, Any] | None = None


class Examples(NamedTuple):
    """The examples of a task. None is in two parts.

    Attributes:
      name: of the task.
      learns: CHOICE, WRITE or REWARD.
      is_written: whether answers are written and compared with the references, rather than chosen.
      train, validation, test: the parts.
      end: the string that ends a written answer, or "" for the model's own end.
    """

    name: str
    learns: str
    is_written: bool
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    end: str = ""

    @property
    def digest(self) -> str:
        """64 bits of a hash of all that they say, in hexadecimal."""
        return digest_text([repr(example) for example in self.parts])

    @property
    def parts(self) -> list[Example]:
        return [*self.train, *self.validation, *self.test]


def split(
    examples: Sequence[Example], sizes: Sequence[int], seed: int, name: str
) -> list[list[Example]]:
    """Disjoint parts, of the sizes asked for, in an order that the seed decides.

    Where there are fewer examples than all parts want together, each part has its share of them.

    Raises:
      DataError: there are fewer examples than parts.
    """
    wanted = sum(sizes)
    if len(examples) < len([size for size in sizes if size]):
        raise DataError(f"{name} has {len(examples)} examples, too few for its parts; give more")
    if len(examples) < wanted:
        sizes = [max(size * len(examples) // wanted, min(size, 1)) for size in sizes]
        sizes[0] -= max(0, sum(sizes) - len(examples))
    order = iter(permutation(len(examples), seed, 0).tolist())
    return [[examples[next(order)] for _ in range(size)] for size in sizes]
