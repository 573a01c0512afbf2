"""The training loop: batches in, steps, reports, checkpoints.

Axes: N blocks of a corpus, B blocks of a batch, T tokens of a block, q queries.
"""

from collections.abc import Callable
import contextlib
from pathlib import Path
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from zo_jax import checkpoint, evaluate, metrics, plots
from zo_jax.config import Config, ConfigError, blocks_per_step
from zo_jax.data import Corpus, batch_indices, load_blocks, load_corpus
from zo_jax.model import GPT, make_model
from zo_jax.steps import (
    StepMetrics,
    TrainState,
    base_key,
    count_trained,
    init_state,
    make_train_step,
    reads,
)
from zo_jax.validation import resolve, validate
from zo_jax.workdir import claim_workdir


def read_batches(
    config: Config, train_NT: np.ndarray, step: int, fo_NT: np.ndarray | None = None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The tokens of a step (from 0): int32 [B, T] for its queries, or [q, B, T] with `zo.batch_per_query`, and for backprop.

    None where the step does not read them.
    """
    for_queries, for_backprop = reads(config, step)
    zo_NT, own_NT = split_corpus(config, train_NT)
    fo_NT = own_NT if fo_NT is None else fo_NT
    tokens = fo_tokens = None
    if for_queries:
        tokens = zo_NT[batch_indices(len(zo_NT), blocks_per_step(config), config.seed, step)]
        if config.zo.batch_per_query:
            tokens = tokens.reshape(config.zo.num_queries, config.train.batch_size, -1)
    if for_backprop:
        size = config.fo.batch_size or config.train.batch_size
        fo_tokens = fo_NT[batch_indices(len(fo_NT), size, config.seed, step)]
    return tokens, fo_tokens


def split_corpus(config: Config, train_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blocks for queries and those for backprop: all of them for both, or disjoint parts."""
    if not config.fo.corpus_fraction:
        return train_NT, train_NT
    num_fo = min(max(round(len(train_NT) * config.fo.corpus_fraction), 1), len(train_NT) - 1)
    return train_NT[num_fo:], train_NT[:num_fo]


def _load_corpora(config: Config) -> Corpus:
    """The run's corpus, with those that backprop and evaluation have of their own in their places."""
    corpus, fo, train = load_corpus(config.data), config.fo, config.train
    load = lambda *source: load_blocks(config.data, *source, corpus.tokenizer)
    if fo.source:
        corpus = corpus._replace(fo_NT=load(fo.source, fo.path, fo.max_samples))
    if train.eval_source:
        blocks_NT = load(train.eval_source, train.eval_path, train.eval_max_samples)
        corpus = corpus._replace(validation_NT=blocks_NT)
    return corpus


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
    corpus = _load_corpora(config)
    queries = config.zo.num_queries, config.zo.parallel_batch_size
    config = resolve(config, len(corpus.train_NT))
    if queries[1] > queries[0]:
        print(
            f"zo.parallel_batch_size={queries[1]} is more than the queries: taken as {queries[0]}"
        )
    workdir = Path(workdir).expanduser()
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    num_trained = count_trained(config, model)
    claim_workdir(config, corpus, workdir, restart)
    print(metrics.describe(config, corpus, model, num_trained, workdir), flush=True)

    evaluate_fn = evaluate.make_evaluate(model)
    held_out = evaluate.choose_blocks(corpus.validation_NT, config.train.eval_blocks)
    evaluate_params = lambda params: float(evaluate_fn(params, held_out))
    num_steps = config.train.num_steps
    with contextlib.ExitStack() as stack:
        open_folder = lambda name, **keep: stack.enter_context(
            checkpoint.open_checkpoints(workdir / name, **keep)
        )
        checkpoints = open_folder("checkpoints")
        snapshots = open_folder("snapshots", keep=None) if config.train.snapshot_delta else None
        state = init_state(config, model)
        start = 0
        if restored := checkpoint.restore_latest(checkpoints, state):
            start, state = restored
        if start > num_steps:
            raise ConfigError(
                f"the run in {workdir} is at step {start}, past train.num_steps={num_steps}; raise "
                "it, use --restart to train from scratch, or another --workdir"
            )
        with metrics.Log(workdir, start) as log:
            if start == num_steps:
                print(f"this run is complete: {start} of {num_steps} steps; nothing to train")
            else:
                if start:
                    print(f"continuing from the checkpoint of step {start}")
                rows = metrics.read(workdir / "metrics.csv")
                before = [float(row["eval_loss"]) for row in rows if row["eval_loss"]]
                keep = _SnapshotKeeper(config.train.snapshot_delta, before, snapshots)
                state = _train(
                    config, corpus, model, state, start, evaluate_params, checkpoints, keep, log
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


class _SnapshotKeeper:
    """Keeps a snapshot each time the validation loss has fallen by another `delta` below the first."""

    def __init__(self, delta: float, eval_losses: list[float], snapshots: Any):
        self.delta, self.eval_losses, self.snapshots = delta, eval_losses, snapshots

    def __call__(self, step: int, state: TrainState, eval_loss: float) -> None:
        if not self.delta:
            return
        before = self._level()
        self.eval_losses.append(eval_loss)
        if self._level() > before:
            checkpoint.save(self.snapshots, step, state)

    def _level(self) -> int:
        losses = [loss for loss in self.eval_losses if np.isfinite(loss)]
        return int((losses[0] - min(losses)) / self.delta) if losses else 0


def _train(
    config: Config,
    corpus: Corpus,
    model: GPT,
    state: TrainState,
    start: int,
    evaluate_params: Callable[[Any], float],
    checkpoints: Any,
    keep_snapshot: Callable[[int, TrainState, float], None],
    log: metrics.Log,
) -> TrainState:
    """The loop. It waits for the device one step behind, so that the device never waits for it."""
    train, num_steps = config.train, config.train.num_steps
    train_step = make_train_step(config, model)
    block_size = corpus.train_NT.shape[1]
    row_of = lambda step: metrics.make_row(config, step, len(corpus.train_NT), block_size)
    began = None

    if start == 0:
        eval_loss = evaluate_params(state.params)
        log.write(row_of(0) | {"eval_loss": eval_loss})
        keep_snapshot(0, state, eval_loss)
        print(f"validation loss before training: {eval_loss:.6f} nats per token", flush=True)

    # In a log file every refresh is a line.
    refresh = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm.tqdm(
        total=num_steps, initial=start, unit="step", dynamic_ncols=True, mininterval=refresh
    )

    def report(step: int, pending: StepMetrics, eval_loss: float | None = None) -> None:
        last = jax.device_get(pending)
        nonlocal began
        # Compilation is in the first step, and not in the rate.
        began = began or time.monotonic()
        blocks = metrics.blocks_until(config, step) - metrics.blocks_until(config, start + 1)
        rate = blocks * block_size / max(time.monotonic() - began, 1e-9)
        bar.update(step - bar.n)
        bar.set_postfix_str(
            f"loss {last.loss:.4f}, lr {last.learning_rate:.2e}, |g| {last.grad_norm:.3g}, "
            f"{rate:,.0f} tokens/s, {metrics.passes_until(config, step):,} passes",
            refresh=False,
        )
        if step % train.log_interval == 0 or eval_loss is not None or step == num_steps:
            row = row_of(step) | {
                "current_lr": float(last.learning_rate),
                "loss": float(last.loss),
                "grad_norm": float(last.grad_norm),
                "skipped_steps": int(last.num_skipped),
            }
            if not np.isnan(last.cosine_target):
                row["instruct_cosine_target"] = float(last.cosine_target)
                row["instruct_noise_scale"] = float(last.noise_scale)
            log.write(row | ({} if eval_loss is None else {"eval_loss": eval_loss}))

    with bar:
        pending = None
        for step in range(start + 1, num_steps + 1):
            batches = read_batches(config, corpus.train_NT, step - 1, corpus.fo_NT)
            state, new = train_step(state, step - 1, *batches)
            if pending:
                report(step - 1, pending)
            pending = new
            at_end = step == num_steps
            if step % train.eval_interval == 0 or at_end:
                eval_loss = evaluate_params(state.params)
                report(step, pending, eval_loss)
                keep_snapshot(step, state, eval_loss)
                pending = None
            if step % train.checkpoint_interval == 0 or at_end:
                # Rows first: then a checkpoint never knows more than metrics.csv.
                if pending:
                    report(step, pending)
                    pending = None
                checkpoint.save(checkpoints, step, state)
    return state
