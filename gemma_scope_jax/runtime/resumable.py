"""Long work in parts that are kept, so that it resumes after an interruption."""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import numpy as np

from gemma_scope_jax.runtime import distributed, files, locks
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say


@contextlib.contextmanager
def holding_parts(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a folder of parts; removes the folder if it is empty at the end.

    Raises:
      ValueError: if another process is using the folder.
    """
    if not distributed.is_first():
        yield
        return
    try:
        busy = f"another process is writing to {folder.parent}; wait for it or stop it, or give another --out"
        with locks.locked(folder / ".lock", busy):
            yield
    finally:
        with contextlib.suppress(OSError):  # It still has the parts of other work, interrupted or running.
            folder.rmdir()


class Parts:
    """The measurements of each batch, kept in a folder so that a long evaluation resumes after an interruption."""

    def __init__(self, folder: pathlib.Path, identity: Mapping[str, object]) -> None:
        """Opens the parts of this `identity`; parts of other interrupted evaluations stay beside them."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:16]
        if distributed.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
        distributed.wait_for_all("the parts of an evaluation are opened")

    def read(self, index: int) -> dict[str, dict[str, np.ndarray]] | None:
        """The measurements that `write` kept; None if there are none, or if the file is damaged, which is logged."""
        path = self._path(index)
        found = None
        if path.exists():
            try:
                found = _read_part(path)
            except (OSError, ValueError):
                say(f"{printable(path)} is damaged; measuring this batch again.")
        return found if distributed.all_agree(found is not None) else None

    def write(self, index: int, found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Keeps the measurements of a batch, by SAE or site and by quantity."""
        if distributed.is_first():
            # Without file locks, another process may have finished and removed the folder.
            with contextlib.suppress(FileNotFoundError):
                _write_part(self._path(index), found)
        distributed.wait_for_all(f"part {index} of an evaluation is written")

    def remove(self) -> None:
        """Removes the parts. Call it once the result of all parts is saved."""
        if distributed.is_first():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> pathlib.Path:
        return self.folder / f"batch_{index:06}.npz"


_DIGEST = hashlib.sha256  # In a file it precedes the arrays, so that a damaged file is never parsed.


def _write_part(path: pathlib.Path, found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    arrays = {f"{of}/{name}": value for of, values in found.items() for name, value in values.items()}
    size = _DIGEST().digest_size
    with files.replacing_file(path) as partial, partial.open("w+b") as file:
        file.seek(size)
        np.savez(file, **arrays)
        file.seek(size)
        digest = hashlib.file_digest(file, _DIGEST).digest()
        file.seek(0)
        file.write(digest)


def _read_part(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """The measurements that `_write_part` wrote. Raises ValueError if the file has changed since."""
    found: dict[str, dict[str, np.ndarray]] = {}
    size = _DIGEST().digest_size
    with files.open_regular(path) as file:
        if file.read(size) != hashlib.file_digest(file, _DIGEST).digest():
            raise FormatError(f"{path} is damaged")
        file.seek(size)
        with np.load(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                of, _, quantity = key.rpartition("/")
                found.setdefault(of, {})[quantity] = arrays[key]
    return found
