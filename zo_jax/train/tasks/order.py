"""The order of examples: batches of like lengths, so that padding costs little, and few widths, so
that few programs are compiled.

Axes: N examples, B examples of a batch.
"""

import functools

import numpy as np

from zo_jax.train.data.corpus import permutation

# Batches among which examples are sorted by length.
_WINDOW = 16
# Widths of batches are multiples of this.
_MULTIPLE = 8
# The parts of the batches that fit into each width but the last, which all fit into.
_QUANTILES = np.linspace(0, 1, 7)


class Order:
    """The batches of a run: functions of the seed and the step alone.

    An epoch is a permutation of the examples. So many of them as make `_WINDOW` batches are sorted
    by length and cut into batches, which come in an order of their own; what is left over at the
    end of an epoch is left out of it. With `same_batches` the batches of all epochs are those of
    the first.
    """

    def __init__(
        self, lengths_N: np.ndarray, batch_size: int, seed: int, same_batches: bool = False
    ):
        """Of examples with so many tokens each."""
        self.lengths_N, self.batch_size, self.seed = lengths_N, batch_size, seed
        self.same_batches = same_batches
        self.per_epoch = max(1, len(lengths_N) // batch_size)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        longest = [int(lengths_N[batch].max()) for batch in self._epoch(0)]
        self.widths = widths(np.asarray(longest), int(lengths_N.max()))

    def batch(self, step: int) -> tuple[np.ndarray, int]:
        """Indices [B] of the examples of a step (from 0), and the width of their batch."""
        epoch, place = divmod(step, self.per_epoch)
        indices = self._epoch(epoch)[place]
        return indices, width_of(self.widths, int(self.lengths_N[indices].max()))

    def _make_epoch(self, epoch: int) -> np.ndarray:
        """Indices [batches, B]."""
        count, size = len(self.lengths_N), self.per_epoch * self.batch_size
        # With fewer examples than a batch they come again and again.
        shuffled = permutation(count, self.seed, 0 if self.same_batches else 2 * epoch)
        order = np.resize(shuffled, size)
        sort = lambda part: part[np.argsort(self.lengths_N[part], kind="stable")]
        window = _WINDOW * self.batch_size
        parts = [sort(order[i : i + window]) for i in range(0, size, window)]
        batches = np.concatenate(parts).reshape(self.per_epoch, self.batch_size)
        return batches[permutation(self.per_epoch, self.seed, 2 * epoch + 1)]


def widths(longest: np.ndarray, limit: int) -> tuple[int, ...]:
    """At most eight widths for batches whose longest examples have so many tokens, `limit` among
    them.

    >>> widths(np.array([9, 12, 30, 31, 33, 60]), 64)
    (16, 32, 40, 64)
    """
    tokens = [*np.quantile(longest, _QUANTILES, method="higher").tolist(), limit]
    return tuple(sorted({-(-int(n) // _MULTIPLE) * _MULTIPLE for n in tokens}))


def width_of(widths: tuple[int, ...], length: int) -> int:
    """The least width that holds so many tokens."""
    return next(width for width in widths if width >= length)
