"""The command line: its commands, what they say of themselves, and what they need."""

from pathlib import Path
import platform
import subprocess
import sys

import jax
import pytest

import zo_jax
from zo_jax.train import cli, experiment
from zo_jax.train.tools import train

ROOT = Path(__file__).parents[2]


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, what) in cli.COMMANDS.items():
        assert f"  {name} " in out and what in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith(f"usage: zo-jax {command}")
    # The fields of an experiment are explained where they can be set, and nowhere else.
    assert ("--config.zo.num_queries" in out) == (command in ("train", "memory"))


def test_version(capsys):
    """With what else a report of a fault needs."""
    assert cli.main(["--version"]) == 0
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert first == f"zo_jax {zo_jax.__version__}"
    assert f"jax {jax.__version__}, " in rest and f"Python {platform.python_version()}" in rest


@pytest.mark.parametrize(
    "args, message",
    [
        (["trian"], "'trian' is no command; did you mean train?"),
        (["LEDGER"], "did you mean ledger?"),
        (["x"], "it must be one of train, ledger, plots, generate, export, memory"),
        (["train", "--worKdir=x"], "--worKdir is no flag; did you mean --workdir?"),
        (["train", "--restrat"], "did you mean --restart?"),
        (["train", "--num_processes=x"], "--num_processes: invalid int value: 'x'"),
        (["ledger", "absent", "--out=x"], "--out needs --to-step"),
        (["ledger"], "required: RUN"),
    ],
)
def test_errors_are_one_line(args, message, capsys):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_the_experiment_and_its_folder_reach_the_run(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(train, "train_and_evaluate", lambda *args: runs.append(args))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--workdir=x", "--restart", "--config.train.num_steps=7"]) == 0
    config, workdir, restart = runs[0]
    expected = experiment.load("default")
    expected.train.num_steps = 7
    assert (config, workdir, restart) == (expected, Path("x"), True)


def test_the_checkout_has_the_experiments_of_the_package():
    assert sorted(path.stem for path in (ROOT / "configs").glob("*.py")) == experiment.shipped()


def test_without_the_packages_of_the_program_it_says_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['orbax'] = None\n"
        "sys.argv = ['zo-jax', 'train']; from zo_jax.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "pip install 'zo_jax[train]'" in done.stderr
