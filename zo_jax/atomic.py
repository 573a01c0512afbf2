"""Files that stay whole when the process is killed or the disk is full."""

import os
from pathlib import Path
import shutil


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that, killed at any moment, the old one or the new one is there, whole."""
    new = path.with_name(path.name + ".tmp")
    try:
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(new, path)
    except OSError:
        if not new.is_dir():
            new.unlink(missing_ok=True)
        raise


def set_aside(path: Path) -> str:
    """Renames a file or a folder that cannot be used, and returns its new name; one set aside
    before is deleted.
    """
    aside = path.with_name(path.name + ".damaged")
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    else:
        aside.unlink(missing_ok=True)
    os.replace(path, aside)
    return aside.name


class AppendFile:
    """A file at whose end whole pieces are written, in one system call each if the disk allows.

    After a failure the file is as before, and nothing more is written: what is due is kept in
    memory, for `contents`.
    """

    def __init__(self, path: Path):
        """Opens a file that is there."""
        self._file = path.open("r+b", buffering=0)
        self._file.seek(0, os.SEEK_END)
        self._unwritten, self._error = b"", None

    def append(self, data: bytes) -> None:
        """Writes a piece, or raises OSError."""
        position, left = self._file.tell(), data
        try:
            if self._error:
                raise self._error
            while left:  # a full disk takes a part before it fails
                left = left[self._file.write(left) :]
        except OSError as error:
            self._unwritten, self._error = self._unwritten + data, error
            self._file.truncate(position)
            self._file.seek(position)
            raise

    def sync(self) -> None:
        """Returns when all is on the disk, not only with the kernel."""
        os.fsync(self._file.fileno())

    def contents(self) -> bytes:
        """All of the file, even if it has been deleted, and what could not be written."""
        position = self._file.tell()
        self._file.seek(0)
        data = self._file.read()
        self._file.seek(position)
        return data + self._unwritten

    def close(self) -> None:
        self._file.close()
