"""What a run says of itself: metrics.csv, and its plan in plain words."""

import contextlib
import csv
import datetime
import io
import json
import os
from pathlib import Path
import shutil
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from zo_jax.atomic import read_open, write_atomic, write_whole

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


class Log:
    """What a run writes while it trains: metrics.csv, and what is derived from its rows, evaluations.jsonl and TensorBoard events.

    Opening it drops the rows past `last_step`, of steps that will be taken again, and derives the rest anew, so that a killed
    run leaves nothing missing and nothing twice.

    Attributes:
      last_row: the step of the last row, -1 before the first.
      eval_losses: by step.
    """

    def __init__(self, workdir: Path, last_step: int):
        rows = [row for row in read(workdir / "metrics.csv") if int(row["step"]) <= last_step]
        self.last_row, self.eval_losses = -1, {}
        table = [_csv_line(dict(zip(COLUMNS, COLUMNS, strict=True))), *map(_csv_line, rows)]
        write_atomic(workdir / "metrics.csv", "".join(table))
        write_atomic(workdir / "evaluations.jsonl", "")
        open_end = lambda name: (workdir / name).open("r+b", buffering=0)
        self._table, self._evaluations = open_end("metrics.csv"), open_end("evaluations.jsonl")
        self._table.seek(0, os.SEEK_END)
        folder = workdir / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # Its EventsWriter, not its SummaryWriter, whose thread would wait for ever once the disk is full.
        self._events = EventsWriter(str(folder / "events"))
        for row in rows:
            self._derive(row)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._evaluations.close()
        with contextlib.suppress(OSError):
            self._events.close()

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row, whole, stamped with the time; columns that the row lacks stay empty.

        Floats get nine digits, with which a float32 reads back exactly.

        Raises:
          OSError: the disk; metrics.csv is as before.
        """
        row = row | {"timestamp": datetime.datetime.now().isoformat(timespec="seconds")}
        cells = {name: f"{x:.9g}" if isinstance(x, float) else x for name, x in row.items()}
        write_whole(self._table, _csv_line(cells).encode())
        self._derive(cells)

    def sync(self) -> None:
        """Returns when the rows are on the disk, not only with the kernel."""
        os.fsync(self._table.fileno())

    def contents(self) -> bytes:
        """metrics.csv, even if it has been deleted."""
        return read_open(self._table)

    def _derive(self, cells: dict[str, Any]) -> None:
        """Tells the other files of a row that is in metrics.csv."""
        row = {name: _number(str(cell)) for name, cell in cells.items() if cell != ""}
        self.last_row = row["step"]
        seconds = datetime.datetime.fromisoformat(row["timestamp"]).timestamp()
        scalars = ("loss", "eval_loss", "grad_norm", "current_lr")
        values = [Summary.Value(tag=x, simple_value=row[x]) for x in scalars if x in row]
        self._events.write_event(
            Event(wall_time=seconds, step=row["step"], summary=Summary(value=values))
        )
        if "eval_loss" in row:
            self.eval_losses[row["step"]] = row["eval_loss"]
            names = ("timestamp", "step", "eval_loss", "loss", "forward_passes", "tokens")
            record = {name: row[name] for name in names if name in row}
            write_whole(self._evaluations, (json.dumps(record) + "\n").encode())
            self._events.flush()


class Follower(Log):
    """The log of a process that writes none: it knows what the first process has written."""

    def __init__(self, workdir: Path):
        rows = read(workdir / "metrics.csv")
        self.last_row = int(rows[-1]["step"]) if rows else -1
        self.eval_losses = {
            int(row["step"]): float(row["eval_loss"]) for row in rows if row["eval_loss"]
        }

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, row: dict[str, Any]) -> None:
        self.last_row = row["step"]
        if "eval_loss" in row:
            self.eval_losses[row["step"]] = row["eval_loss"]

    def sync(self) -> None:
        pass


def _csv_line(cells: dict[str, Any]) -> str:
    line = io.StringIO()
    csv.DictWriter(line, COLUMNS, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _number(cell: str) -> Any:
    """A cell as it was written: an integer, a float or text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return cell


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The records of an evaluations.jsonl, less a line that a killed run left unfinished."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records
