"""What a run is about: the model that it trains, and the task that it learns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from zo_jax.train.config import Config
from zo_jax.train.data.batches import load_corpora
from zo_jax.train.data.corpus import ORDER, Corpus
from zo_jax.train.data.sources import DataError
from zo_jax.train.data.tokenization import ModelTokenizer, Tokenizer
from zo_jax.train.model import make_model
from zo_jax.train.pretrained import Pretrained, open_pretrained
from zo_jax.train.rewards.pool import Reward
from zo_jax.train.tasks.accuracy import AccuracyTask
from zo_jax.train.tasks.example import Examples
from zo_jax.train.tasks.load import load_examples
from zo_jax.train.tasks.prompted import PromptedTask
from zo_jax.train.tasks.reward import RewardTask
from zo_jax.train.tasks.task import Task
from zo_jax.train.tasks.text import TextTask


class Sources(NamedTuple):
    """What a run reads.

    Attributes:
      base: the pretrained model, or None.
      data: a corpus, or examples.
      digests: what tells them from others.
      reward: the objective's, if it is one.
    """

    base: Pretrained | None
    data: Corpus | Examples
    digests: dict[str, Any]
    reward: Reward | None = None

    @property
    def num_examples(self) -> int:
        """Training blocks or examples."""
        data = self.data
        return len(data.train_NT if isinstance(data, Corpus) else data.train)

    @property
    def count_tokens(self) -> Callable[[], np.ndarray] | None:
        """How often the training text has each token, where there is one."""
        return self.data.count_tokens if isinstance(self.data, Corpus) else None


class Subject(NamedTuple):
    """What a run is about.

    Attributes:
      model: a `GPT` or a `Pretrained`.
      task: a `TextTask` or a `PromptedTask`.
      tokenizer: of its text.
      digests: what tells what it reads from others.
    """

    model: Any
    task: Task
    tokenizer: Tokenizer
    digests: dict[str, Any]


def load_sources(config: Config) -> Sources:
    """Reads what a validated configuration names, but for the weights.

    Raises:
      ConfigError: there is no such model, or no such reward.
      DataError: there is no such data, or the model has no tokenizer for it.
    """
    base = open_pretrained(config)
    of_base = {} if base is None else {"base": base.files.digest}
    if base and base.tokenizer is None:
        raise DataError(
            f"model.path={config.model.path} has no tokenizer.json, without which no text can be "
            f"read; add the file"
        )
    if config.task.name == "text":
        corpus = load_corpora(config, base and _corpus_tokenizer(base))
        return Sources(base, corpus, corpus.digests | of_base)
    assert base  # validated
    examples = load_examples(config, base.tokenizer)
    digests, reward = {"examples": examples.digest, "order": ORDER} | of_base, None
    if config.objective.name == "reward":
        reward = Reward(config.objective.path, config.objective.timeout)
        digests["reward"] = reward.digest
    return Sources(base, examples, digests, reward)


def make_subject(config: Config, sources: Sources) -> Subject:
    """The model and the task of a resolved configuration.

    Raises:
      DataError: an example is too long.
      ConfigError: the reward cannot be called.
    """
    base, data = sources.base, sources.data
    if base is not None:
        base = Pretrained(base.files, config)
    if isinstance(data, Corpus):
        tokenizer = data.tokenizer
        model = base or make_model(config.model, tokenizer.vocab_size)
        return Subject(model, TextTask(config, model, data), tokenizer, sources.digests)
    assert base
    if sources.reward:
        task = RewardTask(config, base, data, sources.reward)
    elif config.objective.name == "accuracy":
        task = AccuracyTask(config, base, data)
    else:
        task = PromptedTask(config, base, data)
    return Subject(base, task, _corpus_tokenizer(base), sources.digests)


def _corpus_tokenizer(base: Pretrained) -> ModelTokenizer:
    ends = base.files.config.eos_tokens
    return ModelTokenizer(base.tokenizer, base.vocab_size, ends[0] if ends else None)
