"""The table at the end of a run."""

import datetime

import numpy as np

from zo_jax.train import summary
from zo_jax.train.run_folder import metrics

START = datetime.datetime(2026, 1, 1)


def row(step, **cells):
    stamp = (START + datetime.timedelta(seconds=10 * step)).isoformat()
    cells = {"timestamp": stamp, "step": step, "forward_passes": 4 * step, "tokens": step} | cells
    return {name: str(cells.get(name, "")) for name in metrics.COLUMNS}


def test_the_table_has_the_first_the_best_and_the_last():
    rng = np.random.default_rng(0)
    rows = [row(0, eval_loss=4.0)]
    for step in range(1, 100):
        eval_loss = 1.0 if step == 63 else 2 + rng.random()
        rows.append(row(step, loss=step, **({"eval_loss": eval_loss} if step % 3 == 0 else {})))
    lines = summary.tabulate(rows).splitlines()
    assert len(lines) <= 11 and len({len(line) for line in lines[:-1]}) == 1
    assert lines[0].split() == ["step", "loss", "training", "loss", "passes", "tokens", "time"]
    assert lines[1].split() == ["0", "4.0000", "0", "0", "0:00"]
    steps = [int(line.split()[0]) for line in lines[1:-1]]
    assert steps[0] == 0 and steps[-1] == 99
    (best,) = [line for line in lines[:-1] if "*" in line]
    step, _, loss, mean, passes, _, time = best.split()
    assert (step, loss, passes, time) == ("63", "1.0000", "252", "10:30")
    before = steps[steps.index(63) - 1]
    assert float(mean) == np.mean(np.arange(before + 1, 64)), "of the steps since the line before"


def test_other_measures_have_columns_and_say_what_is_best():
    rows = [row(0, eval_loss=1.0, eval_accuracy=0.5), row(9, eval_loss=2.0, eval_accuracy=0.75)]
    lines = summary.tabulate(rows, "eval_accuracy").splitlines()
    assert "accuracy" in lines[0] and lines[2].split()[:4] == ["9", "*", "2.0000", "0.7500"]


def test_nothing_measured_and_nothing_finite():
    assert summary.tabulate([row(1, loss=1.0)]) == summary.tabulate([]) == ""
    assert "*" not in summary.tabulate([row(0, eval_loss=float("nan"))]).splitlines()[1]
