"""What is wrong with a command is one line on stderr and exit code 2."""

from pathlib import Path
import subprocess
import sys

import pytest

from zo_jax.train import cli

ROOT = Path(__file__).parents[2]
WRONG = {
    "--config.zo.num_querys=3": "did you mean --config.zo.num_queries",
    "--config.zo.num_queries=abc": "--config.zo.num_queries=abc",
    "--config.zo.epsilon=[1,2]": "--config.zo.epsilon=[1,2]",
    "--config.data.block_size=4096": "longer than the model can read",
    "--config=absent.py": "there is no file",
    "--config=none.py": "get_config",
    "--config=raises.py": "boo",
    "--unknown=1": "unknown",
    "stray": "'stray' is no flag",
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_arguments(argument, tmp_path, monkeypatch, capsys):
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "raises.py").write_text("def get_config():\n    raise RuntimeError('boo')\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--workdir=run", argument]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ") and WRONG[argument] in err
    assert not (tmp_path / "run").exists()


def test_a_process_ends_with_the_code(tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), f"--workdir={tmp_path}/run", "stray"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 'stray' is no flag; --help lists them all\n"
