"""What a run learns: the batches of its steps, their loss, and what is measured."""

from typing import Any, Protocol

import jax

from zo_jax.layout import Layout

# What an evaluation tells, by the columns of metrics.csv; of each whether more is better.
MEASURES = {
    "eval_loss": False,
    "eval_accuracy": True,
    "eval_f1": True,
    "eval_exact_match": True,
    "eval_reward": True,
    "eval_text_loss": False,
}


class Task(Protocol):
    """What a run learns.

    Attributes:
      summary: the task in one plain line.
      num_examples: training blocks or examples, of which an epoch has each once.
      tokens_per_example: of a block, or of an example in the mean.
      unit: what has the loss: a token or an example.
      measure: of `MEASURES`, which says what the best state is.
      samples: what was written in the last evaluation, some lines of it; empty where nothing is.
    """

    summary: str
    num_examples: int
    tokens_per_example: int
    unit: str
    measure: str
    samples: list[str]

    def batches(self, step: int, layout: Layout | None = None) -> tuple[Any, Any]:
        """What a step (from 0) reads for its queries, and for backprop: pytrees with leaves [B,
        ...], or [q, B, ...] with `zo.batch_per_query`; None where it reads nothing.

        With a layout they are on its devices, and each process reads what its own devices need.
        """
        ...

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Mean loss of the examples of a batch, float32 scalar, in nats."""
        ...

    def evaluate(self, params: Any) -> dict[str, float]:
        """What is measured on held-out examples: `eval_loss`, and others of `MEASURES`."""
        ...
