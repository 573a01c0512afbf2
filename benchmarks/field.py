"""Every method of zo_jax/methods beside the plain estimate and backprop, on two tasks: the tables
of docs/field.md.

  python benchmarks/field.py --tasks=character --passes=20000
  python benchmarks/field.py --tasks=reviews_lora,reviews_full --passes=4000
  python benchmarks/field.py --methods=plain,fzoo --passes=200 --tuning-runs=1 --seeds=0

character is the model of configs/default.py, from scratch; reviews_lora and reviews_full are the
last --layers layers of SmolLM2-135M-Instruct on short movie reviews, by low-rank factors or all
weights, and need the packages of benchmarks/finetune.py.

A budget is of forward passes of a batch; --passes is that of a run. The learning rate of a method
is found by --tuning-runs runs of a quarter of it, and falls in a run to a tenth of itself at the
end of the budget; for a run that ends above its start it is halved. A run goes on until it has
taken the seconds of the plain estimate's too, but to twice the passes at most; the tables have
both, "at equal passes" and "at equal seconds", by the last point of a run within the budget.
Seconds are CPU seconds of the steps, without compilation and evaluation.

A row is printed as soon as it is known, and its runs are kept in the file --out, where a later call
finds them.
"""

import argparse
from collections.abc import Callable
import functools
import json
import math
from pathlib import Path
import time
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
from field_methods import CONTROL, LARGE, METHODS, PERIOD, Transformation
from field_tasks import Character, Reviews, Task
import matplotlib.pyplot as plt
import numpy as np
import optax

NUM_POINTS, TUNING_SEED, LAST_RATE = 8, 100, 0.1
# How often the rate of a run that diverges is halved.
MOST_HALVINGS = 2
# A point that is late by so much of a budget of seconds is within it.
SLACK = 0.02
TASKS = {
    "character": lambda args: Character(),
    "reviews_lora": lambda args: Reviews(args.layers, args.out.parent, True),
    "reviews_full": lambda args: Reviews(args.layers, args.out.parent, False),
}
# What is told of a run.
TASKS_TOLD = {name: ("test accuracy, %", "validation loss") for name in TASKS}
TASKS_TOLD["character"] = ("validation loss, nats",)


def _scale_by_rate() -> Transformation:
    """Updates times -rate, which `update` is handed."""

    def update(updates, state, params=None, *, rate, **extra_args):
        return jax.tree.map(lambda x: -rate * x, updates), state

    return Transformation(lambda params: optax.EmptyState(), update)


class Trainer:
    """A method on a task, compiled.

    Attributes:
      batch_size: of backprop at equal memory less than the task's.
      passes: of a step.
      memory: bytes of a step, without what is the same for all: the program and the data set.
    """

    def __init__(self, name: str, task: Task, limit: int = 0):
        """With no more memory than `limit`, if the method is to keep to it."""
        self.method, self.task, self.batch_size = METHODS[name], task, task.batch_size
        self.transformation, self.programs = self._make(0), {}
        self.memory = self._compile_widest()
        while self.method.at_equal_memory and self.memory > limit and self.batch_size > 1:
            self.batch_size //= 2
            self.memory = self._compile_widest()
        for batch in task.shapes(self.batch_size)[:-1]:
            self._compile(batch)
        passes = self.method.passes(task) if callable(self.method.passes) else self.method.passes
        self.passes = passes * self.batch_size / task.batch_size

    def init(self, seed: int) -> tuple[Any, Any]:
        """Parameters and state before the first step."""
        params = self.task.fresh(seed)
        return params, self._make(seed).init(params)

    def take(self, carry: Any, seed: int, first: int, end: int, rate: Any) -> tuple[Any, float]:
        """The carry after the steps from `first` to before `end`, and their seconds."""
        start, large = time.process_time(), None
        for step in range(first, end):
            batch = self.task.batch(seed, step, self.batch_size)
            if self.method.reads_large and (large is None or step % PERIOD == 0):
                large = self.task.batch(seed, step // PERIOD, LARGE * self.batch_size)
                large = jax.device_put(_as_wide(large, self.task.shapes(len(large[0]))[-1]))
            program = self.programs[batch[0].shape]
            carry = program(carry, self.task.frozen, np.float32(rate(step)), batch, large)
        jax.block_until_ready(carry)
        return carry, time.process_time() - start

    def _make(self, seed: int) -> Transformation:
        method, (first, last) = self.method, jax.random.split(jax.random.key(seed))
        return optax.chain(
            method.make(self.task, first), method.optimizer(), _scale_by_rate(), method.last(last)
        )

    def _step(self, carry, frozen, rate, batch, large):
        params, state = carry
        loss = jax.tree_util.Partial(getattr(self.task, self.method.loss), frozen)
        updates, state = self.transformation.update(
            # Some transformations look at the updates that come in.
            params,
            state,
            params,
            value_fn=loss,
            batch=batch,
            full_batch=large,
            rate=rate,
        )
        return optax.apply_updates(params, updates), state

    def _compile_widest(self) -> int:
        return bytes_of(self._compile(self.task.shapes(self.batch_size)[-1]))

    def _compile(self, batch: Any) -> Any:
        """The step on batches of a shape, one of the programs from now on."""
        carry, large = jax.eval_shape(self.init, 0), None
        if self.method.reads_large:
            large = self.task.shapes(LARGE * self.batch_size)[-1]
        step = jax.jit(self._step, donate_argnums=0)
        lowered = step.lower(carry, self.task.frozen, np.float32(0), batch, large)
        self.programs[batch[0].shape] = program = lowered.compile()
        return program


def _as_wide(batch: Any, shapes: Any) -> Any:
    """A batch with zeros behind, as long as the largest of its kind."""

    def pad(x: np.ndarray, like: Any) -> np.ndarray:
        return np.pad(x, [(0, n - m) for m, n in zip(x.shape, like.shape, strict=True)])

    return jax.tree.map(pad, batch, tuple(shapes))


def bytes_of(program: Any) -> int:
    """What a compiled program takes at once: what goes in, what comes out and has no place there,
    and what is between.
    """
    m = program.memory_analysis()
    sizes = m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes
    return sum(sizes) - m.alias_size_in_bytes


def run(
    trainer: Trainer, seed: int, rate: float, budget: int, seconds: float, num_points: int
) -> list[dict[str, float]]:
    """The points of a run, each with passes, seconds, and what the task evaluates; if there are
    several, with the accuracy on test examples where that on validation examples is the best so
    far.
    """
    num_steps, points, step, spent, best = int(budget / trainer.passes), [], 0, 0.0, 0.0
    rate_of = lambda step: rate * max(LAST_RATE, 1 - (1 - LAST_RATE) * step / num_steps)
    carry = trainer.init(seed)
    while True:
        point = dict(passes=step * trainer.passes, seconds=spent, **trainer.task.evaluate(carry[0]))
        if num_points > 1 and point.get("accuracy", 0) > best:
            best, point["test"] = point["accuracy"], trainer.task.test(carry[0])
        points.append(point)
        is_over = step >= num_steps and spent >= (1 - SLACK) * seconds
        if is_over or step >= 2 * num_steps or not math.isfinite(point["loss"]):
            return points
        part = step * num_points // num_steps + 1
        end = -(-part * num_steps // num_points)
        # Where the seconds will have been taken before that, there is a point too.
        last = int(step * seconds / spent) if spent else 0
        end = last if step < last < end else end
        carry, taken = trainer.take(carry, seed, step, end, rate_of)
        step, spent = end, spent + taken


def tune(score: Callable[[float], float], base: float, num_runs: int) -> dict[float, float]:
    """The scores of rates by a hill climb over their logarithm: by factors of 4, and of 2 and less
    where both neighbours of the best are known.
    """
    known, factor = {base: score(base)}, 4.0
    while len(known) < num_runs:
        best = min(known, key=known.__getitem__)
        unknown = [x for x in (best * factor, best / factor) if x not in known]
        if unknown:
            known[unknown[0]] = score(unknown[0])
        else:
            factor = math.sqrt(factor)
    return known


class Book:
    """The rows that are there, in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = [json.loads(line) for line in path.open()] if path.exists() else []

    def find(self, *key: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["key"] == list(key)), None)

    def add(self, *key: Any, **fields: Any) -> dict[str, Any]:
        self.rows.append(dict(key=list(key)) | fields)
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        return self.rows[-1]


class Comparison:
    """The runs of one task, and its table."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args, self.book = name, args, Book(args.out)
        self.setting = [args.passes, args.tuning_runs, args.layers]

    @functools.cached_property
    def task(self) -> Task:
        """Made when it is first asked for: a table of what is there needs none."""
        return TASKS[self.name](self.args)

    @functools.cached_property
    def seconds(self) -> float:
        """Those that the plain estimate's runs took, in the mean."""
        return float(np.mean([row["points"][-1]["seconds"] for row in self.runs(CONTROL)]))

    @functools.cached_property
    def bytes_of_loss(self) -> int:
        """Of the plain evaluation of the loss on a batch."""
        args = self.task.frozen, jax.eval_shape(self.task.fresh, 0)
        batch = self.task.shapes(self.task.batch_size)[-1]
        return bytes_of(jax.jit(self.task.loss).lower(*args, *batch).compile())

    def runs(self, method: str) -> list[dict[str, Any]]:
        """Those of all seeds, made where they are not there."""
        trainer, found = None, []
        for seed in self.args.seeds:
            key = self.name, method, seed, *self.setting
            row = self.book.find(*key)
            if row is None:
                trainer = trainer or self._trainer(method)
                tuned = self._tuned(method, trainer)
                seconds = 0.0 if method == CONTROL else self.seconds
                rate, points = tuned["rate"], []
                # What a quarter of the budget bears, all of it may not.
                for _ in range(1 + MOST_HALVINGS):
                    points = run(trainer, seed, rate, self.args.passes, seconds, NUM_POINTS)
                    if not is_diverged(points):
                        break
                    rate /= 2
                row = self.book.add(
                    *key,
                    points=points,
                    memory=trainer.memory,
                    relative_memory=trainer.memory / self.bytes_of_loss,
                    batch=trainer.batch_size,
                    passes_of_a_step=trainer.passes,
                    rate=rate,
                    edge=len(tuned["tried"]) > 1
                    and tuned["rate"] in (tuned["tried"][0][0], tuned["tried"][-1][0]),
                )
            found.append(row)
        return found

    def tell(self, method: str) -> str:
        """A row of the table."""
        rows, kind = self.runs(method), METHODS[method]
        first, label, budget = rows[0], kind.label, self.args.passes
        if kind.at_equal_memory:
            more = first["memory"] > self.runs(CONTROL)[0]["memory"]
            label += f" (batch {first['batch']}{', and still more memory' if more else ''})"
        spent = [row["points"][-1]["seconds"] / row["points"][-1]["passes"] for row in rows]
        cells = [
            label,
            f"{first['passes_of_a_step']:.3g}",
            f"{min(row['rate'] for row in rows):.2g}{' (edge)' if first['edge'] else ''}",
            f"{first['relative_memory']:.2f}",
            f"{1000 * np.mean(spent):.1f}",
            *self._values(rows, "passes", budget),
            *self._values(rows, "seconds", self.seconds),
            str(len(rows)),
        ]
        return f"| {' | '.join(cells)} |"

    def header(self) -> str:
        columns = TASKS_TOLD[self.name]
        read = [f"{what}, equal {of}" for of in ("passes", "seconds") for what in columns]
        cells = ["method", "passes a step", "rate", "memory", "ms a pass", *read, "seeds"]
        return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"

    def _values(self, rows: list[dict[str, Any]], budget: str, limit: float) -> list[str]:
        """The cells of the last points within a budget."""
        runs = [
            [one for one in row["points"] if one[budget] <= (1 + SLACK) * limit] for row in rows
        ]
        values = [[one[-1]["loss"] for one in runs]]
        if self.name != "character":
            # Points with a test are those of the best validation accuracy so far.
            values.insert(0, [next(x["test"] for x in one[::-1] if "test" in x) for one in runs])
        failed = sum(is_diverged(one) for one in runs)
        if failed:
            return [f"diverged, {failed} of {len(rows)}"] * len(values)
        digits = [1, 3][-len(values) :]
        return [spread(*pair) for pair in zip(values, digits, strict=True)]

    def draw(self, shown: list[str], path: Path) -> None:
        """Curves of the first seed, by passes and by seconds."""
        figure, axes = plt.subplots(1, 2, figsize=(12, 6), sharey=True)
        colors = plt.get_cmap("tab20").colors
        for i, method in enumerate(shown):
            points = self.runs(method)[0]["points"]
            style = dict(color=colors[i % len(colors)], linestyle="-" if i < len(colors) else "--")
            if method == CONTROL:
                style = dict(color="black", linewidth=2.5)
            for ax, name in zip(axes, ("passes", "seconds"), strict=True):
                x, y = ([one[key] for one in points] for key in (name, "loss"))
                ax.plot(x, y, marker=".", label=METHODS[method].label, **style)
        start = self.runs(CONTROL)[0]["points"][0]["loss"]
        axes[0].set(xlabel="forward passes", ylabel="validation loss")
        axes[0].set_ylim(top=start + 0.2 * abs(start - axes[0].get_ylim()[0]))
        axes[1].set(xlabel="seconds of steps")
        axes[1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
        for ax in axes:
            ax.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)

    def _trainer(self, method: str) -> Trainer:
        at_equal_memory = METHODS[method].at_equal_memory
        limit = self.runs(CONTROL)[0]["memory"] if at_equal_memory else 0
        return Trainer(method, self.task, limit)

    def _tuned(self, method: str, trainer: Trainer) -> dict[str, Any]:
        """The learning rate that a hill climb finds."""
        key = self.name, method, "tuning", *self.setting
        row = self.book.find(*key)

        def score(rate: float) -> float:
            loss = run(trainer, TUNING_SEED, rate, self.args.passes // 4, 0.0, 1)[-1]["loss"]
            return loss if math.isfinite(loss) else math.inf

        if row is None:
            base = METHODS[method].rates[list(TASKS).index(self.name)]
            known = tune(score, base, self.args.tuning_runs)
            best = min(known, key=known.__getitem__)
            row = self.book.add(*key, rate=best, tried=sorted(known.items()))
        return row


def is_diverged(points: list[dict[str, float]]) -> bool:
    """Whether a run ends above its start."""
    return not points[-1]["loss"] <= points[0]["loss"]


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def main() -> None:
    split = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--methods", type=split(str), default=list(METHODS))
    parser.add_argument("--tasks", type=split(str), default=list(TASKS))
    parser.add_argument("--passes", type=int, default=20_000)
    parser.add_argument("--tuning-runs", type=int, default=5)
    parser.add_argument("--seeds", type=split(int), default=[0, 1, 2])
    parser.add_argument("--layers", type=int, default=1, help="of the pretrained model")
    parser.add_argument("--out", type=Path, default=Path("runs/field.jsonl"))
    parser.add_argument(
        "--figure", type=Path, default=Path("runs/field.png"), help="_TASK is added"
    )
    args = parser.parse_args()
    for name, known in (("methods", METHODS), ("tasks", TASKS)):
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name} must be of {', '.join(known)}; got {', '.join(unknown)}")
    for path in (args.out, args.figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    # All are measured against the control.
    shown = [CONTROL, *(name for name in args.methods if name != CONTROL)]
    for name in args.tasks:
        comparison = Comparison(name, args)
        print(f"\n{name}, {args.passes:,} forward passes\n\n{comparison.header()}", flush=True)
        for method in shown:
            print(comparison.tell(method), flush=True)
        comparison.draw(shown, args.figure.with_stem(f"{args.figure.stem}_{name}"))


if __name__ == "__main__":
    main()
