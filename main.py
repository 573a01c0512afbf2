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

from zo_jax.config import ConfigError, default_run_name, help_text, validate
from zo_jax.data import DataError

_CONFIG = config_flags.DEFINE_config_file(
    "config", str(Path(__file__).parent / "configs/default.py"), "The experiment, a file."
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; default runs/ and a name of the run.")
_RESTART = flags.DEFINE_bool("restart", False, "Delete the run that the folder holds.")


def _fail(error: Exception) -> NoReturn:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A config file that raises is reported with its traceback, whose last line says why.
    text = lines[-1 if "Traceback" in str(error) else 0] if lines else type(error).__name__
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
    if {"-h", "-help", "--help", "--helpshort", "--helpfull"} & set(argv[1:]):
        print(__doc__ + help_text())
        sys.exit(0)
    try:
        if rest := flags.FLAGS(argv)[1:]:
            raise ConfigError(f"{rest[0]!r} is no flag; write --config.FIELD=VALUE")
        validate(_CONFIG.value)
    except Exception as error:  # config files and ml_collections raise all kinds
        _fail(error)
    return argv


def main(argv: list[str]) -> None:
    from zo_jax import checkpoint, train  # slow to import, and not needed for --help

    logging.set_verbosity(logging.WARNING)  # orbax tells of every file it writes
    workdir = _WORKDIR.value or str(Path("runs") / default_run_name(_CONFIG.value))
    try:
        train.train_and_evaluate(_CONFIG.value, Path(workdir), _RESTART.value)
    except (ConfigError, DataError, checkpoint.CheckpointError) as error:
        _fail(error)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues the run in {workdir}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
