"""What the members of a population write, and what a task of their scores has beside.

Axes: M members, P prompts of a batch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from zo_jax import families
from zo_jax.evolution import Evolution, Members
from zo_jax.layout import Layout
from zo_jax.models.generate import generate
from zo_jax.models.population import populate
from zo_jax.train.config import Config
from zo_jax.train.data.sources import DataError
from zo_jax.train.evaluate import choose_blocks, make_evaluate
from zo_jax.train.scopes import make_scope
from zo_jax.train.tasks.spread import Spread

# Blocks of the text whose loss is told, at most, and the most tokens of one.
_NUM_BLOCKS, _BLOCK = 32, 256

Score = Callable[[Any, jax.Array, Any], np.ndarray | jax.Array]


class Scored(Protocol):
    """A task whose members are scored; see `Task` for the rest of it.

    Attributes:
      strategy: the population of a step.
    """

    strategy: Evolution

    def make_score(self, layout: Layout | None) -> Score:
        """(params, key of a step, batch) -> the scores of the members that the strategy asks for,
        float32 [M] or [M, P]; with a layout they are spread over its axis `query`.
        """
        ...


def make_strategy(config: Config) -> Evolution:
    """The population that a configuration names."""
    return Evolution(
        population=2 * config.zo.num_queries,
        sigma=config.zo.epsilon,
        perturbation=families.by_name(config.zo.perturbation, config.zo.rank),
        shaping=config.objective.shaping,
    )


class Writer:
    """Members of a population around the trained parameters, which write together.

    Attributes:
      spread: where they are.
    """

    def __init__(self, config: Config, model: Any, strategy: Evolution, layout: Layout | None):
        """Of a `train.pretrained.Pretrained`."""
        self._model, scope = model, make_scope(config.scope, model)
        self.spread = Spread(strategy.population, layout)

        def place(params: Any, members: Members) -> Any:
            moved = populate(params, strategy.family, members.keys, members.scales, scope)
            return model.weights(moved)

        self._ask, self._place = jax.jit(strategy.ask), jax.jit(place)

    def write(
        self, params: Any, key: jax.Array, prompts: Sequence[np.ndarray], **options: Any
    ) -> list[list[str]]:
        """What each member of a step that this process has writes to each prompt; options are those
        of `generate`.
        """
        params, words = self.spread.here((params, jax.random.key_data(key)))
        members = self._ask(jax.random.wrap_key_data(words, impl="threefry2x32"))
        if sharding := self.spread.rows():
            own = jax.tree.map(lambda x: x[self.spread.own], members)
            members = jax.device_put(own, sharding)
        M, P = len(members.keys), len(prompts)
        weights = self._place(params, members)
        streams = np.tile(np.arange(P), M)
        out = generate(
            self._model.model,
            weights,
            [*prompts] * M,
            streams=streams,
            sharding=sharding,
            **options,
        )
        return [out.texts[i : i + P] for i in range(0, M * P, P)]


class TextLoss:
    """The loss on a text that is not learnt, beside what an evaluation tells."""

    def __init__(self, path: str, model: Any):
        try:
            tokens = model.tokenizer.encode(Path(path).expanduser().read_text(), special=False)
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(f"objective.text_path={path} cannot be read: {error}") from None
        T = min(_BLOCK, model.context_length)
        if len(tokens) < T:
            raise DataError(
                f"objective.text_path={path} has {len(tokens)} tokens; give at least {T}"
            )
        blocks = tokens[: len(tokens) // T * T].reshape(-1, T)
        self._blocks, self._evaluate = choose_blocks(blocks, _NUM_BLOCKS), make_evaluate(model)

    def measure(self, params: Any) -> dict[str, float]:
        return {"eval_text_loss": float(self._evaluate(params, self._blocks))}


def make_text_loss(config: Config, model: Any) -> TextLoss | None:
    path = config.objective.text_path
    return TextLoss(path, model) if path else None
