"""What a run tells and leaves behind when it is finished."""

import json
from typing import Any

import jax

from zo_jax.atomic import write_atomic
from zo_jax.layout import Layout
from zo_jax.models import lora
from zo_jax.train import describe, evaluate, processes, summary
from zo_jax.train.choices import base_key
from zo_jax.train.config import Config
from zo_jax.train.run_folder import checkpoint, metrics
from zo_jax.train.run_folder.folder import Workdir
from zo_jax.train.run_state import RunState, init_state, kept_part
from zo_jax.train.subject import Subject
from zo_jax.train.tasks.prompted import PromptedTask
from zo_jax.train.tasks.reward import RewardTask
from zo_jax.train.tools import plots


def finish(
    config: Config, subject: Subject, state: RunState, folder: Workdir, layout: Layout | None
) -> dict[str, float]:
    """Draws the curve, writes a sample or tests the model, and says how the run ended.

    Returns:
      step, loss (of the last step's batch), and what is measured of the last state.
    """
    model, task, path = subject.model, subject.task, folder.path
    results, num_steps = task.evaluate(state.params), int(state.step)
    skipped = int(state.train.num_skipped)
    text = tested = None
    samples, num_flat = task.samples, 0 if state.num_flat is None else int(state.num_flat)
    if isinstance(task, PromptedTask | RewardTask):
        state, tested = _test(config, model, task, state, folder, layout)
    elif config.train.sample_tokens:  # by all processes, which hold the parameters together
        key = jax.random.fold_in(base_key(config), 2**31 + 1)
        text = evaluate.sample_text(model, state.params, task.corpus, key, config.train)
    rows = metrics.read(path / "metrics.csv")
    loss = next((float(row["loss"]) for row in reversed(rows) if row["loss"]), float("nan"))
    processes.say_goodbye()
    if processes.is_first():
        plots.plot_losses(rows, path / "loss_curve.png", path.name)
        print(
            f"finished {num_steps} steps: training loss {loss:.6f} (last batch), validation "
            f"loss {describe.tell_results(results, task.unit)}"
        )
        if table := summary.tabulate(rows, task.measure):
            print(table)
        for sample in samples:
            print(sample)
        if num_flat:
            print(describe.tell_flat(num_steps, num_flat))
        if isinstance(task, RewardTask) and task.reward.num_failed:
            print(f"the reward failed for {task.reward.num_failed} completions of this session")
        if skipped:
            print(f"{skipped} of the steps changed nothing: their loss was not finite")
        if tested:
            write_atomic(path / "results.json", json.dumps({"test": tested}, indent=2) + "\n")
            for name, measured in tested.items():
                print(f"test loss, {name}: {describe.tell_results(measured, task.unit)}")
        if config.scope == "lora":
            lora.save(path / "adapter", model.model, state.params["lora"])
            print(f"the factors are in {path / 'adapter'}, in PEFT's format")
        if text is not None:
            write_atomic(path / "sample.txt", text + "\n")
            print(f"a sample of its text:\n{'-' * 40}\n{text}\n{'-' * 40}")
        print(f"results are in {path}")
    return {"step": num_steps, "loss": loss, **results}


def _test(
    config: Config,
    model: Any,
    task: PromptedTask | RewardTask,
    state: RunState,
    folder: Workdir,
    layout: Layout | None,
) -> tuple[RunState, dict[str, dict[str, float]]]:
    """The best state, or the last if none better was kept; and what is measured on the test
    examples: at the start, of the best state and of the last. One state exists at a time.
    """
    measure = lambda state: task.evaluate_part(state.params, task.test)
    num_steps, path = int(state.step), folder.path / "best"
    best = max(checkpoint.complete_steps(path), default=num_steps)
    if task.test is None and best == num_steps:
        return state, {}
    tested = {f"last (step {num_steps})": measure(state)} if task.test else {}
    for array in jax.tree.leaves(state):
        array.delete()
    state = init_state(config, model, layout)
    if task.test:
        tested = {"before": measure(state)} | tested
    load = lambda path, step: checkpoint.restore(
        path, step, state, folder.identity, kept_part(config, model), give_up=True
    )
    if best == num_steps:
        return load(folder.path / "checkpoints", num_steps), tested
    state = load(path, best)
    if task.test:
        tested[f"best (step {best})"] = measure(state)
    return state, tested
