"""Allows one process at a time to train a run: it locks the file ``lock`` in the run's folder. The lock ends with the
process.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maml_cuda.warn import warn

LOCK = "lock"


@contextmanager
def locked_run(run: Path, *, new: bool = False) -> Iterator[None]:
    """Locks the folder ``run`` for the duration of the context.

    The folder is created if needed, and removed at the end if it is empty.

    Args:
        run: the run's folder.
        new: whether the folder must not exist yet.

    Raises:
        BlockingIOError: another process holds the lock; the error names it.
        NotADirectoryError: ``run`` is a file.
        FileExistsError: ``new``, and the folder exists.
    """
    if run.exists() and not run.is_dir():
        raise NotADirectoryError(f"{run} must be a folder, got a file")
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=not new)
    descriptor = _lock(run)
    try:
        yield
    finally:
        (run / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        for folder in made:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()


def _lock(run: Path) -> int:
    path = run / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "an unknown process"
            os.close(descriptor)
            raise BlockingIOError(f"{run} must not be in use by another process, got {owner}") from None
        except OSError as error:
            warn(f"{run} cannot be locked ({error.strerror}): make sure that no other process trains it")
        if _is(path, descriptor):
            break
        os.close(descriptor)  # the previous owner removed the file after it was opened here
    with suppress(OSError):  # if the disk is full, the file does not name its owner
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
