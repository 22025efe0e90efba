"""A run folder has one owner: the process that holds the lock on the file ``lock`` in it, and loses it when it dies."""

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
    """Owns the folder ``run``, made where it is missing, and removed if nothing has been put into it by the end.

    Raises:
        BlockingIOError: another process owns it; it is named.
        NotADirectoryError: ``run`` is a file.
        FileExistsError: it is there already and was to be ``new``.
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
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _lock(run: Path) -> int:
    path = run / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise BlockingIOError(f"{run} must have one owner, got {owner}, which trains it now") from None
        except OSError as error:
            warn(f"{run} cannot be locked ({error.strerror}): let no second process train it")
        if _is(path, descriptor):
            break
        os.close(descriptor)  # an owner before us has removed it at its end, after we had opened it
    with suppress(OSError):  # on a full disk: the next one will not be told who we are
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
