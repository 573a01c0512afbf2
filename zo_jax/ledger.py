"""The ledger: a run as its seed and some scalars a step, and its replay.

A zeroth-order step depends on the data only through its q projections, so the initial parameters and, for each step, its key and
projections are the whole run. Replay calls `update` alone: no loss, no data, every optimiser.

  python -m zo_jax.ledger RUN                          what the ledger of a run folder holds
  python -m zo_jax.ledger RUN --to-step=N              rebuilds step N from the seed, and compares it with the run's checkpoints
  python -m zo_jax.ledger RUN --to-step=N --out=DIR    and writes it to DIR as a checkpoint
"""

import argparse
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from zo_jax import checkpoint, perturbations, steps, updates
from zo_jax.config import Config, ConfigError, fixed_fields, from_dict
from zo_jax.fingerprint import fingerprint
from zo_jax.model import GPT, make_model
from zo_jax.records import BACKPROP, LOST, REPLAYABLE, Ledger, LedgerError, Writer, read
from zo_jax.scopes import make_scope
from zo_jax.sharding import Layout
from zo_jax.updates import TrainState
from zo_jax.validation import validate

__all__ = [
    "BACKPROP",
    "LOST",
    "REPLAYABLE",
    "Ledger",
    "LedgerError",
    "Writer",
    "make_header",
    "read",
    "replay",
]

FILE = "ledger.bin"


def make_header(
    start: TrainState,
    *,
    num_queries: int,
    perturbation: str = "rademacher",
    rank: int = 1,
    scope: str = "full",
    clip_norm: float = 0.0,
    rounding: str = "stochastic",
    **info: Any,
) -> dict[str, Any]:
    """What fixes a replay, and what is told of it.

    Args:
      start: the state before step 1, told by its fingerprint.
      num_queries: q.
      perturbation, rank: the family of directions, as `perturbations.by_name` knows it.
      scope: the parameters that are trained, as `scopes.make_scope` knows them.
      clip_norm, rounding: as in `updates.make_update`.
      info: anything besides that JSON can hold, such as the configuration of the run and the name of the optimiser.
    """
    device = jax.devices()[0]
    return {
        "num_queries": num_queries,
        "perturbation": perturbation,
        "rank": rank,
        "scope": scope,
        "clip_norm": clip_norm,
        "rounding": rounding,
        "fingerprint": int(fingerprint(start)),
        "versions": {"jax": jax.__version__, "device": f"{device.platform} {device.device_kind}"},
        **info,
    }


def run_header(config: Config, model: GPT, start: TrainState) -> dict[str, Any]:
    """The header of a run's ledger, from its resolved configuration."""
    return make_header(
        start,
        num_queries=config.zo.num_queries,
        perturbation=config.zo.perturbation,
        rank=config.zo.rank,
        scope=config.scope,
        clip_norm=config.instruct.grad_clip_norm,
        rounding=config.optimizer.rounding,
        vocab_size=model.vocab_size,
        config=fixed_fields(config),
    )


def arguments(
    record: np.void, layout: Layout | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(key, loss, projections): what `update` takes besides the state, on the devices of the layout."""
    parts = [np.asarray(record[name]) for name in ("key", "loss", "projections")]
    place = jnp.asarray if layout is None else layout.put_everywhere
    words, loss, projections = (place(x.astype(x.dtype.newbyteorder("="))) for x in parts)
    return jax.random.wrap_key_data(words, impl="threefry2x32"), loss, projections


def replay(
    start: Any,
    ledger: Ledger,
    optimizer: optax.GradientTransformation,
    *,
    to_step: int | None = None,
) -> TrainState:
    """The state of a run after a step, to the bit, if backend and versions are those of the run.

    Args:
      start: the parameters before step 1, or the `TrainState` after any step. It is left as it is.
      ledger: from `read`.
      optimizer: the run's.
      to_step: the last one (default: of the ledger).

    Raises:
      LedgerError: the parameters are not those that the ledger begins with, or a step between cannot be replayed.

    >>> import jax, jax.numpy as jnp, optax, tempfile, zo_jax
    >>> from zo_jax import ledger, updates
    >>> path, optimizer = f"{tempfile.mkdtemp()}/ledger.bin", optax.adam(0.1)
    >>> params, loss_fn = {"w": jnp.zeros(4)}, lambda p: jnp.sum((p["w"] - 1) ** 2)
    >>> state = updates.new_state(params, optimizer)
    >>> update = updates.make_update(optimizer, zo_jax.rademacher())
    >>> writer = ledger.Writer(path, ledger.make_header(state, num_queries=2, optimizer="adam(0.1)"))
    >>> for step in range(1, 6):
    ...     key = jax.random.fold_in(jax.random.key(0), step)
    ...     loss, c = zo_jax.project(loss_fn, state.params, key, num_queries=2)
    ...     writer.append(step, ledger.REPLAYABLE, jax.random.key_data(key), loss, c)
    ...     state, _ = update(state, key, loss, c)
    >>> again = ledger.replay({"w": jnp.zeros(4)}, ledger.read(path), optimizer)
    >>> bool(jnp.all(again.params["w"] == state.params["w"]))
    True
    """
    header = ledger.header
    is_state = isinstance(start, TrainState)
    params = start.params if is_state else start
    try:
        scope = make_scope(header["scope"], params)
        family = perturbations.by_name(header["perturbation"], header["rank"])
        parts = dict(clip_norm=header["clip_norm"], rounding=header["rounding"])
        update = updates.make_update(optimizer, family, scope=scope, **parts)
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"the header does not say how to replay: {error!r}") from None
    state = start if is_state else updates.new_state(params, optimizer, scope)
    if not is_state:
        check_start(state, ledger)
    to_step = len(ledger.records) if to_step is None else to_step
    check_replayable(ledger, int(state.step), to_step)
    state = jax.tree.map(jnp.copy, state)  # the update donates it
    for record in ledger.records[int(state.step) : to_step]:
        state, _ = update(state, *arguments(record))
    return state


def check_start(state: TrainState, ledger: Ledger) -> None:
    """Raises LedgerError if the state is not that before step 1."""
    there, here = ledger.header.get("fingerprint"), int(fingerprint(state))
    if there != here:
        raise LedgerError(
            f"the ledger begins with other parameters or another optimiser: its fingerprint is {there}, that of "
            f"those given {here}; give the ones that the run began with"
        )


def check_replayable(ledger: Ledger, step: int, to_step: int) -> None:
    """Raises LedgerError if replay cannot go from the state after `step` to `to_step`."""
    last = len(ledger.records)
    if not step <= to_step <= last:
        raise LedgerError(
            f"step {to_step} is not between {step}, where replay would begin, and {last}, the ledger's last; "
            "choose another"
        )
    reached = ledger.replayable(step)
    if reached < to_step:
        record, valid = ledger.records[reached], ledger.valid[reached]
        why = "its record is damaged"
        if valid:
            why = {BACKPROP: "it has a backprop gradient"}.get(
                int(record["kind"]), "its record is lost"
            )
        raise LedgerError(
            f"step {reached + 1} cannot be replayed: {why}; from step {step} replay reaches step {reached}, and later "
            "ones from a checkpoint past it"
        )


def main(args: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m zo_jax.ledger",
        description="Tells what the ledger of a run holds, and rebuilds the run's state at a step.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--to-step", type=int, metavar="N", help="the step to rebuild")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for its checkpoint")
    options = parser.parse_args(args)
    try:
        if options.out and options.to_step is None:
            raise LedgerError("--out needs --to-step=N, the step to rebuild")
        return _rebuild(options.run, options.to_step, options.out)
    except (LedgerError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _rebuild(run: Path, to_step: int | None, out: Path | None) -> int:
    ledger = read(run / FILE)
    header, size = ledger.header, ledger.records.itemsize
    last = len(ledger.records)
    print(
        f"{run / FILE}: {last} steps of {header['num_queries']} {header.get('perturbation')} queries, {size} bytes each"
    )
    if ledger.corrupt:
        print(f"damaged records: {', '.join(map(str, ledger.corrupt[:20]))}")
    config = from_dict(header.get("config"))
    validate(config)
    if (num_backprop := int(np.sum(ledger.records["kind"] == BACKPROP))) or config.mode != "zo":
        print(
            f"mode {config.mode}: {num_backprop} steps have a backprop gradient and cannot be replayed; replay goes from the "
            "seed or a checkpoint to the step before the next of them"
        )
    print(f"replay from the seed reaches step {ledger.replayable(0)}")
    if to_step is None:
        return 0
    model = make_model(config.model, header.get("vocab_size"))
    state = steps.init_state(config, model)
    check_start(state, ledger)
    folder = run / "checkpoints"
    saved = checkpoint.complete_steps(folder)
    if ledger.replayable(0) < min(to_step, last):
        nearest = max((step for step in saved if step <= to_step), default=0)
        if nearest:
            state = checkpoint.restore(folder, nearest, state)
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
            there = checkpoint.restore(folder, step, state)
            equal = int(fingerprint(there)) == int(fingerprint(state))
            word = "equal to the bit" if equal else "NOT EQUAL"
            left.write(f"step {step}: parameters and optimiser state are {word} to its checkpoint")
            same &= equal
    print(f"replayed to step {to_step}; fingerprint {int(fingerprint(state)):08x}")
    if out:
        with checkpoint.open_checkpoints(out, keep=None) as checkpoints:
            checkpoints.save(to_step, state)
            checkpoints.wait()
        print(f"written to {out / str(to_step)}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
