"""Training: a step is `project`, all the forward passes, and `update`, all the optimisation.

Axes: B blocks of a batch, T tokens of a block, q queries.
"""

from collections.abc import Callable
from pathlib import Path
import time
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from zo_jax import checkpoint, estimators, evaluate, metrics, perturbations, plots
from zo_jax.config import Config, ConfigError, blocks_per_step
from zo_jax.data import Corpus, batch_indices, load_corpus
from zo_jax.losses import next_token_loss
from zo_jax.model import GPT, init_params, make_model
from zo_jax.optimizers import make_optimizer, make_schedule
from zo_jax.validation import resolve, validate
from zo_jax.workdir import claim_workdir


class TrainState(NamedTuple):
    """All that a run changes. Keys and batches are functions of the seed and the step.

    Attributes:
      step: int32, steps taken.
      params: the model's parameters.
      opt_state: optax's state.
      num_skipped: int32, those of the steps that changed nothing, for want of a finite loss.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    num_skipped: jax.Array


class StepMetrics(NamedTuple):
    """Of one step: float32 scalars, and the running count of skipped steps."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    num_skipped: jax.Array


def make_perturbation(config: Config) -> perturbations.Perturbation:
    """The family of directions that the configuration names."""
    if config.zo.perturbation == "low_rank":
        return perturbations.low_rank(config.zo.rank)
    return getattr(perturbations, config.zo.perturbation)()


def init_state(config: Config, model: GPT) -> TrainState:
    """Fresh parameters and optimiser state, from the seed alone."""
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)

    @jax.jit
    def init(key):
        params = init_params(model, key)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, optimizer.init(params), jnp.zeros_like(zero))

    return init(jax.random.fold_in(base_key(config), 2**31))


def base_key(config: Config) -> jax.Array:
    """The run's key: threefry whatever JAX's default is, since its noise is the same under vmap."""
    return jax.random.key(config.seed, impl="threefry2x32")


def make_project(config: Config, model: GPT) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted forward passes of a step: (params, key, tokens) -> (loss, projections [q]).

    Tokens are int32 [B, T], or [q, B, T] with `zo.batch_per_query`. A query whose loss is not
    finite has the projection nan.
    """
    perturbation = make_perturbation(config)

    @jax.jit
    def project(params: Any, key: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return estimators.project(
            lambda params, tokens_BT: next_token_loss(model, params, tokens_BT),
            params,
            key,
            tokens,
            num_queries=config.zo.num_queries,
            epsilon=config.zo.epsilon,
            perturbation=perturbation,
            difference=config.zo.difference,
            parallel_batch_size=config.zo.parallel_batch_size,
            batch_per_query=config.zo.batch_per_query,
        )

    return project


def make_update(config: Config) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted optimisation of a step: (state, key, loss, projections [q]) -> (state, metrics).

    The gradient is summed again from the key; the data has no part in it but the projections. The
    state is donated.
    """
    perturbation = make_perturbation(config)

    def update(
        state: TrainState, key: jax.Array, loss: jax.Array, projections_q: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        keys = jax.random.split(key, config.zo.num_queries)
        weights = estimators.mean_weights(projections_q)
        gradient = perturbation.combine(state.params, keys, weights)
        return _descend(config, state, loss, gradient, jnp.any(jnp.isfinite(projections_q)))

    return jax.jit(update, donate_argnums=0)


def make_fo_step(config: Config, model: GPT) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted backprop step: (state, tokens [B, T]) -> (state, metrics), the state donated."""
    num_parts = config.fo.gradient_accumulation_steps
    loss_and_grad = jax.value_and_grad(
        lambda params, tokens_BT: next_token_loss(model, params, tokens_BT)
    )

    def fo_step(state: TrainState, tokens_BT: jax.Array) -> tuple[TrainState, StepMetrics]:
        B, T = tokens_BT.shape

        def add_part(total, part_BT):
            one = loss_and_grad(state.params, part_BT)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, one), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        parts = tokens_BT.reshape(num_parts, B // num_parts, T)
        total, _ = jax.lax.scan(add_part, (jnp.zeros((), jnp.float32), zeros), parts)
        loss, gradient = jax.tree.map(lambda x: x / num_parts, total)
        return _descend(config, state, loss, gradient, jnp.isfinite(loss))

    return jax.jit(fo_step, donate_argnums=0)


def _descend(
    config: Config, state: TrainState, loss: jax.Array, gradient: Any, usable: jax.Array
) -> tuple[TrainState, StepMetrics]:
    """One optimiser step, or, if the gradient is not usable, only the count of it."""
    grad_norm = optax.global_norm(jax.tree.map(lambda x: x.astype(jnp.float32), gradient))
    usable &= jnp.isfinite(grad_norm)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Adam's momentum would move the parameters with a zero gradient too.
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(usable, new, old).astype(old.dtype),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    # Skipped steps do not count for optax, so its schedule is behind by as many.
    schedule = make_schedule(config.optimizer, config.train.num_steps)
    learning_rate = schedule(state.step - state.num_skipped).astype(jnp.float32)
    num_skipped = state.num_skipped + (~usable).astype(jnp.int32)
    state = TrainState(state.step + 1, params, opt_state, num_skipped)
    return state, StepMetrics(loss, grad_norm, learning_rate, num_skipped)


def make_train_step(
    config: Config, model: GPT
) -> Callable[[TrainState, jax.Array, np.ndarray], tuple[TrainState, StepMetrics]]:
    """The step of the configured mode: (state, key of the step, tokens) -> (state, metrics)."""
    if config.mode == "fo":
        fo_step = make_fo_step(config, model)
        return lambda state, key, tokens: fo_step(state, tokens)
    project, update = make_project(config, model), make_update(config)

    def zo_step(state, key, tokens):
        return update(state, key, *project(state.params, key, tokens))

    return zo_step


def read_batch(config: Config, train_NT: np.ndarray, step: int) -> np.ndarray:
    """The tokens of a step: int32 [B, T], or [q, B, T] with `zo.batch_per_query`."""
    indices = batch_indices(len(train_NT), blocks_per_step(config), config.seed, step)
    tokens = train_NT[indices]
    if config.mode == "zo" and config.zo.batch_per_query:
        return tokens.reshape(config.zo.num_queries, config.train.batch_size, -1)
    return tokens


def train_and_evaluate(config: Config, workdir: Path, restart: bool = False) -> dict[str, float]:
    """Trains in a run folder, or continues what it holds, and reports in it and on stdout.

    Args:
      config: the experiment.
      workdir: the run folder, made if it is not there.
      restart: delete the run that the folder holds first.

    Returns:
      step, loss (of the last step's batch) and eval_loss at the end.

    Raises:
      ConfigError: the configuration is impossible, or the folder holds another run.
      DataError: there is no such corpus.
      CheckpointError: the run's checkpoints cannot be read.
    """
    validate(config)
    corpus = load_corpus(config.data)
    queries = config.zo.num_queries, config.zo.parallel_batch_size
    config = resolve(config, len(corpus.train_NT))
    if queries[1] > queries[0]:
        print(
            f"zo.parallel_batch_size={queries[1]} is more than the queries: taken as {queries[0]}"
        )
    workdir = Path(workdir).expanduser()
    claim_workdir(config, corpus, workdir, restart)
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    print(metrics.describe(config, corpus, model, workdir), flush=True)

    evaluate_fn = evaluate.make_evaluate(model)
    held_out = evaluate.choose_blocks(corpus.validation_NT, config.train.eval_blocks)
    evaluate_params = lambda params: float(evaluate_fn(params, held_out))
    num_steps = config.train.num_steps
    with checkpoint.open_checkpoints(workdir / "checkpoints") as checkpoints:
        state = init_state(config, model)
        start = 0
        if restored := checkpoint.restore_latest(checkpoints, state):
            start, state = restored
        if start > num_steps:
            raise ConfigError(
                f"the run in {workdir} is at step {start}, past train.num_steps={num_steps}; raise "
                "it, use --restart to train from scratch, or another --workdir"
            )
        with metrics.open_log(workdir / "metrics.csv", start) as log:
            if start == num_steps:
                print(f"this run is complete: {start} of {num_steps} steps; nothing to train")
            else:
                if start:
                    print(f"continuing from the checkpoint of step {start}")
                state = _train(
                    config, corpus, model, state, start, evaluate_params, checkpoints, log
                )
    eval_loss = evaluate_params(state.params)
    rows = metrics.read(workdir / "metrics.csv")
    loss = next((float(row["loss"]) for row in reversed(rows) if row["loss"]), float("nan"))
    plots.plot_losses(rows, workdir / "loss_curve.png", workdir.name)
    print(
        f"finished {num_steps} steps: training loss {loss:.6f} (last batch), validation loss "
        f"{eval_loss:.6f} nats per token"
    )
    if int(state.num_skipped):
        print(f"{int(state.num_skipped)} of the steps changed nothing: their loss was not finite")
    if config.train.sample_tokens:
        text = evaluate.sample_text(
            model,
            state.params,
            corpus,
            jax.random.fold_in(base_key(config), 2**31 + 1),
            config.train.sample_tokens,
            config.train.sample_temperature,
        )
        metrics.write_atomic(workdir / "sample.txt", text + "\n")
        print(f"a sample of its text:\n{'-' * 40}\n{text}\n{'-' * 40}")
    print(f"results are in {workdir}")
    return dict(step=num_steps, loss=loss, eval_loss=eval_loss)


def _train(
    config: Config,
    corpus: Corpus,
    model: GPT,
    state: TrainState,
    start: int,
    evaluate_params: Callable[[Any], float],
    checkpoints: Any,
    log: IO[str],
) -> TrainState:
    """The loop. It waits for the device one step behind, so that the device never waits for it."""
    train, num_steps = config.train, config.train.num_steps
    train_step = make_train_step(config, model)
    step_key = jax.jit(jax.random.fold_in)
    key = base_key(config)
    tokens_per_step = blocks_per_step(config) * corpus.train_NT.shape[1]
    row_of = lambda step: metrics.make_row(config, step, len(corpus.train_NT), tokens_per_step)
    began = None

    if start == 0:
        eval_loss = evaluate_params(state.params)
        metrics.write_row(log, row_of(0) | {"eval_loss": eval_loss})
        print(f"validation loss before training: {eval_loss:.6f} nats per token", flush=True)

    bar = tqdm.tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True)

    def report(step: int, pending: StepMetrics, eval_loss: float | None = None) -> None:
        last = jax.device_get(pending)
        nonlocal began
        # Compilation is in the first step, and not in the rate.
        began = began or time.monotonic()
        rate = (step - start - 1) * tokens_per_step / max(time.monotonic() - began, 1e-9)
        bar.update(step - bar.n)
        bar.set_postfix_str(
            f"loss {last.loss:.4f}, lr {last.learning_rate:.2e}, |g| {last.grad_norm:.3g}, "
            f"{rate:,.0f} tokens/s, {step * metrics.passes_per_step(config):,} passes",
            refresh=False,
        )
        if step % train.log_interval == 0 or eval_loss is not None or step == num_steps:
            row = row_of(step) | {
                "current_lr": float(last.learning_rate),
                "loss": float(last.loss),
                "grad_norm": float(last.grad_norm),
                "skipped_steps": int(last.num_skipped),
            }
            metrics.write_row(log, row | ({} if eval_loss is None else {"eval_loss": eval_loss}))

    with bar:
        pending = None
        for step in range(start + 1, num_steps + 1):
            tokens = read_batch(config, corpus.train_NT, step - 1)
            state, new = train_step(state, step_key(key, step - 1), tokens)
            if pending:
                report(step - 1, pending)
            pending = new
            at_end = step == num_steps
            if step % train.eval_interval == 0 or at_end:
                report(step, pending, evaluate_params(state.params))
                pending = None
            if step % train.checkpoint_interval == 0 or at_end:
                # Rows first: then a checkpoint never knows more than metrics.csv.
                if pending:
                    report(step, pending)
                    pending = None
                checkpoint.save(checkpoints, step, state)
    return state
