"""Learning from examples of a prompt and what follows it.

Axes: N examples, B examples of a batch, K options, T tokens, q queries.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from zo_jax.layout import Layout
from zo_jax.models.generate import generate
from zo_jax.train.activation_cache import ActivationCache
from zo_jax.train.config import Config
from zo_jax.train.data.batches import reads
from zo_jax.train.data.sources import DataError
from zo_jax.train.scopes import make_scope
from zo_jax.train.tasks import answers, encode, scores
from zo_jax.train.tasks.encode import Chosen, Encoded, Labelled, Written
from zo_jax.train.tasks.example import CHOICE, Example, Examples
from zo_jax.train.tasks.order import Order, width_of, widths

# Sequences evaluated at once.
_BATCH = 32


class Part(NamedTuple):
    """Examples with their tokens."""

    examples: list[Example]
    encoded: Encoded


class PromptedTask:
    """Examples of a prompt and what follows it; a `Task`.

    Which way the loss goes, and what is measured:

    - labels: all examples have the same options, of one token each: cross-entropy of these tokens
      after the prompt, and the accuracy of the likeliest;
    - options: cross-entropy of the options by their mean log-probability a token, and the accuracy
      of the likeliest; or, where the right one is learnt alone, its cross-entropy a token;
    - answers: their cross-entropy a token; they are written greedily, and compared by F1 and exact
      match.
    """

    def __init__(self, config: Config, model: Any, examples: Examples):
        """Encodes the examples.

        Args:
          config: resolved.
          model: a `train.pretrained.Pretrained`.
          examples: of `load_examples`.

        Raises:
          DataError: an example is too long, or the answers that are to be written.
        """
        self.config, self.model, self.examples = config, model, examples
        self.unit, self.samples = "token of an answer" if examples.is_written else "example", []
        tokenizer, limit = model.tokenizer, min(config.task.max_tokens, model.context_length)
        # A conversation's special tokens are in its text.
        special = not config.task.chat
        self.labels = None
        if examples.learns == CHOICE:
            self.labels = encode.label_tokens(tokenizer, examples.parts, special)
        if self.labels is not None:
            learnt = measured = encode.encode_labelled
        else:
            learnt = encode.encode_chosen if examples.learns == CHOICE else encode.encode_written
            measured = encode.encode_written if examples.is_written else encode.encode_chosen
        part = lambda of, function: Part(of, function(tokenizer, of, limit, special))
        self.train = part(examples.train, learnt)
        self.validation = part(examples.validation, measured)
        self.test = part(examples.test, measured) if examples.test else None
        self.writes = examples.is_written and config.task.answer_tokens > 0
        if self.writes and config.task.answer_tokens >= model.context_length:
            raise DataError(
                f"task.answer_tokens={config.task.answer_tokens} leaves no room for a prompt in "
                f"the model's context of {model.context_length}; lower it"
            )
        self.measure = "eval_f1" if self.writes else "eval_accuracy"
        if examples.is_written and not self.writes:
            self.measure = "eval_loss"
        lengths_N = encode.lengths(self.train.encoded)
        self.num_examples, self.tokens_per_example = len(lengths_N), round(float(lengths_N.mean()))
        keeps = config.train.keep_activations
        self.orders = {
            size: Order(lengths_N, size, config.seed, same_batches=keeps)
            for size in _batch_sizes(config)
        }
        self._num_scored = max(map(_num_scored, (self.train.encoded, self.validation.encoded)))
        measure = self._losses_and_choices
        cached = lambda: ActivationCache(measure, make_scope(config.scope, model))
        self._measure_batch = cached() if keeps else jax.jit(measure)

    @property
    def summary(self) -> str:
        e, task = self.examples, self.config.task
        way = f"{len(self.labels)} labels" if self.labels else "options" if not e.is_written else ""
        widths = next(iter(self.orders.values())).widths
        return (
            f"{e.name}: {len(e.train):,} training, {len(e.validation):,} validation and "
            f"{len(e.test):,} test examples, {way or 'answers'}; {self.tokens_per_example} tokens "
            f"in the mean, at most {min(task.max_tokens, self.model.context_length)}, batches of "
            f"{', '.join(map(str, widths))}"
        )

    def batches(self, step: int, layout: Layout | None = None) -> tuple[Any, Any]:
        for_queries, for_backprop = reads(self.config, step)
        queries, backprop = _batch_sizes(self.config)
        q, B = self.config.zo.num_queries, self.config.train.batch_size
        shape = (q, B) if self.config.zo.batch_per_query else (B,)
        return (
            self._read(queries, step, shape, layout) if for_queries else None,
            self._read(backprop, step, (backprop,), layout) if for_backprop else None,
        )

    def _read(self, size: int, step: int, shape: tuple[int, ...], layout: Layout | None) -> Any:
        indices, width = self.orders[size].batch(step)
        batch = encode.take(self.train.encoded, indices, width)
        batch = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), batch)
        return layout.put_batch(batch, len(shape) - 1) if layout else batch

    def loss(self, params: Any, batch: Encoded) -> jax.Array:
        return jnp.mean(self.losses(params, batch))

    def losses(self, params: Any, batch: Encoded) -> jax.Array:
        """The loss of each example, float32 [B]."""
        return self._losses_and_choices(params, batch)[0]

    def _losses_and_choices(self, params: Any, batch: Encoded) -> tuple[jax.Array, jax.Array]:
        """(loss [B], the option that is chosen [B])."""
        if isinstance(batch, Written):
            losses_B = scores.written_losses(self.model, params, batch, self._num_scored)
            return losses_B, jnp.zeros(losses_B.shape, jnp.int32)
        if isinstance(batch, Labelled):
            labels = jnp.asarray(self.labels, jnp.int32)
            scores_BK = scores.labelled_scores(self.model, params, batch, labels)
            right_BK = jax.nn.one_hot(batch.right, len(labels), dtype=bool)
        else:
            scores_BK = scores.chosen_scores(self.model, params, batch, self._num_scored)
            right_BK = batch.right
        losses_B = scores.choice_losses(scores_BK, right_BK)
        return losses_B, jnp.argmax(scores_BK, axis=1).astype(jnp.int32)

    def evaluate(self, params: Any) -> dict[str, float]:
        return self.evaluate_part(params, self.validation)

    def evaluate_part(self, params: Any, part: Part) -> dict[str, float]:
        """What is measured on some examples, in batches of like lengths."""
        lengths_N = encode.lengths(part.encoded)
        order = np.argsort(lengths_N, kind="stable")
        batch_size = max(1, _BATCH // _sequences(part.encoded))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        longest = np.asarray([lengths_N[batch].max() for batch in batches])
        fit = widths(longest, int(lengths_N.max()))
        losses, is_right = np.zeros(len(order)), np.zeros(len(order), bool)
        for batch in batches:
            # The last batch is filled up, so that it is no program of its own.
            padded = np.resize(batch, batch_size)
            encoded = encode.take(part.encoded, padded, width_of(fit, int(lengths_N[batch].max())))
            loss_B, choice_B = (np.asarray(x) for x in self._measure_batch(params, encoded))
            losses[batch], is_right[batch] = (
                loss_B[: len(batch)],
                [
                    int(choice) in part.examples[i].right
                    for i, choice in zip(batch, choice_B, strict=False)
                ],
            )
        result = {"eval_loss": float(losses.mean())}
        if not self.examples.is_written:
            return result | {"eval_accuracy": float(is_right.mean())}
        return result | (self._compare(params, part) if self.writes else {})

    def _compare(self, params: Any, part: Part) -> dict[str, float]:
        """Writes the answers, and compares them."""
        texts = self.write(params, part)
        pairs = [(text, x.references) for text, x in zip(texts, part.examples, strict=True)]
        return {
            "eval_f1": float(np.mean([answers.f1(*pair) for pair in pairs])),
            "eval_exact_match": float(np.mean([answers.exact_match(*pair) for pair in pairs])),
        }

    def write(self, params: Any, part: Part) -> list[str]:
        """The answers that the model writes to the prompts of some examples."""
        prompts = [self.prompt(part, i) for i in range(len(part.examples))]
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        texts = [""] * len(prompts)
        groups = [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)]
        for group in tqdm.tqdm(groups, unit="batch", desc="answers", leave=False, disable=None):
            out = generate(
                self.model.model,
                self.model.weights(params),
                [prompts[i] for i in group],
                **self.answer_options,
            )
            for i, text in zip(group, out.texts, strict=True):
                texts[i] = text.strip()
        return texts

    def prompt(self, part: Part, i: int) -> np.ndarray:
        """The tokens of a prompt, its end where it leaves no room for an answer."""
        encoded = part.encoded
        assert isinstance(encoded, Written)
        room = self.model.context_length - self.config.task.answer_tokens
        start = int(encoded.start[i])
        return encoded.tokens[i, max(0, start - room) : start]

    @property
    def answer_options(self) -> dict[str, Any]:
        """Of `generate`, by which answers are written."""
        end = self.examples.end
        return dict(max_tokens=self.config.task.answer_tokens, stop=[end] if end else [])


def _batch_sizes(config: Config) -> tuple[int, int]:
    """Examples that a step reads for its queries, and for backprop."""
    per_query = config.zo.batch_per_query
    queries = config.train.batch_size * (config.zo.num_queries if per_query else 1)
    return queries, config.fo.batch_size or config.train.batch_size


def _sequences(encoded: Encoded) -> int:
    """Of an example."""
    return encoded.tokens.shape[1] if isinstance(encoded, Chosen) else 1


def _num_scored(encoded: Encoded) -> int:
    """Tokens of the longest answer or option."""
    if isinstance(encoded, Labelled):
        return 1
    return int(np.max(encoded.end - encoded.start))
