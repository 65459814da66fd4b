"""A lock file that one process holds at a time."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from gemma_scope_jax.runtime.errors import OutputError
from gemma_scope_jax.runtime.reporting import say, warn


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: str, waits: bool = False) -> Iterator[None]:
    """Holds a lock file, which is removed afterwards. The lock is free if its holder is killed.

    If the file system has no locks, as on some network file systems, this warns and goes on.

    Args:
      path: the path of the lock file, which is created with its folder.
      busy: the message if another process holds the lock.
      waits: whether to print this message and wait for the lock, instead of raising an error.

    Raises:
      ValueError: if another process holds the lock and `waits` is False.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a")
        except FileNotFoundError:  # Another process has just removed the folder.
            if path.is_symlink():  # A broken link stays broken.
                raise
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not waits:
                    raise OutputError(busy) from error
                say(busy)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                said = f"{path.parent} cannot be locked ({error.strerror}); make sure that no other process uses it"
                warn(f"{said}.")
            if not _is_at(file.fileno(), path):  # The last holder has removed the locked file.
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
