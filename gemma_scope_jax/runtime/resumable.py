"""Long work in parts that are kept, so that it goes on where it was cut off."""

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
    """Keeps a second process away from a folder of parts; one that is left empty goes away.

    Raises:
      ValueError: another process is at work there.
    """
    if not distributed.is_first():
        yield
        return
    try:
        busy = f"another process is writing to {folder.parent}; wait for it or stop it, or give another --out"
        with locks.locked(folder / ".lock", busy):
            yield
    finally:
        with contextlib.suppress(OSError):  # Something was cut off there before, or is under way.
            folder.rmdir()


class Parts:
    """What was measured of each batch, kept in a folder so that a long evaluation goes on where it was cut off."""

    def __init__(self, folder: pathlib.Path, identity: Mapping[str, object]) -> None:
        """Opens what lies in the folder of this `identity`, beside that of others, which were cut off, too."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:16]
        if distributed.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
        distributed.wait_for_all("the parts of an evaluation are opened")

    def read(self, index: int) -> dict[str, dict[str, np.ndarray]] | None:
        """What `write` was given; None if it was not, or if the file is damaged, which is said."""
        path = self._path(index)
        found = None
        if path.exists():
            try:
                found = _read_part(path)
            except (OSError, ValueError):
                say(f"{printable(path)} is damaged; it is measured again.")
        return found if distributed.all_agree(found is not None) else None

    def write(self, index: int, found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Keeps what was found, by SAE or site and quantity."""
        if distributed.is_first():
            # Where there are no locks, another process may have ended and taken the folder with it.
            with contextlib.suppress(FileNotFoundError):
                _write_part(self._path(index), found)
        distributed.wait_for_all(f"part {index} of an evaluation is written")

    def remove(self) -> None:
        """To be called when nothing can be lost any more."""
        if distributed.is_first():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> pathlib.Path:
        return self.folder / f"batch_{index:06}.npz"


_DIGEST = hashlib.sha256  # Before an archive of arrays: nothing of a damaged file is ever parsed.


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
    """What `_write_part` was given; ValueError if the file has changed since."""
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
