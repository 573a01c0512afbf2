"""The rows of a run: metrics.csv, and what is derived from it.

Each row ends with a check, a CRC-32 of the run's identity and the row: a changed digit, and a row
of another run, are noticed.
"""

import contextlib
import csv
import datetime
import io
import json
from pathlib import Path
import re
import shutil
from typing import Any
import zlib

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from zo_jax.atomic import AppendFile, write_atomic
from zo_jax.train.run_folder.tracking import Tracker
from zo_jax.train.tasks.task import MEASURES

COLUMNS: tuple[str, ...] = (
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
    "reward",
    "best_reward",
    "flat_steps",
    "drift",
    *MEASURES,
    "forward_passes",
    "tokens",
    "skipped_steps",
    "check",
)
_HEADER = ",".join(COLUMNS)

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a metrics.csv as they stand, less what has not all its cells; their checks are
    not looked at.
    """
    return [row for line in _lines(path) if (row := _parse(line))]


def read_checked(path: Path, identity: str) -> tuple[list[Row], list[str]]:
    """The rows of a run's metrics.csv that are as they were written, by step, and what is wrong
    with the rest.

    A last line without an end is what a killed run leaves, and nothing wrong.
    """
    lines = _lines(path)
    if not lines:
        return [], []
    wrong = [] if lines[0] == _HEADER else ["its header is damaged"]
    valid: dict[int, Row] = {}
    damaged = 0
    for line in lines[1:] if lines[0].lstrip("\ufeff").startswith(COLUMNS[0]) else lines:
        row = _parse(line)
        if row and _check(line.rpartition(",")[0], identity) == row["check"]:
            valid[int(row["step"])] = row
        else:
            damaged += line != _HEADER
    if damaged:
        wrong.append(f"{damaged} of its {len(lines)} lines are damaged or of another run")
    return [valid[step] for step in sorted(valid)], wrong


def _lines(path: Path) -> list[str]:
    """The finished lines of a file."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", "replace")
    return [line.removesuffix("\r") for line in text.split("\n")[:-1]]


def _parse(line: str) -> Row | None:
    try:
        cells = next(csv.reader([line]), [])
    except csv.Error:
        return None
    row = dict(zip(COLUMNS, cells, strict=False))
    return row if len(cells) == len(COLUMNS) and re.fullmatch("[0-9]+", row["step"]) else None


def format_row(row: dict[str, Any], identity: str) -> Row:
    """The cells of a row, stamped with the time if it has none, and its check; columns that it
    lacks are empty.

    Floats get nine digits, with which a float32 reads back exactly.
    """
    stamp = {"timestamp": datetime.datetime.now().isoformat(timespec="seconds")}
    cells = {
        name: f"{x:.9g}" if isinstance(x, float) else str(x) for name, x in (stamp | row).items()
    }
    cells = {name: cells.get(name, "").replace("\n", " ") for name in COLUMNS[:-1]}
    return cells | {"check": _check(_line(cells), identity)}


def _check(line: str, identity: str) -> str:
    return f"{zlib.crc32(f'{identity},{line}'.encode()):08x}"


def _line(cells: Row) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells.values())
    return text.getvalue()


class Files:
    """What a run writes while it trains: metrics.csv, and, derived from its rows, evaluations.jsonl
    and TensorBoard events, and what a tracker sends.

    They are made anew when a run is opened, so that a killed one leaves nothing missing and nothing
    twice.
    """

    def __init__(self, workdir: Path, rows: list[Row], tracker: Tracker | None = None):
        """Writes the rows that are there."""
        self._tracker = tracker
        table, evaluations, folder = (
            workdir / name for name in ("metrics.csv", "evaluations.jsonl", "tensorboard")
        )
        text = "".join(f"{line}\n" for line in (_HEADER, *map(_line, rows))).encode()
        if not table.is_file() or table.read_bytes() != text:
            write_atomic(table, text)
        write_atomic(evaluations, "")
        self._table, self._evaluations = AppendFile(table), AppendFile(evaluations)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # Its EventsWriter, not its SummaryWriter, whose thread would wait for ever once the disk is
        # full.
        self._events = EventsWriter(str(folder / "events"))
        for row in rows:
            self._derive(row)

    def write(self, row: Row) -> None:
        """Appends a row, whole; if the disk has no room, metrics.csv is as before and OSError is
        raised.
        """
        self._table.append(f"{_line(row)}\n".encode())
        self._derive(row)

    def sync(self) -> None:
        """Returns when the rows are on the disk, not only with the kernel."""
        self._table.sync()

    def contents(self) -> bytes:
        """metrics.csv, even if it has been deleted, and the rows that could not be written."""
        return self._table.contents()

    def close(self) -> None:
        self._table.close()
        self._evaluations.close()
        with contextlib.suppress(OSError):
            self._events.close()
        if self._tracker:
            self._tracker.close()

    def _derive(self, cells: Row) -> None:
        """Tells the other files of a row that is in metrics.csv."""
        row = {name: _number(cell) for name, cell in cells.items() if cell != ""}
        seconds = datetime.datetime.fromisoformat(row["timestamp"]).timestamp()
        scalars = ("loss", "reward", *MEASURES, "grad_norm", "current_lr", "drift")
        told = {name: row[name] for name in scalars if name in row}
        values = [Summary.Value(tag=name, simple_value=x) for name, x in told.items()]
        self._events.write_event(
            Event(wall_time=seconds, step=row["step"], summary=Summary(value=values))
        )
        if "eval_loss" in row:
            names = ("timestamp", "step", *MEASURES, "loss", "forward_passes", "tokens")
            record = {name: row[name] for name in names if name in row}
            self._evaluations.append((json.dumps(record) + "\n").encode())
            self._events.flush()
        if self._tracker:
            counts = {name: row[name] for name in ("forward_passes", "tokens")}
            self._tracker.write(row["step"], told | counts)


class Log:
    """Which rows a run has; in the process that has the files, it writes them too.

    Attributes:
      steps: of the rows.
      results: of evaluations by step, as they read back from metrics.csv.
    """

    def __init__(self, identity: str, rows: list[Row], files: Files | None = None):
        self._identity, self._files = identity, files
        self.steps, self.results = set[int](), dict[int, dict[str, float]]()
        for row in rows:
            self._remember(row)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row; see `Files.write`."""
        cells = format_row(row, self._identity)
        self._remember(cells)
        if self._files:
            self._files.write(cells)

    def sync(self) -> None:
        if self._files:
            self._files.sync()

    def contents(self) -> bytes:
        return self._files.contents() if self._files else b""

    def close(self) -> None:
        if self._files:
            self._files.close()

    def _remember(self, row: Row) -> None:
        self.steps.add(int(row["step"]))
        self.results |= results_of([row])


def results_of(rows: list[Row]) -> dict[int, dict[str, float]]:
    """What evaluations have measured, by step."""
    return {
        int(row["step"]): {name: float(row[name]) for name in MEASURES if row[name]}
        for row in rows
        if row["eval_loss"]
    }


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
