"""What a run writes about itself: metrics.csv, and files that are whole or not there at all."""

import csv
import datetime
import io
import os
from pathlib import Path
from typing import IO, Any

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
    full = [dict(zip(COLUMNS, row)) for row in rows[1:] if len(row) == len(COLUMNS)]
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
