"""The examples of a task by its name."""

from typing import Any

from zo_jax.train.config import Config
from zo_jax.train.tasks.example import CHOICE, REWARD, WRITE, Examples, split
from zo_jax.train.tasks.files import read_examples
from zo_jax.train.tasks.published import PUBLISHED, read_published


def load_examples(config: Config, tokenizer: Any) -> Examples:
    """Reads the examples of the configured task, in disjoint parts.

    Those of a file are put in an order that the seed decides, and cut. MeZO's tasks are split as it
    does: training and validation examples from the training split, test examples from the
    validation split, whose own test splits have no labels.

    Args:
      config: validated; its section `task` names one.
      tokenizer: of the model, whose chat template conversations are written by; or None.

    Raises:
      DataError: they cannot be had.
    """
    task, seed = config.task, config.seed
    sizes = task.num_train, task.num_validation, task.num_test
    if task.name == "file":
        chat = tokenizer and tokenizer.chat
        for_reward = config.objective.name == "reward"
        found = read_examples(task, task.path, chat, for_reward)
        learns = REWARD if for_reward else CHOICE if task.labels else WRITE
        return Examples(task.path, learns, not task.labels, *split(found, sizes, seed, task.path))
    published = PUBLISHED[task.name]
    of_train, of_test = read_published(task.name, task.path)
    train, validation = split(of_train, sizes[:2], seed, task.name)
    (test,) = split(of_test, sizes[2:], seed, task.name) if task.num_test else ([],)
    end = "\n" if published.is_written else ""
    return Examples(task.name, published.learns, published.is_written, train, validation, test, end)
