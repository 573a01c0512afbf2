"""Trains a GPT language model from scratch, with forward passes only or with backprop.

  python main.py                                    the default run: configs/default.py
  python main.py --config=configs/NAME.py --workdir=DIR --config.zo.num_queries=16
--config=FILE         the experiment: a file with get_config(), which sets its own defaults
--config.FIELD=VALUE  replaces a field, of those below
--workdir=DIR         run folder (default runs/ and a name); a run that is there is continued
--restart             deletes the run that the folder holds, and trains from scratch
--distributed         this is one of several processes, of a cluster that JAX knows, or with
                      --coordinator=HOST:PORT --num_processes=N --process_id=I
"""

import os
from pathlib import Path
import signal
import sys


def _interrupted(*_: object) -> None:
    """What Ctrl-C does but for the steps of a run, which are finished and saved first."""
    os.write(2, b"\nstopped: interrupted; the same command begins, or goes on from what is saved\n")
    os._exit(130)


# Before the imports that take seconds.
signal.signal(signal.SIGINT, _interrupted)

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from zo_jax.train import cli, processes, validation  # noqa: E402
from zo_jax.train.config import ConfigError, default_run_name  # noqa: E402
from zo_jax.train.run import FAILURES, train_and_evaluate  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder.")
processes.define_flags()
_RESTART = flags.DEFINE_bool("restart", False, "Delete the run that the folder holds.")


def _parse_flags(argv: list[str]) -> list[str]:
    if {"-h", "-help", "--help", "--helpshort", "--helpfull"} & set(argv):
        print(__doc__ + cli.help_text())
        sys.exit(0)
    try:
        processes.join_if_asked(argv)
    except processes.AnotherProcessFailed as error:
        cli.fail(error)
    try:
        default = Path(__file__).parent / "configs" / "default.py"
        sys.argv = argv = [argv[0], *cli.prepare_arguments(argv[1:], default)]
        if rest := flags.FLAGS(argv)[1:]:
            raise ConfigError(f"{rest[0]!r} is no flag; --help lists them all")
        validation.validate(_CONFIG.value)
    except Exception as error:  # config files and ml_collections raise all kinds
        cli.fail(processes.agree_on_failure(error))
    return argv


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file it writes
    workdir = Path(_WORKDIR.value or f"runs/{default_run_name(_CONFIG.value)}")
    try:
        train_and_evaluate(_CONFIG.value, workdir, _RESTART.value)
    except FAILURES as error:
        cli.fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
