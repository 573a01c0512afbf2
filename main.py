"""Trains a language model: `python main.py --config=configs/default.py --workdir=runs/mine`."""

from pathlib import Path
import shutil
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from zo_jax.config import Config, ConfigError, describe, validate

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(Path(__file__).parent / "configs" / "default.py"),
    "Python file with get_config(); its fields can be set on the command line:\n" + describe(Config()),
)
_WORKDIR = flags.DEFINE_string("workdir", "", "run folder (empty: runs/ and a name of the settings)")
_RESTART = flags.DEFINE_bool("restart", False, "delete the run in the run folder and start again")


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if rest[1:]:
            raise ConfigError(f"unexpected argument {rest[1]!r}")
        validate(_CONFIG.value)
        return rest
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError, OSError, SyntaxError) as e:
        _fail(e)


def _fail(error: Exception) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    config = _CONFIG.value
    # Here, not above: --help and bad flags need no JAX.
    from zo_jax.train import run_name, train_and_evaluate

    workdir = Path(_WORKDIR.value or Path("runs") / run_name(config))
    try:
        if _RESTART.value and (workdir / "config.json").exists():
            shutil.rmtree(workdir)
        train_and_evaluate(config, workdir)
    except (ConfigError, *_data_errors()) as error:
        _fail(error)


def _data_errors() -> tuple[type[Exception], ...]:
    from zo_jax.data import DataError

    return (DataError,)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
