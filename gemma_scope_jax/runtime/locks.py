"""A file that one process holds at a time."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from gemma_scope_jax.runtime.errors import OutputError
from gemma_scope_jax.runtime.reporting import say, warn


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: str, waits: bool = False) -> Iterator[None]:
    """Holds a file that no other process holds; it is removed afterwards, and free when its holder is killed.

    Where the file system knows no locks, as some network ones do not, this says so and goes on.

    Args:
      path: of the file, made with its folder.
      busy: what to say where another process holds it.
      waits: whether to wait for it then, after that was printed.

    Raises:
      ValueError: another process holds it, and this one is not to wait.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a")
        except FileNotFoundError:  # Another process has just removed the folder.
            if path.is_symlink():  # To nowhere, and for ever.
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
                said = f"{path.parent} cannot be locked ({error.strerror}); see that no second process works in it"
                warn(f"{said}.")
            if not _is_at(file.fileno(), path):  # Its last holder has removed it: what is held is no file's.
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
