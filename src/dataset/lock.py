"""A lock that one process at a time holds, for what two runs must not write at once. Leaves out what that is."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a lock file; its folder is made. The system lets go of it when its owner ends, however that is.

    Raises:
        ValueError: another process holds it; names that process, its host, and since when. Or the folder cannot be
            written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
        while not (path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())):  # its owner just removed it
            os.close(descriptor)
            descriptor = _lock(path)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}".encode())
    except OSError as error:
        message = f"{path.parent}: cannot be written to ({error.strerror}); make it writable, or name another folder"
        raise ValueError(message) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise ValueError(f"{path.parent}: {owner} writes there; wait for its end, or name another folder") from error
    except OSError:  # a file system without locks: there is nothing to hold on to
        pass
    return descriptor
