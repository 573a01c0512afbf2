"""Writes the model of a run as a Hugging Face folder, which transformers and zo-jax read.

zo-jax export RUN --out=DIR    the run's best state, or its latest; low-rank factors are merged
"""

from collections.abc import Sequence
from pathlib import Path

from zo_jax import models
from zo_jax.train.arguments import Parser, fail, parse
from zo_jax.train.export import load_run


def main(args: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = Parser(prog="zo-jax export", usage="zo-jax export RUN --out=DIR", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="the model's folder")
    try:
        options = parse(parser, args)
        model = load_run(options.run)
        models.save(options.out, model, model.params)
    except (ValueError, OSError) as error:
        return fail(error)
    print(f"the model is written to {options.out}")
    return 0
