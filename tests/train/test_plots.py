"""Pictures of runs, from their metrics."""

import contextlib
import dataclasses
import itertools
import json

import pytest

from zo_jax.train import describe
from zo_jax.train.run_folder import metrics
from zo_jax.train.tools import plots


@pytest.fixture
def make_run(tmp_path, tiny_config):
    """Writes a folder as a run of some seed, text and scale of losses does."""

    def make(name, scale=1.0, seed=0, text="aaaaaaaa"):
        folder = tmp_path / name
        folder.mkdir()
        files = metrics.Files(folder, [])
        with contextlib.closing(metrics.Log("", [], files)) as log:
            for step in range(4):
                row = describe.make_row(tiny_config, step, 10, 8) | {
                    "loss": scale / (step + 1),
                    "grad_norm": scale,
                    "current_lr": 0.1,
                }
                log.write(row | ({"eval_loss": scale / (step + 2)} if step % 2 == 0 else {}))
        config = dataclasses.asdict(tiny_config) | {"seed": seed, "identity": name}
        config["corpus"] = {"text": text, "ids": 1}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    "x, y", zip(plots.X_LABELS, itertools.cycle(["eval_loss", "loss", "grad_norm", "current_lr"]))
)
def test_one_quantity_against_another(make_run, tmp_path, x, y, capsys):
    out = tmp_path / "picture.svg"
    runs = [str(make_run("one")), str(make_run("two", text="b"))]
    assert plots.main([*runs, f"--x={x}", f"--y={y}", f"--out={out}"]) == 0
    svg = out.read_text()
    assert svg.count('<g id="line2d_') > 2 and "</svg>" in svg and '<g id="axes_2"' not in svg
    assert "wrote" in capsys.readouterr().out


def test_panels_have_what_was_measured(make_run, tmp_path):
    """Three panels of the loss, the norm and the rate; no run has a cosine or an accuracy."""
    out = tmp_path / "picture.svg"
    assert plots.main([str(make_run("one")), f"--out={out}"]) == 0
    svg = out.read_text()
    drawn = [i for i in range(1, 9) if f'<g id="axes_{i}"' in svg]
    # A switched-off panel fills the grid; it has no ticks.
    assert len(drawn) in (5, 6) and svg.count('<g id="xtick_1"') >= 1
    for label in ("forward passes", "training tokens", "seconds", "gradient norm", "learning rate"):
        assert f"<!-- {label} -->" in svg
    assert "<!-- cosine" not in svg


def test_seeds_are_one_curve_and_corpora_are_told_apart(make_run, tmp_path):
    folders = [make_run("s0"), make_run("s1", 3.0, seed=1), make_run("other", text="bbbbbbbbb")]
    seeds, other = plots.read_curves(folders)
    assert (seeds.label, len(seeds.runs), other.label) == ("s0 (2 seeds)", 2, "other")
    assert seeds.corpus != other.corpus and "bbbbbbbb" in other.corpus
    out = tmp_path / "picture.svg"
    plots.plot_runs([seeds, other], out, [("step", "eval_loss")])
    svg = out.read_text()
    assert "corpora differ" in svg and "stroke-dasharray" in svg
    assert svg.count('<g id="FillBetweenPolyCollection_') == 1, "a band of the seeds"
    plots.plot_runs([seeds], out, [("step", "eval_loss")])
    assert "corpora differ" not in out.read_text()


def test_points_are_those_of_the_rows(make_run):
    rows = metrics.read(make_run("two", 2.0) / "metrics.csv")
    assert plots._points(rows, "step", "eval_loss") == {0: (0, 1.0), 2: (2, 0.5)}
    assert [x for x, _ in plots._points(rows, "forward_passes", "loss").values()] == [0, 6, 12, 18]


@pytest.mark.parametrize("args", [["absent"], ["one", "--out=x.gif"], ["one", "--x=stpe"], []])
def test_what_cannot_be_drawn_is_said(make_run, args, capsys, monkeypatch, tmp_path):
    make_run("one")
    monkeypatch.chdir(tmp_path)
    assert plots.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
