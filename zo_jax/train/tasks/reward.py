"""Prompts, and a reward of what is written to them.

Axes: P prompts of a batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from zo_jax.layout import Layout
from zo_jax.models.generate import generate
from zo_jax.train import processes
from zo_jax.train.config import Config
from zo_jax.train.data.corpus import permutation
from zo_jax.train.data.sources import DataError
from zo_jax.train.rewards.pool import Call, Reward
from zo_jax.train.tasks.example import Example, Examples
from zo_jax.train.tasks.populations import Score, Writer, make_strategy, make_text_loss
from zo_jax.train.tasks.spread import gather, own_copy

# Completions written at once in an evaluation, and how many of them are shown.
_BATCH, _SHOWN = 64, 3


class Prompts(NamedTuple):
    """Examples with the tokens of their prompts, int32 [num_tokens] each."""

    examples: list[Example]
    tokens: list[np.ndarray]


class RewardTask:
    """Prompts, and a reward of what is written to them; a `Task`. Its loss is minus the reward."""

    unit, measure = "completion", "eval_reward"

    def __init__(self, config: Config, model: Any, examples: Examples, reward: Reward):
        """Reads the prompts, and calls the reward once.

        Raises:
          DataError: a prompt is too long, or has what the tokenizer cannot read.
          ConfigError: the reward cannot be called, or returns what are no scores.
        """
        self.config, self.model, self.examples, self.reward = config, model, examples, reward
        self.samples: list[str] = []
        self.train, self.validation = map(self._encode, (examples.train, examples.validation))
        self.test = self._encode(examples.test) if examples.test else None
        lengths_N = np.asarray([len(tokens) for tokens in self.train.tokens])
        self.num_examples, self.tokens_per_example = len(lengths_N), round(float(lengths_N.mean()))
        self.strategy = make_strategy(config)
        self._stops = _stops(model, config.objective.stop)
        self._text_loss = make_text_loss(config, model)
        self._draw_seed = jax.jit(lambda key: jax.random.bits(jax.random.fold_in(key, 2**31)) >> 1)
        first = examples.train[:2]
        reward.try_out(_call(first, [""] * len(first)))

    def _encode(self, examples: list[Example]) -> Prompts:
        config, tokens = self.config, []
        room = self.model.context_length - config.objective.max_new_tokens
        if room < 1:
            raise DataError(
                f"objective.max_new_tokens={config.objective.max_new_tokens} leaves no room for a "
                f"prompt in the model's context of {self.model.context_length}; lower it"
            )
        for example in examples:
            try:
                # A conversation's special tokens are in its text.
                ids = self.model.tokenizer.encode(example.prompt, special=not config.task.chat)
            except Exception as error:  # tokenizers raises plain Exception
                raise DataError(
                    f"the model's tokenizer cannot read the prompt {example.prompt!r:.60}: {error}"
                ) from None
            ids = ids[max(0, len(ids) - config.task.max_tokens) :]
            if not 0 < len(ids) <= room:
                raise DataError(
                    f"a prompt must have 1 to {room} tokens, so that it and "
                    f"objective.max_new_tokens={config.objective.max_new_tokens} fit into the "
                    f"model's context of {self.model.context_length}; {example.prompt!r:.60} has "
                    f"{len(ids)}; lower objective.max_new_tokens or task.max_tokens"
                )
            tokens.append(ids)
        return Prompts(examples, tokens)

    @property
    def summary(self) -> str:
        e = self.examples
        return (
            f"{e.name}: {len(e.train):,} training, {len(e.validation):,} validation and "
            f"{len(e.test):,} test prompts of {self.tokens_per_example} tokens in the mean, "
            f"completions of at most {self.config.objective.max_new_tokens}; reward "
            f"{self.reward.path.name}:{self.reward.name}"
        )

    def batches(self, step: int, layout: Layout | None = None) -> tuple[Any, Any]:
        """Indices [P] of the prompts of a step: in an epoch each comes once, in an order that the
        seed decides, whatever its length; a step of like prompts would say less.
        """
        del layout
        size, count = self.config.train.batch_size, self.num_examples
        epoch, place = divmod(step, max(1, count // size))
        order = permutation(count, self.config.seed, epoch)
        # With fewer prompts than a batch they come again and again.
        return np.resize(order, max(size, count))[place * size : (place + 1) * size], None

    def loss(self, params: Any, batch: Any) -> jax.Array:
        raise NotImplementedError("a reward has no loss that can be traced")

    def make_score(self, layout: Layout | None) -> Score:
        writer = Writer(self.config, self.model, self.strategy, layout)

        def score(params: Any, key: jax.Array, batch: Any) -> np.ndarray:
            prompts = [self.train.tokens[i] for i in batch]
            seed = int(self._draw_seed(key))
            texts = writer.write(params, key, prompts, seed=seed, **self._options())
            examples = [self.train.examples[i] for i in batch]
            own = self.reward.ask([_call(examples, written) for written in texts])
            return self.reward.settle(gather(writer.spread.own, own)).astype(np.float32)

        return score

    def evaluate(self, params: Any) -> dict[str, float]:
        results = self.evaluate_part(params, self.validation)
        return results | (self._text_loss.measure(params) if self._text_loss else {})

    def evaluate_part(self, params: Any, part: Prompts) -> dict[str, float]:
        """The mean reward of what the model itself writes to some prompts, always by the same
        random numbers.
        """
        weights, num_prompts = self.model.weights(own_copy(params)), len(part.tokens)
        places, calls = [], []
        # Each process has its share of the batches.
        for start in range(0, num_prompts, _BATCH)[processes.index() :: processes.count()]:
            numbers = np.arange(start, min(start + _BATCH, num_prompts))
            # The last batch is filled up, so that it is no program of its own.
            rows = np.resize(numbers, min(_BATCH, num_prompts))
            prompts = [part.tokens[i] for i in rows]
            texts = generate(
                self.model.model, weights, prompts, seed=0, streams=rows, **self._options()
            ).texts
            places += numbers.tolist()
            calls += [
                _call([part.examples[i]], [text]) for i, text in zip(numbers, texts, strict=False)
            ]
        scores = self.reward.settle(gather(places, self.reward.ask(calls)))[:, 0]
        if processes.is_first():
            self.samples = [
                f"  {call.prompts[0]!r:.80} -> {call.completions[0]!r:.200} ({score:g})"
                for call, score in zip(calls[:_SHOWN], scores, strict=False)
            ]
        reward = float(scores.mean())
        return {"eval_loss": 0.0 - reward, "eval_reward": reward}

    def _options(self) -> dict[str, Any]:
        o = self.config.objective
        return dict(max_tokens=o.max_new_tokens, temperature=o.temperature, **self._stops)


def _call(examples: Sequence[Example], completions: list[str]) -> Call:
    """What the reward is told of some completions; of a task without a file, the right answers."""
    right = lambda x: list(x.references) or [x.options[i] for i in x.right]
    rows = [{"answers": right(x)} if x.row is None else x.row for x in examples]
    return Call([x.prompt for x in examples], completions, rows)


def _stops(model: Any, stop: str) -> dict[str, Any]:
    """Options of `generate` that end a text at a string: by its token where that is the only one
    that has it, since tokens are looked at on the device.
    """
    if not stop:
        return {}
    backend = model.tokenizer.backend
    found = [i for i in range(backend.get_vocab_size()) if stop in model.tokenizer.decode([i])]
    if len(found) == 1 and len(stop) == 1:
        return {"stop_tokens": [*model.files.config.eos_tokens, *found]}
    return {"stop": [stop]}
