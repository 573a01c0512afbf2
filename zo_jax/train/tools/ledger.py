"""What the ledger of a run holds, and the run's state at any step rebuilt from it.

zo-jax ledger RUN                          what the ledger of a run folder holds
zo-jax ledger RUN --to-step=N              rebuilds step N from the seed, and compares it with the
run's checkpoints zo-jax ledger RUN --to-step=N --out=DIR    and writes it to DIR as a checkpoint
"""

from collections.abc import Sequence
from pathlib import Path
import re

import numpy as np
import tqdm

from zo_jax.fingerprint import fingerprint
from zo_jax.ledger import BACKPROP, LedgerError, read
from zo_jax.replay import arguments, check_replayable, check_start, versions
from zo_jax.train import steps
from zo_jax.train.arguments import Parser, fail, parse
from zo_jax.train.config import ConfigError, from_dict
from zo_jax.train.model import make_model
from zo_jax.train.run_folder import checkpoint
from zo_jax.train.run_folder.checkpoint import CheckpointError
from zo_jax.train.run_folder.folder import LEDGER, read_identity
from zo_jax.train.validation import check_possible


def main(args: Sequence[str]) -> int:
    """The command line; returns the exit code: 1 if a checkpoint is not what the ledger says."""
    parser = Parser(
        prog="zo-jax ledger",
        usage="zo-jax ledger RUN [--to-step=N] [--out=DIR]",
        description=__doc__,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--to-step", type=int, metavar="N", help="the step to rebuild")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for its checkpoint")
    try:
        options = parse(parser, args)
        if options.out and options.to_step is None:
            raise LedgerError("--out needs --to-step=N, the step to rebuild")
        return _rebuild(options.run, options.to_step, options.out)
    except (LedgerError, ConfigError, CheckpointError, OSError) as error:
        return fail(error)


def _rebuild(run: Path, to_step: int | None, out: Path | None) -> int:
    ledger = read(run / LEDGER)
    header, size = ledger.header, ledger.records.itemsize
    last = len(ledger.records)
    print(
        f"{run / LEDGER}: {last} steps of {header['num_queries']} {header.get('perturbation')} "
        f"queries, {size} bytes each"
    )
    identity = str(header.get("identity", ""))
    if not re.fullmatch("[0-9a-f]{0,16}", identity):
        raise LedgerError(f"the header's identity is {identity!r:.40}, which is none")
    if (of_folder := read_identity(run)) not in (None, identity):
        raise LedgerError(
            f"the ledger is of another run ({identity!r:.40}) than the folder ({of_folder}); put "
            f"it in a folder of its own "
            "to replay it"
        )
    if ledger.corrupt:
        print(f"damaged records: {', '.join(map(str, ledger.corrupt[:20]))}")
    config = from_dict(header.get("config"))
    check_possible(config)
    if (num_backprop := int(np.sum(ledger.records["kind"] == BACKPROP))) or config.mode != "zo":
        print(
            f"mode {config.mode}: {num_backprop} steps have a backprop gradient and cannot be "
            f"replayed; replay goes from the "
            "seed or a checkpoint to the step before the next of them"
        )
    print(f"replay from the seed reaches step {ledger.replayable(0)}")
    if to_step is None:
        return 0
    vocab_size = header.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise LedgerError(
            f"{run / LEDGER}: its header has no size of the vocabulary: {vocab_size!r:.80}"
        )
    model = make_model(config.model, vocab_size)
    state = steps.init_state(config, model)
    if not check_start(state, ledger):
        print(
            f"the run began with {header.get('versions')}, and is replayed with {versions()}: last "
            f"bits may differ"
        )
    folder = run / "checkpoints"
    saved = {}
    for step in checkpoint.complete_steps(folder):
        try:
            saved[step] = int(fingerprint(checkpoint.restore(folder, step, state, identity)))
        except CheckpointError as error:
            print(f"the checkpoint of step {step} cannot be used: {error}")
    if ledger.replayable(0) < min(to_step, last):
        nearest = max((step for step in saved if step <= to_step), default=0)
        if nearest:
            state = checkpoint.restore(folder, nearest, state, identity)
            print(f"beginning at the checkpoint of step {nearest}")
    check_replayable(ledger, int(state.step), to_step)
    update = steps.make_update(config, model)
    same = True

    start = int(state.step)
    left = tqdm.tqdm(
        ledger.records[start:to_step], initial=start, total=to_step, unit="step", desc="replay"
    )
    for step, record in enumerate(left, start + 1):
        state, _ = update(state, *arguments(record))
        if step in saved:
            equal = saved[step] == int(fingerprint(state))
            word = "equal to the bit" if equal else "NOT EQUAL"
            left.write(f"step {step}: parameters and optimiser state are {word} to its checkpoint")
            same &= equal
    print(f"replayed to step {to_step}; fingerprint {int(fingerprint(state)):08x}")
    if out:
        with checkpoint.open_checkpoints(out, None, identity) as checkpoints:
            checkpoints.save(to_step, state)
            checkpoints.wait()
        print(f"written to {out / str(to_step)}")
    return 0 if same else 1
