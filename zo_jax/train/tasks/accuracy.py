"""The examples of a task, by how many are right.

Axes: M members of a population, B examples of a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo_jax.estimators import Estimator
from zo_jax.layout import Layout
from zo_jax.train.config import Config
from zo_jax.train.scopes import make_scope
from zo_jax.train.settings import ConfigError
from zo_jax.train.tasks import answers, encode
from zo_jax.train.tasks.example import Examples
from zo_jax.train.tasks.populations import Score, Writer, make_strategy, make_text_loss
from zo_jax.train.tasks.prompted import Part, PromptedTask
from zo_jax.train.tasks.spread import gather


class AccuracyTask(PromptedTask):
    """The examples of a task, by how many are right: of options the likeliest, of answers those
    that match. Its loss as a step tells it is minus the accuracy.
    """

    def __init__(self, config: Config, model: Any, examples: Examples):
        """Raises DataError or ConfigError, as `PromptedTask`; or answers are not written."""
        super().__init__(config, model, examples)
        if examples.is_written and not self.writes:
            raise ConfigError("objective.name=accuracy writes answers: set task.answer_tokens")
        if not examples.is_written and config.objective.shaping == "prompt":
            raise ConfigError(
                "objective.shaping=prompt needs scores of each prompt, and options are counted "
                "over the batch; set objective.shaping=zscore or ranks"
            )
        self.measure = "eval_exact_match" if examples.is_written else "eval_accuracy"
        self.strategy = make_strategy(config)
        self._scope = make_scope(config.scope, model)
        self._text_loss = make_text_loss(config, model)

    def batches(self, step: int, layout: Layout | None = None) -> tuple[Any, Any]:
        if not self.examples.is_written:
            return super().batches(step, layout)
        return self.orders[self.config.train.batch_size].batch(step)[0], None

    def make_score(self, layout: Layout | None) -> Score:
        if not self.examples.is_written:
            return self._make_count(layout)
        writer = Writer(self.config, self.model, self.strategy, layout)

        def score(params: Any, key: jax.Array, batch: Any) -> np.ndarray:
            prompts = [self.prompt(self.train, i) for i in batch]
            texts = writer.write(params, key, prompts, **self.answer_options)
            references = [self.train.examples[i].references for i in batch]
            is_right = lambda own: [
                answers.exact_match(text.strip(), right)
                for text, right in zip(own, references, strict=True)
            ]
            own = np.asarray([is_right(own) for own in texts], np.float32)
            return gather(writer.spread.own, own).astype(np.float32)

        return score

    def _make_count(self, layout: Layout | None) -> Score:
        """The part of the options that are right, float32 [M]."""
        estimator = Estimator(
            num_queries=self.config.zo.num_queries,
            perturbation=self.strategy.family,
            mesh=None if layout is None else layout.mesh,
        )
        sides = (self.strategy.sigma, -self.strategy.sigma)

        def accuracy(params: Any, trained: Any, batch: Any) -> jax.Array:
            _, choice_B = self._losses_and_choices(self._scope.merge(params, trained), batch)
            if isinstance(batch, encode.Labelled):
                return jnp.mean((choice_B == batch.right).astype(jnp.float32))
            right_B = jnp.take_along_axis(batch.right, choice_B[:, None], axis=1)
            return jnp.mean(right_B.astype(jnp.float32))

        @jax.jit
        def count(params: Any, key: jax.Array, batch: Any) -> jax.Array:
            trained = self._scope.select(params)
            of_trained = jax.tree_util.Partial(accuracy, params)
            return estimator.losses_along(of_trained, trained, key, sides, batch).reshape(-1)

        return count

    def evaluate_part(self, params: Any, part: Part) -> dict[str, float]:
        results = super().evaluate_part(params, part)
        if self._text_loss and part is self.validation:
            results |= self._text_loss.measure(params)
        return results
