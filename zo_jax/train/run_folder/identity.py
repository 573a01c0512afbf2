"""Which run a folder holds: a short name for what makes a run what it is, and what it may go on
with.
"""

import hashlib
import json
from typing import Any

import numpy as np

from zo_jax.train.config import ROUNDING, Config, extendable, fixed_fields
from zo_jax.train.settings import walk


def identify(config: Config, digests: dict[str, Any]) -> str:
    """The identity of a run that begins: 64 bits, in hexadecimal, of the fixed configuration and
    of what the run reads.

    The same command gives the same one on every machine, for nothing that is computed in floating
    point has a part in it. A field at its default has none either, so that a later version, with
    more fields, finds the same.
    """
    fixed, default = flatten(fixed_fields(config)), dict(walk(Config()))
    changed = {name: x for name, x in fixed.items() if x != default[name]}
    text = json.dumps([changed, digests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def words(identity: str) -> tuple[np.uint32, np.uint32]:
    """An identity as two words of 32 bits; zeros for none."""
    number = int(identity or "0", 16)
    return np.uint32(number >> 32), np.uint32(number % 2**32)


def compare(
    there: dict[str, Any], here: dict[str, Any], config: Config
) -> tuple[list[str], list[str]]:
    """What tells a run from the one in a folder, and what is to be told of it if nothing does.

    Args:
      there: its configuration and the digests of what it reads, by dotted names.
      here: likewise of the run that wants to go on.
      config: of the latter.

    Returns:
      (differences, each with both values; notes).
    """
    free, default = extendable(config), dict(walk(Config()))
    different, notes = [], []
    newer = [name for name in default if name not in there]
    for name in dict.fromkeys([*here, *there]):
        before = default[name] if name in newer else there.get(name, "absent")
        now = here.get(name, "absent")
        if before == now:
            continue
        if name not in free:
            absent = "absent, which means " if name in newer else ""
            # Packed tiers are kilobytes.
            different.append(f"{name} (there {absent}{before!r:.200}, here {now!r:.200})")
        elif free[name] == ROUNDING:
            notes.append(f"{name} was {before!r} and is {now!r}: last bits may differ by rounding")
    if newer:
        notes.append(
            f"the run began in a version without {', '.join(newer)}: taken as today's defaults"
        )
    return different, notes


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
