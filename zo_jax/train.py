"""The training loop: `init_state`, the two halves of a step, `train_and_evaluate`.

A zeroth-order step is `project` (parameters, key, batch -> q projections), all the forward passes, and `update` (state,
key, projections -> state), all the optimisation. Keys and batches are functions of (seed, step), so a run that resumes from
(parameters, optimiser state, step) is the run that was not interrupted, bit for bit.
"""

from collections import deque
from collections.abc import Callable
import datetime
from functools import partial
import json
import os
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from zo_jax import estimators, perturbations
from zo_jax.checkpoint import Checkpoints
from zo_jax.config import Config, ConfigError, walk
from zo_jax.data import Corpus, batch_indices, load_corpus
from zo_jax.evaluate import make_evaluate, sample
from zo_jax.losses import next_token_loss
from zo_jax.metrics import MetricsWriter, read_rows
from zo_jax.model import GPT, count_params, init_params, make_model
from zo_jax.optimizers import make_optimizer, make_schedule
from zo_jax.plots import plot_loss

# What a run that goes on may change: how far it goes and what it reports.
_MAY_CHANGE = (
    "train.num_steps train.num_epochs train.log_interval train.eval_interval train.eval_blocks "
    "train.checkpoint_interval train.sample_tokens zo.parallel_batch_size"
).split()


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    step: jax.Array  # int32 scalar: steps done
    params: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device until they are needed."""

    loss: jax.Array
    grad_norm: jax.Array
    num_failed: jax.Array


def init_state(model: GPT, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    params = init_params(model, jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def step_key(seed: int, step: int | jax.Array) -> jax.Array:
    """The key that names the directions of a step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_perturbation(config: Config) -> perturbations.Perturbation:
    """The family of directions that a validated configuration names."""
    if config.zo.perturbation == "low_rank":
        return perturbations.low_rank(config.zo.rank)
    return getattr(perturbations, config.zo.perturbation)()


def _apply(optimizer, state: TrainState, gradient: Any, loss, num_failed):
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss, optax.global_norm(gradient), num_failed)
    return TrainState(state.step + 1, params, opt_state), metrics


def make_zo_step(config: Config, model: GPT, optimizer: optax.GradientTransformation) -> Callable:
    """(state, tokens) -> (state, metrics), the state donated; tokens [B, T], or [q, B, T] with a batch per query."""
    zo, perturbation = config.zo, make_perturbation(config)

    @jax.jit
    def project(params, step, tokens):
        return estimators.project(
            partial(next_token_loss, model),
            params,
            step_key(config.seed, step),
            tokens,
            num_queries=zo.num_queries,
            epsilon=zo.epsilon,
            perturbation=perturbation,
            difference=zo.difference,
            parallel_batch_size=zo.parallel_batch_size,
            batch_per_query=zo.batch_per_query,
        )

    @partial(jax.jit, donate_argnums=0)
    def update(state, loss, projections):
        keys = jax.random.split(step_key(config.seed, state.step), zo.num_queries)
        weights = estimators.mean_weights(projections)
        gradient = perturbation.combine(state.params, keys, weights)
        num_failed = jnp.sum(~jnp.isfinite(projections), dtype=jnp.int32)
        return _apply(optimizer, state, gradient, loss, num_failed)

    def train_step(state, tokens):
        return update(state, *project(state.params, state.step, tokens))

    train_step.jitted = (project, update)
    return train_step


def make_fo_step(config: Config, model: GPT, optimizer: optax.GradientTransformation) -> Callable:
    """(state, tokens [B, T]) -> (state, metrics), the state donated; micro-batches one after another."""
    num_micro = config.fo.gradient_accumulation_steps
    loss_and_gradient = jax.value_and_grad(partial(next_token_loss, model))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, tokens):
        add = lambda total, micro: (
            jax.tree.map(jnp.add, total, loss_and_gradient(state.params, micro)),
            None,
        )
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        micros = tokens.reshape(num_micro, -1, tokens.shape[-1])
        total, _ = jax.lax.scan(add, zeros, micros)
        loss, gradient = jax.tree.map(lambda x: x / num_micro, total)
        return _apply(optimizer, state, gradient, loss, (~jnp.isfinite(loss)).astype(jnp.int32))

    return train_step


def make_batch(config: Config, blocks_NT: np.ndarray, step: int) -> np.ndarray:
    """The tokens of a step, a function of (seed, step) alone: [B, T], or [q, B, T] with a batch per query."""
    size = config.train.batch_size
    per_query = config.mode == "zo" and config.zo.batch_per_query
    count = size * config.zo.num_queries if per_query else size
    tokens = blocks_NT[batch_indices(len(blocks_NT), count, config.seed, step)]
    return tokens.reshape(config.zo.num_queries, size, -1) if per_query else tokens


def run_name(config: Config) -> str:
    """Default name of a run's folder."""
    zo = f"_q{config.zo.num_queries}" if config.mode == "zo" else ""
    optimizer, size = config.optimizer, config.train.batch_size
    return (
        f"{config.mode}_full{zo}_opt{optimizer.name}_lr{optimizer.learning_rate:g}_bs{size}"
        f"_{config.data.source}_seed{config.seed}"
    )


def open_run(config: Config, workdir: Path) -> None:
    """Makes the run folder, or checks that the run in it is this one.

    Raises:
      ConfigError: the folder holds a run of a different configuration.
    """
    path = workdir / "config.json"
    new = {name: value for name, _, value in walk(config)}
    if path.exists():
        old = json.loads(path.read_text())
        free = set(_MAY_CHANGE)
        if config.optimizer.schedule == "cosine":
            free -= {"train.num_steps", "train.num_epochs"}
        changed = [k for k in {**old, **new} if old.get(k) != new.get(k) and k not in free]
        if changed:
            differences = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in changed)
            raise ConfigError(
                f"{workdir} holds a run of another configuration ({differences}); choose another "
                "--workdir, or pass --restart to delete that run"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(new, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class _Counts(NamedTuple):
    """What one step costs."""

    forward_passes: int
    tokens: int


def _step_counts(config: Config) -> _Counts:
    tokens = config.train.batch_size * config.data.block_size
    if config.mode == "fo":
        return _Counts(config.fo.gradient_accumulation_steps, tokens)
    zo = config.zo
    passes = estimators.num_evaluations(zo.num_queries, zo.difference, zo.batch_per_query)
    return _Counts(passes, tokens * (zo.num_queries if zo.batch_per_query else 1))


def _announce(config: Config, model: GPT, corpus: Corpus, num_steps: int, workdir: Path) -> None:
    zo, optimizer, counts = config.zo, config.optimizer, _step_counts(config)
    if config.mode == "zo":
        family = f"{zo.perturbation} (rank {zo.rank})" if zo.rank > 1 else zo.perturbation
        how = (
            f"zeroth order, {zo.num_queries} {family} directions a step, {zo.difference} "
            f"difference, epsilon {zo.epsilon:g}, no backpropagation"
        )
    else:
        how = f"backpropagation, {config.fo.gradient_accumulation_steps} micro-batches a step"
    devices = ", ".join(sorted({d.device_kind for d in jax.devices()}))
    print(
        f"model      GPT, {model.num_layers} layers, {model.num_heads} heads, width {model.width}: "
        f"{count_params(model):,} parameters ({config.model.param_dtype})\n"
        f"data       {corpus.summary}\n"
        f"gradient   {how}\n"
        f"optimizer  {optimizer.name}, learning rate {optimizer.learning_rate:g} "
        f"({optimizer.schedule}), batch of {config.train.batch_size} x {config.data.block_size} tokens\n"
        f"steps      {num_steps:,}, {counts.forward_passes} forward passes and {counts.tokens:,} "
        "tokens each\n"
        f"devices    {jax.device_count()} x {devices}\n"
        f"results    {workdir}",
        flush=True,
    )


def train_and_evaluate(config: Config, workdir: Path) -> float:
    """Runs the experiment, or the rest of it, and returns the last validation loss in nats per token.

    Raises:
      ConfigError, DataError: the configuration cannot be run; raised before anything is compiled.
    """
    corpus = load_corpus(config.data)
    train_NT = corpus.train_NT
    num_steps = config.train.num_steps
    if not num_steps:
        blocks = _step_counts(config).tokens // config.data.block_size
        num_steps = max(1, config.train.num_epochs * len(train_NT) // blocks)
    open_run(config, workdir)
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, num_steps)
    _announce(config, model, corpus, num_steps, workdir)

    state = init_state(model, optimizer, config.seed)
    checkpoints = Checkpoints(workdir / "checkpoints")
    start = checkpoints.latest_step or 0
    if start:
        state = checkpoints.restore(start, state)
        print(f"resumed    from step {start:,}" + (" (complete)" if start >= num_steps else ""))
    eval_batch = min(32, config.train.eval_blocks)
    evaluate = make_evaluate(model, corpus.validation_NT[: config.train.eval_blocks], eval_batch)
    if start < num_steps:
        state = _loop(config, model, optimizer, state, train_NT, evaluate, checkpoints, num_steps, workdir)
        print(f"plot       {plot_loss(workdir)}")
    checkpoints.close()

    validation_loss = float(evaluate(state.params))
    if config.train.sample_tokens:
        prompt_T = jnp.asarray(corpus.validation_NT[0])
        length = config.train.sample_tokens
        tokens = sample(model, state.params, step_key(config.seed, num_steps), prompt_T, length=length)
        text = corpus.tokenizer.decode(np.asarray(tokens))
        _write(workdir / "sample.txt", text)
        print(f"sample     of {length} tokens after a validation block:\n\n{text}\n")
    first = next((row["eval_loss"] for row in read_rows(workdir / "metrics.csv")), "")
    print(f"validation loss {float(first):.6f} -> {validation_loss:.6f} nats per token", flush=True)
    return validation_loss


def _loop(config, model, optimizer, state, train_NT, evaluate, checkpoints, num_steps, workdir):
    """The steps that are left; returns the last state."""
    train, start = config.train, int(state.step)
    make_step = make_zo_step if config.mode == "zo" else make_fo_step
    train_step = make_step(config, model, optimizer)
    writer = MetricsWriter(workdir / "metrics.csv", start if start else -1)
    schedule = make_schedule(config.optimizer, num_steps)
    counts, begin = _step_counts(config), time.monotonic()
    progress = tqdm.tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True)
    failed = 0

    def report(step: int, metrics: StepMetrics | None, eval_loss: jax.Array | None) -> None:
        """Fetches the scalars of a step that is done while the next one runs."""
        nonlocal failed
        row = _row(config, step, len(train_NT), counts)
        row["seconds"] = round(time.monotonic() - begin, 3)
        if metrics is not None:
            metrics = StepMetrics(*(x.item() for x in metrics))
            failed += metrics.num_failed
            row.update(loss=metrics.loss, grad_norm=metrics.grad_norm)
            row["current_lr"] = float(schedule(jnp.asarray(step - 1)))
            rate = (step - start) * counts.tokens / max(row["seconds"], 1e-9)
            postfix = dict(
                loss=f"{metrics.loss:.3f}",
                lr=f"{row['current_lr']:.2e}",
                grad=f"{metrics.grad_norm:.2f}",
                tok_s=f"{rate:,.0f}",
                forward=f"{row['forward_passes']:,}",
            )
            if failed:
                postfix["not_finite"] = failed
            progress.set_postfix(postfix, refresh=False)
        if eval_loss is not None:
            row["eval_loss"] = eval_loss.item()
        writer.write(row)

    if start == 0:
        report(0, None, evaluate(state.params))
    pending: deque = deque()
    for step in range(start + 1, num_steps + 1):
        state, metrics = train_step(state, make_batch(config, train_NT, step - 1))
        progress.update()
        last = step == num_steps
        is_eval = last or step % train.eval_interval == 0
        if is_eval or step % train.log_interval == 0:
            pending.append((step, metrics, evaluate(state.params) if is_eval else None))
        # The row of an earlier step is fetched only now that the next one is under way.
        while pending and (pending[0][0] < step or last):
            report(*pending.popleft())
        if last or step % train.checkpoint_interval == 0:
            while pending:
                report(*pending.popleft())
            checkpoints.save(step, state)
    progress.close()
    writer.close()
    if failed:
        print(f"not finite {failed} losses were left out; lower the learning rate or epsilon")
    return state


def _row(config: Config, step: int, num_blocks: int, counts: _Counts) -> dict[str, Any]:
    """The columns of a row that do not depend on what was measured."""
    is_fo, train = config.mode == "fo", config.train
    accumulation = config.fo.gradient_accumulation_steps
    return {
        "timestamp": datetime.datetime.now().isoformat(timespec="seconds"),
        "epoch": step * counts.tokens // config.data.block_size // num_blocks,
        "step": step,
        "mode": config.mode,
        "scope": "full",
        "q": "" if is_fo else config.zo.num_queries,
        "initial_lr": config.optimizer.learning_rate,
        "batch_size": train.batch_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "effective_batch_size": train.batch_size,
        "optimizer": config.optimizer.name,
        "forward_passes": step * counts.forward_passes,
        "tokens": step * counts.tokens,
    }
