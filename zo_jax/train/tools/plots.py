"""Curves of runs: the loss curve of one, and several runs in one picture.

zo-jax plots RUN...                              validation loss against steps, to runs.png
zo-jax plots RUN... --x=forward_passes --y=grad_norm --out=norms.svg
"""

from collections.abc import Sequence
import datetime
import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zo_jax.atomic import write_atomic
from zo_jax.train.arguments import Parser, fail, parse
from zo_jax.train.run_folder import metrics

X_LABELS = {
    "step": "step",
    "forward_passes": "forward passes",
    "tokens": "training tokens",
    "seconds": "seconds",
}
Y_LABELS = {
    "eval_loss": "validation loss (nats per token)",
    "loss": "training loss (nats per token)",
    "grad_norm": "gradient norm",
    "reward": "mean reward of the members",
    "eval_reward": "validation reward",
}

Rows = list[dict[str, str]]


def plot_losses(rows: Rows, path: Path, title: str) -> None:
    """Draws training and validation loss against steps, or rewards where a run has them, into a PNG
    or SVG file.

    Args:
      rows: of metrics.csv.
      path: the file, replaced as a whole.
      title: of the picture.
    """
    figure, axes = _new_figure()
    styles: dict[tuple[str, str], dict[str, Any]] = {
        ("loss", "training (one batch)"): dict(alpha=0.6, linewidth=1),
        ("eval_loss", "validation"): dict(marker="o", markersize=3),
    }
    what = "cross-entropy (nats per token)"
    if any(row["reward"] for row in rows):
        what, (training, validation) = "mean score", styles.values()
        measures = ("eval_reward", "eval_exact_match", "eval_accuracy")
        held_out = next((y for y in measures if any(row[y] for row in rows)), measures[0])
        styles = {
            ("reward", "members (one batch)"): training,
            (held_out, "validation"): validation,
        }
    for (y, label), style in styles.items():
        if points := _points(rows, "step", y):
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel=what, title=title)
    _save(figure, axes, path)


def plot_runs(runs: dict[str, Rows], path: Path, x: str = "step", y: str = "eval_loss") -> None:
    """Draws one quantity of several runs against another into a PNG or SVG file.

    Args:
      runs: the rows of each run's metrics.csv, by its name.
      path: the file, replaced as a whole.
      x: "step", "forward_passes", "tokens" or "seconds".
      y: "eval_loss", "loss", "grad_norm", "reward" or "eval_reward".

    Raises:
      ValueError: a run has no such rows.
    """
    figure, axes = _new_figure()
    for name, rows in runs.items():
        points = _points(rows, x, y)
        if not points:
            raise ValueError(f"{name} has no rows with {y}; is it a run that has begun?")
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set(xlabel=X_LABELS[x], ylabel=Y_LABELS[y])
    _save(figure, axes, path)


def _points(rows: Rows, x: str, y: str) -> list[tuple[float, float]]:
    value = {
        "seconds": lambda row: datetime.datetime.fromisoformat(row["timestamp"]).timestamp(),
    }.get(x, lambda row: float(row[x]))
    start = value(rows[0]) if rows and x == "seconds" else 0.0
    return [(value(row) - start, float(row[y])) for row in rows if row[y]]


def _new_figure():
    # No pyplot: its global state and its choice of a window system have no place in a library.
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure, axes, path: Path) -> None:
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.lstrip(".") or "png", dpi=120)
    write_atomic(path, image.getvalue())


def main(args: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = Parser(
        prog="zo-jax plots",
        usage="zo-jax plots RUN... [--x=QUANTITY] [--y=QUANTITY] [--out=FILE]",
        description=__doc__,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders")
    for flag, choices, default in (("--x", X_LABELS, "step"), ("--y", Y_LABELS, "eval_loss")):
        names = f"{', '.join(choices)} (default {default})"
        parser.add_argument(flag, choices=choices, default=default, metavar="QUANTITY", help=names)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs.png"),
        metavar="FILE",
        help="a .png or .svg file (default runs.png)",
    )
    try:
        options = parse(parser, args)
        if options.out.suffix not in (".png", ".svg"):
            raise ValueError(f"--out must end in .png or .svg; got {options.out}")
        rows = {str(run): metrics.read(run / "metrics.csv") for run in options.runs}
        plot_runs(rows, options.out, options.x, options.y)
    except (ValueError, OSError) as error:
        return fail(error)
    print(f"wrote {options.out}")
    return 0
