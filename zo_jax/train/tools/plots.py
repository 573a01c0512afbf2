"""Curves of runs: the loss curve of one, and several runs in one picture.

zo-jax plots RUN...                        panels: losses by passes, tokens and seconds;
                                           gradient norm, rate, and what else was
                                           measured; to runs.png
zo-jax plots RUN... --x=forward_passes --y=grad_norm --out=norms.svg
                                           one quantity against another

Runs that differ in their seed alone are one curve, their mean, in a band from the lowest to the
highest. Runs on other texts or examples, told apart by the digests in their config.json, have other
strokes, and the picture says so.
"""

from collections.abc import Sequence
import datetime
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
import numpy as np

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
    "eval_loss": "validation loss (nats)",
    "loss": "training loss (nats)",
    "grad_norm": "gradient norm",
    "current_lr": "learning rate",
    "instruct_cosine_target": "cosine to the gradient",
    "eval_accuracy": "validation accuracy",
    "reward": "mean reward of the members",
    "eval_reward": "validation reward",
    "drift": "distance from the start",
}
# Of the picture that no --x and no --y asks for; those of which no run has anything are left out.
PANELS = (
    ("forward_passes", "eval_loss"),
    ("tokens", "eval_loss"),
    ("seconds", "eval_loss"),
    ("step", "grad_norm"),
    ("step", "current_lr"),
    ("step", "instruct_cosine_target"),
    ("step", "eval_accuracy"),
    ("step", "eval_reward"),
    ("step", "drift"),
)
_MARKERS, _STROKES = "osD^v<>PX*", ("-", "--", ":", "-.")
# More marks than this would be a line.
_MOST_MARKS = 40

Rows = list[dict[str, str]]


class Curve(NamedTuple):
    """Runs that differ in their seed alone.

    Attributes:
      label: for the legend.
      corpus: what tells the text or the examples that they read from others; empty if unknown.
      runs: the rows of each.
    """

    label: str
    corpus: str
    runs: list[Rows]


def plot_losses(rows: Rows, path: Path, title: str) -> None:
    """Draws training and validation loss against steps, or rewards where a run has them, into a PNG
    or SVG file.

    Args:
      rows: of metrics.csv.
      path: the file, replaced as a whole.
      title: of the picture.
    """
    figure = _new_figure(8, 5)
    axes = figure.subplots()
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
            axes.plot(*zip(*points.values(), strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel=what, title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    _save(figure, path)


def read_curves(folders: Sequence[Path]) -> list[Curve]:
    """The runs of some folders, those together that differ in their seed alone."""
    curves: dict[str, Curve] = {}
    for folder in folders:
        rows = metrics.read(folder / "metrics.csv")
        config = _read_config(folder)
        corpus = config.get("corpus", {})
        same = {name: x for name, x in config.items() if name not in _OF_ONE_SEED}
        key = json.dumps(same, sort_keys=True) if config else str(folder)
        curve = curves.setdefault(key, Curve(folder.name or str(folder), _name_corpus(corpus), []))
        curve.runs.append(rows)
    count = lambda curve: f" ({len(curve.runs)} seeds)" if len(curve.runs) > 1 else ""
    return [curve._replace(label=curve.label + count(curve)) for curve in curves.values()]


# What of a config.json belongs to a seed, or to what was written when.
_OF_ONE_SEED = ("seed", "identity", "reports", "found", "check")


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands; empty if it cannot be read, for rows can be drawn without it."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _name_corpus(digests: dict[str, Any]) -> str:
    if "examples" in digests:
        return f"examples {digests['examples']:.8}"
    return f"text {digests['text']:.8}, tokens {digests['ids']}" if "text" in digests else ""


def plot_runs(
    curves: Sequence[Curve], path: Path, panels: Sequence[tuple[str, str]] = PANELS
) -> None:
    """Draws quantities of several runs against others into a PNG or SVG file.

    Args:
      curves: from `read_curves`.
      path: the file, replaced as a whole.
      panels: pairs of `X_LABELS` and `Y_LABELS`.

    Raises:
      ValueError: a run has no rows of the first panel.
    """
    for curve in curves:
        y = panels[0][1]
        if not all(_points(rows, *panels[0]) for rows in curve.runs):
            raise ValueError(f"{curve.label} has no rows with {y}; is it a run that has begun?")
    panels = [
        (x, y) for x, y in panels if any(_points(rows, x, y) for c in curves for rows in c.runs)
    ]
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = _new_figure(8, 5) if columns == 1 else _new_figure(5 * columns, 3.7 * height)
    grid = figure.subplots(height, columns, squeeze=False).flatten()
    corpora = sorted({curve.corpus for curve in curves})
    for axes, (x, y) in zip(grid, panels, strict=False):
        for i, curve in enumerate(curves):
            stroke = _STROKES[corpora.index(curve.corpus) % len(_STROKES)]
            marker = _MARKERS[i % len(_MARKERS)]
            _draw(axes, curve, x, y, color=f"C{i % 10}", linestyle=stroke, marker=marker)
        axes.set(xlabel=X_LABELS[x], ylabel=Y_LABELS[y])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M for two million
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    if len(corpora) > 1:
        words = (
            f"{_STROKES[i % len(_STROKES)]} {name or 'unknown'}" for i, name in enumerate(corpora)
        )
        figure.suptitle(
            "their corpora differ, so their losses are no measure of each other: "
            + "   ".join(words),
            fontsize="small",
        )
    _save(figure, path)


def _draw(axes: Any, curve: Curve, x: str, y: str, **style: Any) -> None:
    """A curve, and its band if it has several runs, over the steps that all of them have."""
    runs = [_points(rows, x, y) for rows in curve.runs]
    steps = sorted(set.intersection(*(set(points) for points in runs)))
    if not steps:
        return
    xs, ys = np.moveaxis(np.array([[run[step] for step in steps] for run in runs]), -1, 0)
    every = -(-len(steps) // _MOST_MARKS)
    axes.plot(
        xs.mean(0), ys.mean(0), label=curve.label, linewidth=1.2, markersize=4, markevery=every,
        **style,
    )  # fmt: skip
    if len(runs) > 1:
        band = dict(color=style["color"], alpha=0.2, linewidth=0)
        axes.fill_between(xs.mean(0), ys.min(0), ys.max(0), **band)


def _points(rows: Rows, x: str, y: str) -> dict[int, tuple[float, float]]:
    """(x, y) by step."""
    if x == "seconds":
        times = {
            row["step"]: datetime.datetime.fromisoformat(row["timestamp"]).timestamp()
            for row in rows
        }
        start = min(times.values(), default=0.0)
        value = lambda row: times[row["step"]] - start
    else:
        value = lambda row: float(row[x])
    return {int(row["step"]): (value(row), float(row[y])) for row in rows if row[y]}


def _new_figure(width: float, height: float) -> Figure:
    # No pyplot: its global state and its choice of a window system have no place in a library.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
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
        names = f"{', '.join(choices)} (with neither --x nor --y: panels; default {default})"
        parser.add_argument(flag, choices=choices, metavar="QUANTITY", help=names)
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
        one = options.x or options.y
        panels = ((options.x or "step", options.y or "eval_loss"),) if one else PANELS
        plot_runs(read_curves(options.runs), options.out, panels)
    except (ValueError, OSError) as error:
        return fail(error)
    print(f"wrote {options.out}")
    return 0
