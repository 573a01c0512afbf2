"""What benchmarks/field.py trains: a character GPT from scratch, and the last layers of SmolLM2 on
short movie reviews.

Of the pretrained model the residual stream below the layers that are trained depends on nothing
that is trained. It is evaluated once for all runs, and kept in a file.

Axes: B examples of a batch, N examples, T tokens, C width, K labels.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

from finetune import make_config, write_examples
import jax
import jax.numpy as jnp
import numpy as np

from zo_jax.models import decoder, lora
from zo_jax.models.config import Config
from zo_jax.models.layers import AS_IT_IS, CHECKPOINTED, rms_norm
from zo_jax.models.model import Model
from zo_jax.models.weights import product, rows
from zo_jax.train import experiment
from zo_jax.train.data.corpus import batch_indices, load_corpus
from zo_jax.train.evaluate import choose_blocks, make_evaluate
from zo_jax.train.losses import next_token_loss, next_token_losses
from zo_jax.train.model import make_model
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.tasks import encode
from zo_jax.train.tasks.order import Order, width_of
from zo_jax.train.tasks.prompted import PromptedTask
from zo_jax.train.validation import resolve

EVAL_BLOCKS = 256
# Of batches of reviews, each a program of its own; the last holds every example.
WIDTHS = (32, 48, 64)
# Reviews evaluated at once.
EVAL_EXAMPLES = 50
# All that writes into the residual stream.
LORA_TARGETS, LORA_RANK, LORA_ALPHA = r"(down_proj|o_proj)$", 8, 16.0


class Task:
    """What methods are compared on.

    Attributes:
      frozen: what the loss reads beside the parameters that are trained.
      batch_size: B.
      epsilon: of all methods.
      width: the least axis of the matrices that are trained, which bounds ranks.
      input_axis: of matrices, as AGZO has it.
      share: of the products of a pass, those with matrices that are trained.
    """

    frozen: Any = ()
    batch_size: int
    epsilon: float
    width: int
    input_axis: int
    share: float = 1.0

    def fresh(self, seed: int) -> Any:
        """The parameters that a run trains, as they are in the beginning."""
        raise NotImplementedError

    def batch(self, seed: int, step: int, size: int) -> tuple[np.ndarray, ...]:
        """Of a step (from 0), each array with the examples along its first axis."""
        raise NotImplementedError

    def shapes(self, size: int) -> list[tuple[Any, ...]]:
        """Those of all batches of a size, the largest last."""
        raise NotImplementedError

    def token_losses(
        self, frozen: Any, params: Any, *batch: jax.Array, checkpoint: bool = False
    ) -> jax.Array:
        """The losses of tokens [B, T], or of examples [B, 1], whose mean is the loss.

        Args:
          frozen, params, *batch: as of `frozen`, `fresh` and `batch`.
          checkpoint: whether backprop keeps the inputs of a layer alone.
        """
        raise NotImplementedError

    def loss(self, frozen: Any, params: Any, *batch: jax.Array) -> jax.Array:
        return jnp.mean(self.token_losses(frozen, params, *batch))

    def checkpointed_loss(self, frozen: Any, params: Any, *batch: jax.Array) -> jax.Array:
        return jnp.mean(self.token_losses(frozen, params, *batch, checkpoint=True))

    def is_matrix(self, path: str, leaf: Any) -> bool:
        """Whether a leaf is the matrix of a product of activations."""
        raise NotImplementedError

    def evaluate(self, params: Any) -> dict[str, float]:
        """The validation loss, and accuracy where there is one."""
        raise NotImplementedError

    def test(self, params: Any) -> float:
        """The accuracy on test examples."""
        raise NotImplementedError


class Character(Task):
    """The model, data and batches of configs/default.py."""

    input_axis, epsilon = -2, 1e-2

    def __init__(self):
        config = experiment.load("default")
        corpus = load_corpus(config.data)
        self.model = make_model(config.model, corpus.tokenizer.vocab_size)
        self.batch_size, self.width = config.train.batch_size, config.model.width
        self.train_NT = corpus.train_NT
        self.held_out = choose_blocks(corpus.validation_NT, EVAL_BLOCKS)
        self._evaluate = make_evaluate(self.model)

    def fresh(self, seed):
        return self.model.start(jax.random.key(seed))

    def batch(self, seed, step, size):
        return (self.train_NT[batch_indices(len(self.train_NT), size, seed, step)],)

    def shapes(self, size):
        return [(jax.ShapeDtypeStruct((size, self.train_NT.shape[1]), self.train_NT.dtype),)]

    def token_losses(self, frozen, params, tokens_BT, checkpoint=False):
        model = dataclasses.replace(self.model, checkpoint_activations=checkpoint)
        return next_token_losses(model, params, tokens_BT)

    def loss(self, frozen, params, tokens_BT):
        return next_token_loss(self.model, params, tokens_BT)

    def is_matrix(self, path, leaf):
        return path.endswith("kernel")

    def evaluate(self, params):
        return {"loss": float(self._evaluate(params, self.held_out))}


class Part(NamedTuple):
    """Examples as they are below the layers that are trained.

    Attributes:
      stream: float32 [N, T, C].
      length: int32 [N], tokens of each.
      right: int32 [N], the label.
    """

    stream: np.ndarray
    length: np.ndarray
    right: np.ndarray

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        width = width_of(WIDTHS, int(self.length[indices].max()))
        return self.stream[indices, :width], self.length[indices], self.right[indices]


class Reviews(Task):
    """The last layers of SmolLM2-135M-Instruct on the examples of benchmarks/finetune.py."""

    input_axis, batch_size = -1, 16

    def __init__(self, num_layers: int, folder: Path, has_factors: bool):
        """Of the last `num_layers` layers the weights, or low-rank factors beside them."""
        base = pretrained(num_layers, folder)
        self.config, self.parts, self.has_factors = base.config, base.parts, has_factors
        self.frozen = {"norm": base.params["norm"], "labels": base.labels}
        self.start = {"layers": base.params["layers"]}
        self.model = Model(base.config, self.start)
        if has_factors:
            self.frozen |= self.start
            size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
            self.share = size(self.fresh(0)) / size(self.start)
        self.epsilon = 1e-2 if has_factors else 1e-3
        self.width = LORA_RANK if has_factors else base.config.num_kv_heads * base.config.head_dim
        self._score = jax.jit(self._scores)
        self._order = functools.lru_cache(
            lambda size, seed: Order(self.parts["train"].length, size, seed)
        )

    def fresh(self, seed):
        if not self.has_factors:
            return jax.tree.map(jnp.copy, self.start)
        key = jax.random.key(seed)
        return lora.init(key, self.model, LORA_RANK, LORA_ALPHA, LORA_TARGETS)

    def batch(self, seed, step, size):
        return self.parts["train"].take(self._order(size, seed).batch(step)[0])

    def shapes(self, size):
        numbers = jax.ShapeDtypeStruct((size,), np.int32)
        stream = lambda width: jax.ShapeDtypeStruct((size, width, self.config.width), np.float32)
        return [(stream(width), numbers, numbers) for width in WIDTHS]

    def token_losses(self, frozen, params, stream_BTC, length_B, right_B, checkpoint=False):
        """That of the label after the prompt alone, [B, 1]."""
        scores_BK = self._scores(frozen, params, stream_BTC, length_B, checkpoint)
        return -jnp.take_along_axis(jax.nn.log_softmax(scores_BK), right_B[:, None], axis=-1)

    def is_matrix(self, path, leaf):
        return self.has_factors or path.endswith("weight")

    def evaluate(self, params):
        return self._measure(params, self.parts["validation"])

    def test(self, params):
        return self._measure(params, self.parts["test"])["accuracy"]

    def _scores(self, frozen, params, x_BTC, length_B, checkpoint=False):
        """The logits of the labels after each prompt, [B, K]."""
        layers = (lora.attach(frozen, params) if self.has_factors else params)["layers"]
        around = CHECKPOINTED if checkpoint else AS_IT_IS
        x_BC = decoder.stream_at(self.config, layers, x_BTC, length_B - 1, around)
        hidden_BC = rms_norm(x_BC, frozen["norm"], self.config.norm_epsilon)
        return product(hidden_BC, frozen["labels"])

    def _measure(self, params, part: Part) -> dict[str, float]:
        order, scores_NK = np.argsort(part.length, kind="stable"), np.zeros((len(part.length), 2))
        for i in range(0, len(order), EVAL_EXAMPLES):
            indices = order[i : i + EVAL_EXAMPLES]
            stream, length, _ = part.take(indices)
            scores_NK[indices] = self._score(self.frozen, params, stream, length)
        wrong_by_N = np.diff(scores_NK)[:, 0] * (1 - 2 * part.right)
        loss = np.mean(np.logaddexp(0, wrong_by_N))
        return {"loss": float(loss), "accuracy": 100 * float(np.mean(wrong_by_N < 0))}


class Pretrained(NamedTuple):
    """What is above the stream that is kept.

    Attributes:
      config: of the last layers.
      params: the layers and the last norm.
      labels: the rows of the output head [K, C] of the labels.
      parts: training, validation and test examples.
    """

    config: Config
    params: Any
    labels: jax.Array
    parts: dict[str, Part]


@functools.cache
def pretrained(num_layers: int, folder: Path) -> Pretrained:
    """The last layers, and the examples below them; these are kept in the folder."""
    examples = folder / "reviews.jsonl"
    if not examples.exists():
        write_examples(examples)
    config = make_config("zo_full", 0, 1, examples)
    sources = load_sources(config)
    subject = make_subject(resolve(config, sources.num_examples), sources)
    task, whole = subject.task, subject.model.files.config
    assert isinstance(task, PromptedTask) and task.test and task.labels
    params, first = subject.model.start(jax.random.key(0)), whole.num_layers - num_layers
    parts, path = {}, folder / f"stream_{first}.npz"
    of = {"train": task.train, "validation": task.validation, "test": task.test}
    if not path.exists():
        below = evaluate_below(whole, params, first)
        unfinished = folder / f"unfinished_{path.name}"
        np.savez(unfinished, **{name: below(part.encoded) for name, part in of.items()})
        unfinished.rename(path)
    with np.load(path) as streams:
        for name, part in of.items():
            parts[name] = Part(streams[name], part.encoded.length, part.encoded.right)
    config, layers = cut(whole, params["layers"], first, whole.num_layers)
    labels = rows(decoder.head(params), np.asarray(task.labels), jnp.float32)
    return Pretrained(config, {"layers": layers, "norm": params["norm"]}, labels, parts)


def cut(config: Config, layers: Any, first: int, end: int) -> tuple[Config, Any]:
    """The configuration and the parameters of the layers from `first` to before `end`."""
    windows = config.windows[first:end]
    config = dataclasses.replace(config, num_layers=end - first, windows=windows)
    return config, jax.tree.map(lambda x: x[first:end], layers)


def evaluate_below(config: Config, params: Any, num_layers: int) -> Any:
    """A function of encoded examples: the residual stream [N, T, C] above the first layers, zero
    behind a prompt's batch.
    """
    config, layers = cut(config, params["layers"], 0, num_layers)

    @jax.jit
    def stream(table, layers, tokens_BT):
        return decoder.stream(config, layers, rows(table, tokens_BT, jnp.float32))[0]

    def below(encoded: encode.Labelled) -> np.ndarray:
        order = np.argsort(encoded.length, kind="stable")
        found = np.zeros((len(order), WIDTHS[-1], config.width), np.float32)
        for i in range(0, len(order), EVAL_EXAMPLES):
            indices = order[i : i + EVAL_EXAMPLES]
            width = width_of(WIDTHS, int(encoded.length[indices].max()))
            tokens = encode.take(encoded, indices, width).tokens
            x = np.asarray(stream(params["embed_tokens"]["weight"], layers, tokens))
            found[indices, : x.shape[1]] = x
        return found

    return below
