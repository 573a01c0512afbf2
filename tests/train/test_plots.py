"""Pictures of runs, from their metrics."""

import contextlib

import pytest

from zo_jax.train import describe
from zo_jax.train.run_folder import metrics
from zo_jax.train.tools import plots


@pytest.fixture
def runs(tmp_path, tiny_config):
    folders = [tmp_path / name for name in ("one", "two")]
    for scale, folder in enumerate(folders, start=1):
        folder.mkdir()
        files = metrics.Files(folder, [])
        with contextlib.closing(metrics.Log("", [], files)) as log:
            for step in range(4):
                row = describe.make_row(tiny_config, step, 10, 8) | {
                    "loss": scale / (step + 1),
                    "grad_norm": scale,
                }
                log.write(row | ({"eval_loss": scale / (step + 2)} if step % 2 == 0 else {}))
    return folders


@pytest.mark.parametrize("x", plots.X_LABELS)
@pytest.mark.parametrize("y", plots.Y_LABELS)
def test_runs_in_one_picture(runs, tmp_path, x, y, capsys):
    out = tmp_path / "picture.svg"
    assert plots.main([*map(str, runs), f"--x={x}", f"--y={y}", f"--out={out}"]) == 0
    svg = out.read_text()
    assert svg.count('<g id="line2d_') > 2 and "</svg>" in svg
    assert "wrote" in capsys.readouterr().out


def test_points_are_those_of_the_rows(runs):
    rows = metrics.read(runs[1] / "metrics.csv")
    assert plots._points(rows, "step", "eval_loss") == [(0, 1.0), (2, 0.5)]
    assert [x for x, _ in plots._points(rows, "forward_passes", "loss")] == [0, 6, 12, 18]


@pytest.mark.parametrize("args", [["absent"], ["one", "--out=x.gif"], ["one", "--x=stpe"], []])
def test_what_cannot_be_drawn_is_said(runs, args, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert plots.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
