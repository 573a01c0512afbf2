"""An experiment by its name: among those that come with the program, or the path of a file."""

import difflib
import importlib.util
import inspect
from pathlib import Path
import traceback
from types import ModuleType
from typing import Any

from zo_jax.train.config import ConfigError

FOLDER = Path(__file__).parent / "configs"


def shipped() -> list[str]:
    """Names of the experiments that come with the program."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def load(name: str) -> Any:
    """What `get_config()` of an experiment returns, which `validate` has not seen yet.

    Args:
      name: one of `shipped()`, or the path of a Python file; after a colon, an argument for its
        get_config.

    Raises:
      ConfigError: there is no such file, it has no get_config, or it raises.

    >>> load("icpram2025:200M").model.size
    '200M'
    """
    path, colon, argument = name.partition(":")
    file = FOLDER / f"{path}.py" if path in shipped() else Path(path)
    if not file.is_file():
        close = difflib.get_close_matches(Path(path).stem, shipped(), n=1)
        raise ConfigError(
            f"--config must be one of {', '.join(shipped())}, or the path of a Python file; there "
            f"is no file {path!r}" + (f"; did you mean {close[0]}?" if close else "")
        )
    if file.suffix != ".py":
        raise ConfigError(f"--config must name a Python file, which ends in .py; got {path!r}")
    get_config = getattr(_run(file), "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"{file} has no function get_config(), which returns the experiment")
    arguments = [argument] if colon else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        given = f"the argument {argument!r}" if colon else "no argument (--config=FILE:ARGUMENT)"
        raise ConfigError(
            f"get_config() of {file} cannot be called with {given}: {error}"
        ) from None
    try:
        return get_config(*arguments)
    except Exception as error:
        raise _problem(file, error) from error


def _run(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader  # the file ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _problem(file, error) from error
    return module


def _problem(file: Path, error: Exception) -> ConfigError:
    """What a file of the user's raised, and at which of its lines."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = (str(error).splitlines() or [""])[0]
    where = f"{file}, line {line}" if line else str(file)
    return ConfigError(f"{where}: {type(error).__name__}: {text}")
