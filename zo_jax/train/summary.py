"""A run as a small table: what was measured on its way, and what it took until then."""

from collections.abc import Sequence
import datetime
import math

from zo_jax.train.run_folder.metrics import Row
from zo_jax.train.tasks.task import MEASURES

# Lines of the table, the first, the best and the last evaluation among them.
_MOST_LINES = 8


def tabulate(rows: Sequence[Row], measure: str = "eval_loss") -> str:
    """Some of the evaluations of a run, each with the mean training loss since the one before; the
    best is marked.

    Args:
      rows: of metrics.csv.
      measure: of `MEASURES`, which says what the best is.

    Returns:
      Lines of equal width; empty if nothing was measured.
    """
    evaluated = [i for i, row in enumerate(rows) if row["eval_loss"]]
    if not evaluated:
        return ""
    sign = 1 if MEASURES[measure] else -1
    value = lambda i: sign * float(rows[i][measure] or "nan")
    finite = [i for i in evaluated if math.isfinite(value(i))]
    best = max(finite, key=value, default=None)
    shown = _spread(evaluated, best)
    names = [name for name in MEASURES if any(rows[i][name] for i in evaluated)]
    titles = ["step", *(name.removeprefix("eval_") for name in names), "training loss"]
    table = [[*titles, "passes", "tokens", "time"]]
    began = _time(rows[0])
    for before, i in zip([-1, *shown], shown, strict=False):
        row = rows[i]
        measured = [f"{float(row[name]):.4f}" if row[name] else "" for name in names]
        counts = [f"{int(row[name]):,}" for name in ("forward_passes", "tokens")]
        mark = f"{row['step']} *" if i == best else f"{row['step']}  "
        since = _mean_loss(rows[before + 1 : i + 1])
        table.append([mark, *measured, since, *counts, _duration(_time(row) - began)])
    table[0][0] += "  "
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(x.rjust(n) for x, n in zip(line, widths, strict=True)) for line in table]
    return "\n".join([*lines, "* the best"])


def _spread(evaluated: list[int], best: int | None) -> list[int]:
    """The first, the best, the last, and others at about equal distances."""
    last = len(evaluated) - 1
    parts = min(last, _MOST_LINES - 2)
    places = {round(k * last / parts) for k in range(parts + 1)} if parts else {0}
    return sorted({evaluated[k] for k in places} | ({best} if best is not None else set()))


def _mean_loss(rows: Sequence[Row]) -> str:
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    return f"{sum(losses) / len(losses):.4f}" if losses else ""


def _time(row: Row) -> datetime.datetime:
    return datetime.datetime.fromisoformat(row["timestamp"])


def _duration(time: datetime.timedelta) -> str:
    """
    >>> _duration(datetime.timedelta(seconds=3725)), _duration(datetime.timedelta(seconds=65))
    ('1:02:05', '1:05')
    """
    minutes, seconds = divmod(int(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
