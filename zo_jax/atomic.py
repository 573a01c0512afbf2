"""Files that stay whole when the process is killed or the disk is full."""

import os
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that, killed at any moment, the old one or the new one is there, whole."""
    new = path.with_name(path.name + ".tmp")
    try:
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def write_whole(file: BinaryIO, data: bytes) -> None:
    """Writes at the end of an unbuffered file, in one system call if the disk allows; if it fails, nothing is written."""
    position = file.tell()
    try:
        while data:  # a full disk takes a part before it fails
            data = data[file.write(data) :]
    except OSError:
        file.truncate(position)
        file.seek(position)
        raise


def read_open(file: BinaryIO) -> bytes:
    """All of an open file, which may have been deleted since it was opened."""
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    return data
