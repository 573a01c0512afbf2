"""Trains a GPT language model from scratch, with forward passes only or with backprop.

  python main.py                                    the default run: configs/default.py
  python main.py --config=configs/NAME.py --workdir=DIR --config.zo.num_queries=16

--config=FILE         the experiment: a file with get_config(), which sets its own defaults
--config.FIELD=VALUE  replaces a field, of those below
--workdir=DIR         run folder (default runs/ and a name); a run that is there is continued
--restart             deletes the run that the folder holds, and trains from scratch
"""

from pathlib import Path
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from zo_jax import config as config_lib
from zo_jax.data import DataError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder.")
_RESTART = flags.DEFINE_bool("restart", False, "Delete the run that the folder holds.")


def _fail(error: Exception) -> NoReturn:
    # A config file that raises is reported with its traceback, whose last line says why.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    print(f"error: {lines[-1 if 'Traceback' in str(error) else 0]}", file=sys.stderr)
    sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
    if {"-h", "-help", "--help", "--helpshort", "--helpfull"} & set(argv):
        print(__doc__ + config_lib.help_text())
        sys.exit(0)
    if not any(arg.lstrip("-").partition("=")[0] == "config" for arg in argv):
        # As an argument, not as the flag's default: that is read too early to catch its errors.
        default = Path(__file__).parent / "configs" / "default.py"
        sys.argv = argv = [argv[0], f"--config={default}", *argv[1:]]
    try:
        config_lib.check_arguments(argv[1:])
        if rest := flags.FLAGS(argv)[1:]:
            raise config_lib.ConfigError(f"{rest[0]!r} is no flag; --help lists them all")
        config_lib.validate(_CONFIG.value)
    except Exception as error:  # config files and ml_collections raise all kinds
        _fail(error)
    return argv


def main(_: list[str]) -> None:
    from zo_jax import checkpoint, train  # slow to import, and not needed for --help

    logging.set_verbosity(logging.WARNING)  # orbax tells of every file it writes
    workdir = Path(_WORKDIR.value or f"runs/{config_lib.default_run_name(_CONFIG.value)}")
    try:
        train.train_and_evaluate(_CONFIG.value, workdir, _RESTART.value)
    except (config_lib.ConfigError, DataError, checkpoint.CheckpointError) as error:
        _fail(error)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
