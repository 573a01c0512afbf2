"""Replay: the state of a run after any step, from its initial parameters and its ledger alone.

A zeroth-order step depends on the data only through its q projections, so the initial parameters
and, for each step, its key and projections are the whole run. Replay calls `update` alone: no loss,
no data, every optimiser.
"""

import contextlib
import dataclasses
from pathlib import Path
import platform
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zo_jax import families
from zo_jax.fingerprint import fingerprint, likeness
from zo_jax.grouped import grouped
from zo_jax.layout import Layout
from zo_jax.ledger import BACKPROP, Ledger, LedgerError, same_run
from zo_jax.methods.fzoo import weights_of
from zo_jax.tiers import Tiers, pack, unpack
from zo_jax.trees import WHOLE, Subset
from zo_jax.update import TrainState, Update, make_update


def make_header(
    start: Any,
    *,
    num_queries: int,
    perturbation: str = "rademacher",
    rank: int = 1,
    groups: str = "none",
    tiers: Tiers = (),
    scope: str = "full",
    clip_norm: float = 0.0,
    rounding: str = "stochastic",
    method: dict[str, Any] | None = None,
    **info: Any,
) -> dict[str, Any]:
    """What fixes a replay, and what is told of it.

    Args:
      start: the state before step 1, told by its fingerprint.
      num_queries: q.
      perturbation, rank: the family of directions, as `families.by_name` knows it.
      groups: of `zo_jax.grouped`, "layers" or "leaves"; "none" for directions of all parameters.
      tiers: of that family, where it was given counts.
      scope: a name for the parameters that are trained, "full" for all.
      clip_norm, rounding: as in `make_update`.
      method: what makes weights of projections where it is not their mean, as
        `zo_jax.methods.weights_of` knows it.
      info: anything besides that JSON can hold, such as the configuration of the run and the name
        of the optimiser. An `identity` stands for all that makes the run what it is, and is what
        tells it from others.
    """
    return {
        "num_queries": num_queries,
        "perturbation": perturbation,
        "rank": rank,
        "groups": groups,
        "scope": scope,
        "clip_norm": clip_norm,
        "rounding": rounding,
        "fingerprint": int(fingerprint(start)),
        "probe": float(likeness(start)),
        "versions": versions(),
        **({"tiers": {path: pack(rows) for path, rows in tiers}} if tiers else {}),
        **({} if method is None else {"method": method}),
        **info,
    }


def versions() -> dict[str, str]:
    """What the last bits of a run depend on besides the run: JAX and the device."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else _processor()
    return {"jax": jax.__version__, "device": f"{device.platform} {kind}"}


def _processor() -> str:
    """The processor's name: XLA compiles for the one that it runs on, and to JAX all of them are
    "cpu".
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def arguments(
    record: np.void, layout: Layout | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(key, loss, projections): what `update` takes besides the state, on the devices of the
    layout.
    """
    parts = [np.asarray(record[name]) for name in ("key", "loss", "projections")]
    place = jnp.asarray if layout is None else layout.put_everywhere
    words, loss, projections = (place(x.astype(x.dtype.newbyteorder("="))) for x in parts)
    return jax.random.wrap_key_data(words, impl="threefry2x32"), loss, projections


def replay(
    start: Any,
    ledger: Ledger,
    optimizer: optax.GradientTransformation,
    *,
    subset: Subset | None = None,
    to_step: int | None = None,
) -> TrainState:
    """The state of a run after a step, to the bit, if backend and versions are those of the run.

    Args:
      start: the parameters before step 1, or the `TrainState` after any step. It is left as it is.
      ledger: from `read`.
      optimizer: the run's.
      subset: the parameters that the run trained, where it did not train all (`header["scope"]` has
        a name for them).
      to_step: the last one (default: of the ledger).

    Raises:
      LedgerError: the parameters are not those that the ledger begins with, or a step between
        cannot be replayed.

    >>> import jax, jax.numpy as jnp, optax, tempfile, zo_jax
    >>> from zo_jax import ledger
    >>> from zo_jax.replay import make_header, replay
    >>> from zo_jax.update import make_update
    >>> path, optimizer = f"{tempfile.mkdtemp()}/ledger.bin", optax.adam(0.1)
    >>> params, loss_fn = {"w": jnp.zeros(4)}, lambda p: jnp.sum((p["w"] - 1) ** 2)
    >>> state = zo_jax.Update(optimizer).init(params)
    >>> update = make_update(optimizer, zo_jax.rademacher())
    >>> writer = ledger.Writer(path, make_header(state, num_queries=2, optimizer="adam(0.1)"))
    >>> for step in range(1, 6):
    ...     key = jax.random.fold_in(jax.random.key(0), step)
    ...     loss, c = zo_jax.project(loss_fn, state.params, key, num_queries=2)
    ...     writer.append(step, ledger.REPLAYABLE, jax.random.key_data(key), loss, c)
    ...     state, _ = update(state, key, loss, c)
    >>> again = replay({"w": jnp.zeros(4)}, ledger.read(path), optimizer)
    >>> bool(jnp.all(again.params["w"] == state.params["w"]))
    True
    """
    header = ledger.header
    is_state = isinstance(start, TrainState)
    params = start.params if is_state else start
    if subset is None and header.get("scope") != "full":
        raise LedgerError(
            f"the run trained a part of the parameters, {header.get('scope')!r:.80}: give it as "
            f"subset"
        )
    subset = subset or WHOLE
    try:
        family = families.by_name(header["perturbation"], header["rank"])
        learns = header.get("groups", "none") != "none"
        if learns:
            tiers = tuple((path, unpack(text)) for path, text in header.get("tiers", {}).items())
            family = dataclasses.replace(grouped(header["groups"], family), tiers=tiers)
        parts: dict[str, Any] = {name: header[name] for name in ("clip_norm", "rounding")}
        parts["weights"] = weights_of(header.get("method"))
        update = make_update(optimizer, family, subset=subset, **parts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"the header does not say how to replay: {error!r}") from None
    state = start
    if not is_state:
        trained = subset.floating(params).select(params)
        own = family.start(trained) if learns else None
        state = Update(optimizer, subset=subset).init(params, own)
    if not is_state and not check_start(state, ledger):
        warnings.warn(
            f"the run began with {header.get('versions')}, and is replayed with {versions()}: last "
            f"bits may differ",
            stacklevel=2,
        )
    to_step = len(ledger.records) if to_step is None else to_step
    check_replayable(ledger, int(state.step), to_step)
    state = jax.tree.map(jnp.copy, state)  # the update donates it
    for record in ledger.records[int(state.step) : to_step]:
        state, _ = update(state, *arguments(record))
    return state


def check_start(state: Any, ledger: Ledger) -> bool:
    """Whether the state is that before step 1 to the bit; on other versions or another device its
    last bits may differ.

    Raises:
      LedgerError: it differs by more than that.
    """
    there, here = ledger.header.get("fingerprint"), int(fingerprint(state))
    as_made_here = {"fingerprint": here, "probe": float(likeness(state)), "versions": versions()}
    if not isinstance(there, int) or not same_run(ledger.header, ledger.header | as_made_here):
        raise LedgerError(
            "the ledger begins with other parameters or another optimiser: its fingerprint is "
            f"{there}, that of "
            f"those given {here}; give the ones that the run began with"
        )
    return there == here


def check_replayable(ledger: Ledger, step: int, to_step: int) -> None:
    """Raises LedgerError if replay cannot go from the state after `step` to `to_step`."""
    last = len(ledger.records)
    if not step <= to_step <= last:
        raise LedgerError(
            f"step {to_step} is not between {step}, where replay would begin, and {last}, the "
            f"ledger's last; "
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
            f"step {reached + 1} cannot be replayed: {why}; from step {step} replay reaches step "
            f"{reached}, and later "
            "ones from a checkpoint past it"
        )
