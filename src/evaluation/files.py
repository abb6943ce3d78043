"""Hash files, write them atomically, and lock them."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    with open_whole(path) as file:
        file.write(text)


@contextmanager
def open_whole(path: Path) -> Iterator[TextIO]:
    """A file that gets its name once it is complete. Its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write to a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def lock_file(path: Path, remedy: str) -> FileLock:
    """Acquire a lock, a file whose folder is created. Raises a `ValueError` with folder and `remedy` if another run
    holds it, and an `OSError` if it cannot be written."""
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{path.parent}: another run writes there; {remedy}") from error
    return lock
