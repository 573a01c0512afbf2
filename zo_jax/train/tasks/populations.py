"""What the members of a population write, and their scores: rewards and accuracies.

Axes: M members, P prompts of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zo_jax import families
from zo_jax.estimators import Estimator
from zo_jax.evolution import Evolution, Members
from zo_jax.layout import Layout
from zo_jax.models.generate import generate
from zo_jax.models.population import populate
from zo_jax.train import processes
from zo_jax.train.config import Config
from zo_jax.train.data.corpus import permutation
from zo_jax.train.data.sources import DataError
from zo_jax.train.evaluate import choose_blocks, make_evaluate
from zo_jax.train.rewards.pool import Call, Reward
from zo_jax.train.scopes import make_scope
from zo_jax.train.settings import ConfigError
from zo_jax.train.tasks import answers, encode
from zo_jax.train.tasks.example import Example, Examples
from zo_jax.train.tasks.prompted import Part, PromptedTask
from zo_jax.train.tasks.spread import Spread, gather, own_copy

# Completions written at once in an evaluation, and how many of them are shown.
_BATCH, _SHOWN = 64, 3
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


class Prompts(NamedTuple):
    """Examples with the tokens of their prompts, int32 [num_tokens] each."""

    examples: list[Example]
    tokens: list[np.ndarray]


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


def _text_loss(config: Config, model: Any) -> TextLoss | None:
    path = config.objective.text_path
    return TextLoss(path, model) if path else None


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
        self._text_loss = _text_loss(config, model)
        self._draw_seed = jax.jit(lambda key: jax.random.bits(jax.random.fold_in(key, 2**31)) >> 1)
        first = examples.train[:2]
        reward.try_out(_call(first, [""] * len(first)))

    def _encode(self, examples: list[Example]) -> Prompts:
        config, tokens = self.config, []
        room = self.model.context_length - config.objective.max_new_tokens
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
                    f"a prompt must have 1 to {max(room, 0)} tokens, so that it and "
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
        self._scope, self._text_loss = make_scope(config.scope, model), _text_loss(config, model)

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
