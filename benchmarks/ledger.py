"""What a ledger costs and gives: bytes a step against a checkpoint's, and the speed of replay
against training.

python benchmarks/ledger.py               two minutes on 2 CPU cores
"""

import argparse
from pathlib import Path
import statistics
import tempfile
import time

import jax
import numpy as np

from configs import zo_plain
from zo_jax import ledger
from zo_jax.train import run_state, steps
from zo_jax.train.config import Config, ModelConfig, OptimizerConfig, ZOConfig
from zo_jax.train.data import batches
from zo_jax.train.model import make_model
from zo_jax.train.run_folder import checkpoint, resume
from zo_jax.train.validation import resolve


def sizes() -> None:
    """Bytes of a record, and of the state that a checkpoint holds."""
    print("| model | queries | ledger, bytes a step | checkpoint, bytes | steps of ledger in it |")
    print("|---|---|---|---|---|")
    for size, optimizer in (("20M", "sgd"), ("20M", "adam"), ("1B", "sgd"), ("1B", "adam")):
        for q in (8, 64):
            config = Config(
                model=ModelConfig(size=size),
                optimizer=OptimizerConfig(name=optimizer),
                zo=ZOConfig(num_queries=q),
            )
            model = make_model(config.model, 50257)
            state = jax.eval_shape(lambda c=config, m=model: run_state.init_state(c, m))
            whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            record = ledger.record_dtype(q).itemsize
            print(f"| {size}, {optimizer} | {q} | {record} | {whole:,} | {whole // record:,} |")


def on_disk() -> None:
    """The same, as written for the 20M model: files on the disk."""
    config = Config(model=ModelConfig(size="20M"), optimizer=OptimizerConfig(name="adam"))
    state = run_state.init_state(config, make_model(config.model, 50257))
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.open_checkpoints(Path(folder), keep=1) as checkpoints:
            checkpoints.save(0, state)
            checkpoints.wait()
            began = time.perf_counter()
            checkpoints.save(1, state)
            blocked = time.perf_counter() - began
            checkpoints.wait()
            seconds = time.perf_counter() - began
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        total = sum(path.stat().st_size for path in files)
    print(
        f"a checkpoint of 20M with Adam at step 0: {total:,} bytes on the disk (zeros compress); "
        f"the loop waits "
        f"{blocked:.2f} of the {seconds:.2f} s that it takes"
    )


def speed(rounds: int, num_steps: int) -> None:
    """Training and replay of the same steps of configs/zo_plain.py, turn by turn."""
    config = zo_plain.get_config()
    corpus = batches.load_corpora(config)
    config = resolve(config, len(corpus.train_NT))
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    train_step, update = steps.make_train_step(config, model), steps.make_update(config, model)
    state = run_state.init_state(config, model)
    step, training, replaying, appending = 0, [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ledger.FILE
        writer = ledger.Writer(path, resume.run_header(config, model, state))
        for _ in range(rounds + 1):  # the first one compiles
            before = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
            began, first, appended = time.perf_counter(), step, 0.0
            for _ in range(num_steps):
                tokens, _ = batches.read_batches(config, corpus.train_NT, step)
                state, _, record = train_step(state, step, tokens, None)
                step += 1
                record = jax.device_get(record)
                at = time.perf_counter()
                writer.append(step, ledger.REPLAYABLE, *record)
                appended += time.perf_counter() - at
            jax.block_until_ready(state)
            training.append(time.perf_counter() - began)
            appending.append(appended)
            there = ledger.read(path)
            began = time.perf_counter()
            for record in there.records[first:step]:
                before, _ = update(before, *ledger.arguments(record))
            jax.block_until_ready(before)
            replaying.append(time.perf_counter() - began)
            same = jax.tree.map(np.array_equal, before, state)
            assert jax.tree.all(same), "the replay differs"
    train_ms, replay_ms, append_us = (
        statistics.median(seconds[1:]) / num_steps * scale
        for seconds, scale in ((training, 1e3), (replaying, 1e3), (appending, 1e6))
    )
    print(
        f"configs/zo_plain.py: {train_ms:.2f} ms a step to train, {replay_ms:.3f} ms to replay, "
        f"{train_ms / replay_ms:.0f} "
        f"times faster and equal to the bit; {append_us:.0f} us to append a record "
        f"(medians of {rounds} turns of {num_steps} steps)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=150, help="of each turn")
    options = parser.parse_args()
    sizes()
    on_disk()
    speed(options.rounds, options.num_steps)


if __name__ == "__main__":
    main()
