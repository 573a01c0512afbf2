"""The file of a ledger: a header, and a record of one size for every step. Written, read, and
mended here.

Little-endian: the 8 bytes "ZOLEDGER", uint32 length and uint32 CRC-32 of a JSON header; then for
every step its number, kind and key (uint32 each, the key twice), loss and q projections (float32),
and a CRC-32 that begins with the header's. Nothing in it is executed.
"""

import json
from pathlib import Path
import struct
from typing import Any, NamedTuple
import zlib

import numpy as np

from zo_jax.atomic import AppendFile, write_atomic

_MAGIC = b"ZOLEDGER"
_MAX_HEADER, _MAX_QUERIES = 1 << 20, 1 << 20
# Kinds of steps: of forward passes alone; with a backprop gradient, or whose record was lost, which
# none can replay.
REPLAYABLE, BACKPROP, LOST = 0, 1, 2


class LedgerError(ValueError):
    """Something that is no ledger, or cannot be replayed as asked; the message says why."""


class Ledger(NamedTuple):
    """What a file holds.

    Attributes:
      header: `num_queries`, and what else was written; see `replay.make_header`.
      records: of steps 1, 2, ... in order; fields step, kind, key, loss, projections [q].
      valid: bool, a record each: its checksum is right.
    """

    header: dict[str, Any]
    records: np.ndarray
    valid: np.ndarray

    @property
    def corrupt(self) -> list[int]:
        """The steps whose records are damaged."""
        return [int(i) + 1 for i in np.flatnonzero(~self.valid)]

    def replayable(self, step: int) -> int:
        """The last step that can be reached from the state after `step` by replay."""
        usable = self.valid & (self.records["kind"] == REPLAYABLE)
        blocked = np.flatnonzero(~usable[step:])
        return step + int(blocked[0]) if len(blocked) else max(step, len(usable))


class Writer:
    """Appends to a ledger, one system call a record: a killed process leaves whole records, but for
    the last one.
    """

    def __init__(self, path: Path, header: dict[str, Any], num_steps: int = 0):
        """Opens a file, makes it if it is not there, and brings it to `num_steps` records.

        Later records are dropped. Missing and damaged ones are written as lost, which says that
        they cannot be replayed: `lost` has their steps.

        Raises:
          LedgerError: the file is no ledger, or its header says more than other `versions`.
          OSError: the disk.
        """
        self.path = Path(path)
        if not self.path.exists():
            text = json.dumps(header, sort_keys=True).encode()
            write_atomic(self.path, _MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text)
        there = read(self.path)
        if not same_run(there.header, header):
            raise LedgerError(f"{self.path} is the ledger of another run")
        text = json.dumps(there.header, sort_keys=True).encode()
        self._checksum, self._dtype = zlib.crc32(text), there.records.dtype
        self._start, num_there = len(_MAGIC) + 8 + len(text), len(there.records)
        self.lost = [step for step in there.corrupt if step <= num_steps]
        self.lost += range(num_there + 1, num_steps + 1)
        nothing = np.full(header["num_queries"], np.nan, np.float32)
        with self.path.open("r+b") as file:
            file.truncate(self._start + min(num_steps, num_there) * self._dtype.itemsize)
            for step in self.lost:
                file.seek(self._start + (step - 1) * self._dtype.itemsize)
                file.write(self._record(step, LOST, 0, np.nan, nothing))
        self._file = AppendFile(self.path)

    def append(self, step: int, kind: int, key: Any, loss: Any, projections_q: Any) -> None:
        """Writes the record of a step (from 1), whole.

        Args:
          step: the last one and one more.
          kind: REPLAYABLE or BACKPROP.
          key: the words of its key, uint32 [2]; loss: float32; projections_q: float32 [q].

        Raises:
          OSError: the disk; the file is as before.
        """
        self._file.append(self._record(step, kind, key, loss, projections_q))

    def sync(self) -> None:
        """Returns when the records are on the disk, not only with the kernel."""
        self._file.sync()

    def contents(self) -> bytes:
        """The file, even if it has been deleted, and the records that could not be written."""
        return self._file.contents()

    def close(self) -> None:
        self._file.close()

    def _record(self, step: int, kind: int, key: Any, loss: Any, projections_q: Any) -> bytes:
        record = np.zeros((), self._dtype)
        record["step"], record["kind"], record["key"] = step, kind, key
        record["loss"], record["projections"] = loss, projections_q
        record["crc"] = zlib.crc32(record.tobytes()[:-4], self._checksum)
        return record.tobytes()


def same_run(header: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two headers are of one run, which may have gone on with other versions or on another
    device.

    Those compute other last bits, so that only between equal `versions` the fingerprints of the
    start must be equal. An `identity`, where both have one, stands for all else that the headers
    say.
    """
    told_apart = ("identity",) if header.get("identity") and other.get("identity") else None
    names = {*(told_apart or {*header, *other}), "num_queries", "fingerprint"} - {
        "versions",
        "probe",
    }
    if header.get("versions") != other.get("versions"):
        names -= {"fingerprint"}
    as_text = lambda x: json.dumps({name: x.get(name) for name in names}, sort_keys=True)
    return as_text(header) == as_text(other) and _near(header.get("probe"), other.get("probe"))


def _near(likeness: Any, other: Any) -> bool:
    """Whether two starts, told by their likenesses (in a header: probe), are of the same numbers
    but for their last bits; one that is none says nothing.
    """
    if not isinstance(likeness, float) or not isinstance(other, float):
        return True
    return bool(np.isclose(likeness, other, rtol=1e-3, atol=1e-6))


def read(path: Path) -> Ledger:
    """Reads a ledger. A torn last record is left out; damaged ones are marked.

    Raises:
      LedgerError: the file is no ledger or its header is damaged.
      OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    prefix = len(_MAGIC) + 8
    if data[: len(_MAGIC)] != _MAGIC or len(data) < prefix:
        raise LedgerError(f"{path} is no ledger: it does not begin with {_MAGIC.decode()}")
    length, checksum = struct.unpack("<II", data[len(_MAGIC) : prefix])
    text = data[prefix : prefix + length]
    if length > _MAX_HEADER or len(text) < length or zlib.crc32(text) != checksum:
        raise LedgerError(f"{path}: the header is damaged: its checksum is not that of its text")
    try:
        header = json.loads(text)
        dtype = record_dtype(header["num_queries"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LedgerError(f"{path}: the header says nothing that can be used ({error!r})") from None
    body = data[prefix + length :]
    size = dtype.itemsize
    records = np.frombuffer(body, dtype, count=len(body) // size)
    valid = np.array(
        [
            zlib.crc32(body[i * size : (i + 1) * size - 4], checksum) == int(record["crc"])
            and int(record["step"]) == i + 1
            for i, record in enumerate(records)
        ],
        bool,
    )
    return Ledger(header, records, valid)


def record_dtype(num_queries: Any) -> np.dtype:
    """Of a record; ValueError if that is no number of queries."""
    if not isinstance(num_queries, int) or not 1 <= num_queries <= _MAX_QUERIES:
        raise ValueError(f"num_queries is {num_queries!r}")
    return np.dtype(
        [
            ("step", "<u4"),
            ("kind", "<u4"),
            ("key", "<u4", (2,)),
            ("loss", "<f4"),
            ("projections", "<f4", (num_queries,)),
            ("crc", "<u4"),
        ]
    )
