"""What a run says of itself: metrics.csv, and its plan in plain words."""

import csv
import datetime
import io
import os
from pathlib import Path
from typing import IO, Any

import jax

from zo_jax import estimators
from zo_jax.config import Config, blocks_per_step
from zo_jax.data import Corpus
from zo_jax.model import GPT, count_params

COLUMNS = (
    "timestamp",
    "epoch",
    "step",
    "mode",
    "scope",
    "q",
    "initial_lr",
    "current_lr",
    "batch_size",
    "gradient_accumulation_steps",
    "effective_batch_size",
    "optimizer",
    "bp_interval",
    "loss",
    "grad_norm",
    "instruct_cosine_target",
    "instruct_noise_scale",
    "eval_loss",
    "forward_passes",
    "tokens",
    "skipped_steps",
)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that, killed at any moment, the old one or the new one is there, whole."""
    new = path.with_name(path.name + ".tmp")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(new, path)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, less what a killed run left unfinished.

    A row is finished when its line is: it ends in a newline and has a cell for every column.
    """
    if not path.is_file():
        return []
    # The part after the last newline was never finished: it is empty, or a torn line.
    lines = path.read_text(errors="replace").split("\n")[:-1]
    rows = list(csv.reader(lines))
    if not rows or tuple(rows[0]) != COLUMNS:
        return []
    full = [dict(zip(COLUMNS, row, strict=True)) for row in rows[1:] if len(row) == len(COLUMNS)]
    return [row for row in full if row["step"].isdigit()]


def open_log(path: Path, last_step: int) -> IO[str]:
    """Opens metrics.csv to append to, after dropping the rows past `last_step`.

    Those rows are of steps that a killed run took after its last checkpoint, and that will be
    taken again.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in read(path) if int(row["step"]) <= last_step)
    write_atomic(path, text.getvalue())
    return path.open("a")


def write_row(file: IO[str], row: dict[str, Any]) -> None:
    """Appends a row, stamped with the time; columns that the row lacks stay empty.

    Floats get nine digits, with which a float32 reads back exactly.
    """
    cells = {name: f"{x:.9g}" if isinstance(x, float) else x for name, x in row.items()}
    cells["timestamp"] = datetime.datetime.now().isoformat(timespec="seconds")
    line = io.StringIO()
    csv.DictWriter(line, COLUMNS, lineterminator="\n").writerow(cells)
    file.write(line.getvalue())
    file.flush()


def passes_per_step(config: Config) -> int:
    """Evaluations of the loss in one step."""
    if config.mode == "fo":
        return config.fo.gradient_accumulation_steps
    zo = config.zo
    return estimators.num_evaluations(zo.num_queries, zo.difference, zo.batch_per_query)


def make_row(config: Config, step: int, num_blocks: int, tokens_per_step: int) -> dict[str, Any]:
    """What a row of metrics.csv says about a step without having run it.

    `tokens` are training tokens read, each counted once however many queries evaluate it;
    `forward_passes` are evaluations of the loss on a batch (fo: on a micro-batch).
    """
    fo = config.mode == "fo"
    return {
        "epoch": step * blocks_per_step(config) / num_blocks,
        "step": step,
        "mode": config.mode,
        "scope": "full",
        "q": "" if fo else config.zo.num_queries,
        "initial_lr": config.optimizer.learning_rate,
        "batch_size": config.train.batch_size,
        "gradient_accumulation_steps": config.fo.gradient_accumulation_steps if fo else "",
        "effective_batch_size": blocks_per_step(config),
        "optimizer": config.optimizer.name,
        "forward_passes": step * passes_per_step(config),
        "tokens": step * tokens_per_step,
    }


def describe(config: Config, corpus: Corpus, model: GPT, workdir: Path) -> str:
    """What a run is about to do, in plain words."""
    zo, optimizer, train = config.zo, config.optimizer, config.train
    per_query = " each" if zo.batch_per_query else ", shared by them"
    ways = {
        "central": f"central differences of {zo.epsilon:g}",
        "forward": f"forward differences of {zo.epsilon:g}",
        "jvp": "exact forward-mode slopes",
    }
    batch = f"batches of {train.batch_size} blocks"
    how = {
        "fo": f"backprop; {batch} in {config.fo.gradient_accumulation_steps} part(s)",
        "zo": f"forward passes only: {zo.num_queries} {zo.perturbation} directions a step, "
        f"{ways[zo.difference]}, {passes_per_step(config)} loss evaluations; {batch}{per_query}",
    }[config.mode]
    rate = f"learning rate {optimizer.learning_rate:g}"
    if optimizer.schedule == "cosine":
        rate += (
            f", {optimizer.warmup_steps} steps of warm-up, cosine to "
            f"{optimizer.min_learning_rate:g}"
        )
    device = jax.devices()[0]
    return "\n".join(
        (
            f"model:     GPT, {count_params(model):,} parameters ({model.num_layers} layers, "
            f"{model.num_heads} heads, width {model.width}, {config.model.compute_dtype})",
            f"data:      {corpus.summary}",
            f"gradient:  {how}",
            f"optimizer: {optimizer.name}, {rate}",
            f"length:    {train.num_steps:,} steps on {device.device_kind} "
            f"({device.platform}, 1 of {jax.device_count()})",
            f"results:   {workdir}",
        )
    )
