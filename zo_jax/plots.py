"""The loss curve of a run."""

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zo_jax import metrics


def plot_losses(rows: list[dict[str, str]], path: Path, title: str) -> None:
    """Draws training and validation loss against steps into a PNG file.

    Args:
      rows: of metrics.csv.
      path: the file, replaced as a whole.
      title: of the picture.
    """
    # No pyplot: its global state and its choice of a window system have no place in a library.
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for column, label, style in (
        ("loss", "training (one batch)", dict(alpha=0.6, linewidth=1)),
        ("eval_loss", "validation", dict(marker="o", markersize=3)),
    ):
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    metrics.write_atomic(path, image.getvalue())
