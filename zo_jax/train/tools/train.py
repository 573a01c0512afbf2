"""Trains a GPT language model from scratch, with forward passes only or with backprop.

zo-jax train                                     the default experiment, in a folder of its own under runs/
zo-jax train --config=gpt2_20m --workdir=DIR --config.zo.num_queries=16
"""

from collections.abc import Sequence
import logging
from pathlib import Path

from zo_jax.train import processes
from zo_jax.train.arguments import Parser, add_experiment, fail, parse, read_experiment
from zo_jax.train.describe import default_run_name
from zo_jax.train.run import FAILURES, train_and_evaluate
from zo_jax.train.validation import validate


def main(args: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = _make_parser()
    # Orbax tells of every file it writes.
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        options = parse(parser, args)
        config = read_experiment(options)
        validate(config)
        workdir = Path(options.workdir or f"runs/{default_run_name(config)}")
        if options.distributed:
            processes.join(options.coordinator, options.num_processes, options.process_id)
        train_and_evaluate(config, workdir, options.restart)
    except FAILURES as error:
        return fail(error)
    return 0


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
        help="run folder (default: runs/ and a name that says and hashes the settings); a run that is there goes on",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="delete the run that the folder holds, and train from scratch",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes, of a cluster that JAX knows or of those named next",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    parser.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process_id", type=int, metavar="I", help="which this is, from 0")
    return parser
