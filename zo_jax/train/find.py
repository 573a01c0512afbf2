"""Settings that are found by measurement before the first step: a perturbation size and a learning
rate.
"""

import copy
from typing import Any

import jax

from zo_jax import lines
from zo_jax.layout import Layout
from zo_jax.probe import probe
from zo_jax.train import processes
from zo_jax.train.choices import base_key, make_estimator, scope_of
from zo_jax.train.config import Config
from zo_jax.train.optimizers import make_optimizer, make_schedule
from zo_jax.train.run_folder.folder import Workdir
from zo_jax.train.settings import replace_value, walk
from zo_jax.train.steps import make_loss
from zo_jax.train.subject import Subject
from zo_jax.update import Update

EPSILON, RATE = "zo.epsilon", "optimizer.learning_rate"


def find_settings(
    config: Config, subject: Subject, folder: Workdir, layout: Layout | None
) -> Config:
    """The configuration with numbers where it says auto: those that the run began with, or those
    that are measured now.
    """
    names = [name for name, value in walk(config) if value == "auto" and name in (EPSILON, RATE)]
    if not names:
        return config
    if not set(names) <= folder.found.keys():
        measured = _measure(config, names, subject, layout)
        folder.keep_found(processes.first_tells(lambda: measured))
    return _replaced(config, {name: folder.found[name] for name in names})


def _measure(
    config: Config, names: list[str], subject: Subject, layout: Layout | None
) -> dict[str, float]:
    model, task = subject.model, subject.task
    # Numbers that stand in the places of those that are looked for.
    known = _replaced(config, dict.fromkeys(names, 1e-3))
    estimator, scope = make_estimator(known, layout, model), scope_of(config, model)
    params = model.start(jax.random.fold_in(base_key(config), 2**31), layout)
    loss, trained = make_loss(model, scope, task.loss)(params), scope.select(params)
    key = jax.random.fold_in(base_key(config), 2**31 + 3)
    batches = lambda step: (task.batches(step, layout)[0],)
    processes.say("measuring the loss, to find " + " and ".join(names))
    if RATE not in names:
        line = lines.look_along(estimator, loss, trained, key, *batches(0))
        return {EPSILON: float(lines.best_epsilon(line, estimator.difference))}

    def at_rate(rate: Any) -> Update:
        constant = _replaced(known, {RATE: rate, "optimizer.schedule": "constant"})
        optimizer = make_optimizer(constant.optimizer, config.train.num_steps)
        return Update(optimizer, rounding=config.optimizer.rounding, layout=layout)

    course = _replaced(known, {RATE: 1.0, "optimizer.min_learning_rate": 0.0})
    found = probe(
        loss,
        trained,
        key,
        num_steps=config.train.num_steps,
        optimizer=at_rate,
        schedule=make_schedule(course.optimizer, config.train.num_steps),
        batch_fn=batches,
        estimator=estimator,
        epsilon=None if EPSILON in names else config.zo.epsilon,
        report=lambda text: processes.say(f"  {text}"),
    )
    processes.say(found.reasons)
    values = {EPSILON: found.epsilon, RATE: found.learning_rate}
    return {name: values[name] for name in names}


def _replaced(config: Config, values: dict[str, Any]) -> Config:
    config = copy.deepcopy(config)
    for name, value in values.items():
        replace_value(config, name, value)
    return config
