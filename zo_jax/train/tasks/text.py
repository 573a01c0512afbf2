"""The next token of a corpus."""

from typing import Any

import jax

from zo_jax.layout import Layout
from zo_jax.train.config import Config
from zo_jax.train.data.batches import read_batches
from zo_jax.train.data.corpus import Corpus
from zo_jax.train.evaluate import choose_blocks, make_evaluate
from zo_jax.train.losses import next_token_loss


class TextTask:
    """Predicting each token of a corpus from those before it in its block; a `Task`."""

    unit, measure = "token", "eval_loss"

    def __init__(self, config: Config, model: Any, corpus: Corpus):
        self.config, self.model, self.corpus = config, model, corpus
        self.summary, self.samples = corpus.summary, []
        self.num_examples, self.tokens_per_example = corpus.train_NT.shape
        self._evaluate = make_evaluate(model)
        self._held_out = choose_blocks(corpus.validation_NT, config.train.eval_blocks)

    def batches(self, step: int, layout: Layout | None = None) -> tuple[Any, Any]:
        corpus = self.corpus
        return read_batches(self.config, corpus.train_NT, step, corpus.fo_NT, layout)

    def loss(self, params: Any, batch: jax.Array) -> jax.Array:
        return next_token_loss(self.model, params, batch)

    def evaluate(self, params: Any) -> dict[str, float]:
        return {"eval_loss": float(self._evaluate(params, self._held_out))}
