"""Trains a GPT language model from scratch, with forward passes only or with backprop.

zo-jax train                    the default experiment, in a folder of its own under runs/
zo-jax train --config=gpt2_20m --workdir=DIR --config.zo.num_queries=16
"""

import argparse
from collections.abc import Sequence
import logging
from pathlib import Path
import traceback

from zo_jax.train import processes
from zo_jax.train.arguments import Parser, add_experiment, fail, parse, read_experiment
from zo_jax.train.config import Config
from zo_jax.train.describe import default_run_name
from zo_jax.train.run import FAILURES, train_and_evaluate
from zo_jax.train.settings import ConfigError
from zo_jax.train.validation import validate


def main(args: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = _make_parser()
    # Orbax tells of every file it writes.
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        processes.join_if_asked(args)
        options, config = _read(parser, args)
        workdir = Path(options.workdir or f"runs/{default_run_name(config)}")
        train_and_evaluate(config, workdir, options.restart)
    except FAILURES as error:
        return fail(error)
    except Exception:
        if processes.count() == 1:
            raise
        # Python would end only after JAX has waited a minute for the others, which wait for this
        # process.
        traceback.print_exc()
        processes.leave(1)
    return 0


def _read(parser: Parser, args: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The flags, and the experiment that they name; what is wrong with them is told to the other
    processes.
    """
    try:
        options = parse(parser, args)
        config = read_experiment(options)
        validate(config)
    except ConfigError as error:
        raise processes.agree_on_failure(error) from error
    return options, config


def _make_parser() -> Parser:
    parser = Parser(
        prog="zo-jax train",
        usage="zo-jax train [--config=NAME] [--config.FIELD=VALUE ...] [--workdir=DIR] [--restart]",
        description=__doc__,
    )
    add_experiment(parser, default="default")
    parser.add_argument(
        "--workdir",
        default="",
        metavar="DIR",
        help="run folder (default: runs/ and a name that says and hashes the settings); a run that is there goes on",  # noqa: E501
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="delete the run that the folder holds, and train from scratch",
    )
    processes.add_flags(parser)
    return parser
