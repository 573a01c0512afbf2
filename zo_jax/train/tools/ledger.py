"""What the ledger of a run holds, and the run's state or model at any step rebuilt from it.

zo-jax ledger RUN                          what the ledger of a run holds; RUN is the run's folder,
                                           or the ledger's file alone
zo-jax ledger RUN --to-step=N              rebuilds step N from the seed, and compares it with the
                                           run's checkpoints
zo-jax ledger RUN --to-step=N --out=DIR    and writes it to DIR as a checkpoint
zo-jax ledger RUN --base=MODEL --out=DIR   rebuilds a fine-tuned model from its base, a Hugging Face
                                           folder or a .gguf file, and writes it to DIR as a Hugging
                                           Face folder
"""

from collections.abc import Sequence
from pathlib import Path
import re
from typing import Any

import numpy as np
import tqdm

from zo_jax import models
from zo_jax.fingerprint import fingerprint
from zo_jax.ledger import BACKPROP, Ledger, LedgerError, read
from zo_jax.replay import arguments, check_replayable, check_start, versions
from zo_jax.train import run_state, steps
from zo_jax.train.arguments import Parser, fail, parse
from zo_jax.train.config import METHODS, UNRECORDED, Config, ConfigError, from_dict
from zo_jax.train.export import export
from zo_jax.train.model import make_model
from zo_jax.train.pretrained import Pretrained, open_pretrained
from zo_jax.train.run_folder import checkpoint
from zo_jax.train.run_folder.checkpoint import CheckpointError
from zo_jax.train.run_folder.folder import LEDGER, read_identity
from zo_jax.train.run_state import RunState
from zo_jax.train.validation import check_possible


def main(args: Sequence[str]) -> int:
    """The command line; returns the exit code: 1 if a checkpoint is not what the ledger says."""
    parser = Parser(
        prog="zo-jax ledger",
        usage="zo-jax ledger RUN [--to-step=N] [--base=MODEL] [--out=DIR]",
        description=__doc__,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a ledger's file")
    parser.add_argument(
        "--to-step", type=int, metavar="N", help="the step to rebuild (with --base: the last)"
    )
    parser.add_argument("--base", metavar="MODEL", help="the model that a fine-tune began with")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for its checkpoint, or for the model"
    )
    try:
        options = parse(parser, args)
        if options.out and options.to_step is None and not options.base:
            raise LedgerError("--out needs --to-step=N, the step to rebuild")
        return _run(options.run, options.to_step, options.base, options.out)
    except (LedgerError, ConfigError, CheckpointError, OSError) as error:
        return fail(error)


def _run(run: Path, to_step: int | None, base: str | None, out: Path | None) -> int:
    path, folder = (run, None) if run.is_file() else (run / LEDGER, run)
    if folder and folder.is_dir() and not path.exists():
        raise LedgerError(
            f"{folder} has no {LEDGER}: runs of modes zo, calibrate and instruct have one, without "
            f"zo.exact and without zo.method={', '.join(UNRECORDED)}; the others go on from their "
            "checkpoints"
        )
    ledger = read(path)
    identity = _identity(ledger, folder)
    config = from_dict(ledger.header.get("config"))
    config.model.path = base or config.model.path
    _tell(path, ledger, config)
    if to_step is None and base is None:
        return 0
    if "base" in ledger.header and not config.model.path:
        raise LedgerError("the run fine-tuned a pretrained model: give it as --base=MODEL")
    if base and "base" not in ledger.header:
        raise LedgerError("the run began from scratch, and has no base; leave --base out")
    check_possible(config)
    to_step = len(ledger.records) if to_step is None else to_step
    model = _make_model(config, ledger)
    state = run_state.init_state(config, model)
    _check_start(model, state, ledger)
    saved = _Saved(folder and folder / "checkpoints", config, model, state, identity)
    state, same = _replay(config, model, state, ledger, to_step, saved)
    print(f"replayed to step {to_step}; fingerprint {int(fingerprint(state)):08x}")
    if out and base:
        exported = export(model, state.params)
        models.save(out, exported, exported.params)
        print(f"the model is written to {out}")
    elif out:
        with checkpoint.open_checkpoints(out, None, identity, saved.part) as checkpoints:
            checkpoints.save(to_step, state)
            checkpoints.wait()
        print(f"written to {out / str(to_step)}")
    return 0 if same else 1


def _identity(ledger: Ledger, folder: Path | None) -> str:
    """The run's, which must be that of its folder."""
    identity = str(ledger.header.get("identity", ""))
    if not re.fullmatch("[0-9a-f]{0,16}", identity):
        raise LedgerError(f"the header's identity is {identity!r:.40}, which is none")
    if folder and (of_folder := read_identity(folder)) not in (None, identity):
        raise LedgerError(
            f"the ledger is of another run ({identity!r:.40}) than the folder ({of_folder}); put "
            "it in a folder of its own to replay it"
        )
    return identity


def _tell(path: Path, ledger: Ledger, config: Config) -> None:
    """What the ledger holds, and how far replay goes."""
    header, size = ledger.header, ledger.records.itemsize
    what = f"{header.get('perturbation')} queries"
    if config.zo.method in METHODS:
        what = f"numbers of {config.zo.method}"
    print(
        f"{path}: {len(ledger.records)} steps of {header['num_queries']} {what}, {size} bytes each"
    )
    if ledger.corrupt:
        print(f"damaged records: {', '.join(map(str, ledger.corrupt[:20]))}")
    if (num_backprop := int(np.sum(ledger.records["kind"] == BACKPROP))) or config.mode != "zo":
        print(
            f"mode {config.mode}: {num_backprop} steps have a backprop gradient and cannot be "
            "replayed; replay goes from the seed or a checkpoint to the step before the next of "
            "them"
        )
    print(f"replay from the seed reaches step {ledger.replayable(0)}")


def _make_model(config: Config, ledger: Ledger) -> Any:
    if config.model.path:
        return open_pretrained(config)
    vocab_size = ledger.header.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise LedgerError(f"the header has no size of the vocabulary: {vocab_size!r:.80}")
    return make_model(config.model, vocab_size)


def _check_start(model: Any, state: RunState, ledger: Ledger) -> None:
    if isinstance(model, Pretrained):
        mine, there = model.base_fingerprint(state.params), ledger.header["base"]
        if mine != there:
            raise LedgerError(
                f"the run began with another base: its fingerprint is {there}, that of "
                f"{model.settings.model.path} is {mine}; give the model that it began with"
            )
    if not check_start(state, ledger):
        print(
            f"the run began with {ledger.header.get('versions')}, and is replayed with "
            f"{versions()}: last bits may differ"
        )


class _Saved:
    """The checkpoints of a run: what they hold, and their fingerprints.

    Attributes:
      part: of a state that they have.
      fingerprints: by step.
    """

    def __init__(
        self, folder: Path | None, config: Config, model: Any, start: RunState, identity: str
    ):
        self.folder, self.start, self.identity = folder, start, identity
        self.part, self.fingerprints = run_state.kept_part(config, model), dict[int, int]()
        for step in checkpoint.complete_steps(folder) if folder else ():
            try:
                self.fingerprints[step] = self.fingerprint(self.load(step))
            except CheckpointError as error:
                print(f"the checkpoint of step {step} cannot be used: {error}")

    def load(self, step: int) -> RunState:
        assert self.folder
        return checkpoint.restore(self.folder, step, self.start, self.identity, self.part)

    def fingerprint(self, state: RunState) -> int:
        return int(fingerprint(self.part.select(state)))


def _replay(
    config: Config, model: Any, state: RunState, ledger: Ledger, to_step: int, saved: _Saved
) -> tuple[RunState, bool]:
    """The state after a step, and whether the checkpoints on its way are equal to it."""
    if ledger.replayable(0) < min(to_step, len(ledger.records)):
        nearest = max((step for step in saved.fingerprints if step <= to_step), default=0)
        if nearest:
            state = saved.load(nearest)
            print(f"beginning at the checkpoint of step {nearest}")
    start = int(state.step)
    check_replayable(ledger, start, to_step)
    update, same = steps.make_update(config, model), True
    left = tqdm.tqdm(
        ledger.records[start:to_step], initial=start, total=to_step, unit="step", desc="replay"
    )
    for step, record in enumerate(left, start + 1):
        state, _ = update(state, *arguments(record))
        if step in saved.fingerprints:
            equal = saved.fingerprints[step] == saved.fingerprint(state)
            word = "equal to the bit" if equal else "NOT EQUAL"
            left.write(f"step {step}: parameters and optimiser state are {word} to its checkpoint")
            same &= equal
    return state, same
