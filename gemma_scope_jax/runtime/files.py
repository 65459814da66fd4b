"""Files that are written whole or not at all, and untrusted files opened with care."""

import contextlib
import csv
import errno
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, BinaryIO

import numpy as np
from etils import epath

from gemma_scope_jax.runtime.errors import FormatError, NotFoundError, OutputError
from gemma_scope_jax.runtime.printing import printable

_MAX_JSON = 16 * 2**20
_MAX_DIRECTORY = 4 * 2**20  # The list of an archive's members: about 40,000 names.
_MAX_UNPACKED = 2**30  # The arrays of an npz file.
# A million latents of the widest Gemma take 45 GB. A larger file is sparse, and takes hours to read.
_MAX_BYTES = 2**37

# Errors from reading a damaged or forbidden file. Libraries add their own errors; PyArrow's are ValueErrors.
READING_ERRORS = (OSError, EOFError, ValueError, RecursionError, zlib.error)


def parts(value: np.ndarray) -> list[np.ndarray]:
    """An array in parts of about 16 MB, to avoid a copy of all of it: a million latents take gigabytes."""
    return np.array_split(value, max(value.nbytes // 2**24, 1))


def open_regular(path: str | pathlib.Path, max_bytes: int = _MAX_BYTES) -> BinaryIO:
    """Opens an untrusted file for reading, which must be a regular file of bounded size, or a link to one.

    A pipe would keep the reader waiting forever, and a device never ends.

    Args:
      path: the path of the file, or of a link to it.
      max_bytes: the maximum size of the file.

    Raises:
      ValueError: if the file does not exist, cannot be read, is not a regular file, or is larger.
    """
    with reading(path):
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > max_bytes:
            file.close()
            if not stat.S_ISREG(found.st_mode):
                raise FormatError("it is not a regular file")
            raise FormatError(f"it has {found.st_size:,} bytes, but at most {max_bytes:,} are read")
        return file


def read_regular(path: str | pathlib.Path, max_bytes: int) -> bytes:
    """The content of an untrusted file; see `open_regular`.

    Raises:
      ValueError: as in `open_regular`.
    """
    with open_regular(path, max_bytes) as file, reading(path):
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
        if len(content) > size:  # Files in /proc report no size, and some have no end.
            raise FormatError(f"it has more than the {size:,} bytes that it claims")
    return content


@contextlib.contextmanager
def reading(path: str | pathlib.Path, kind: str = "") -> Iterator[None]:
    """Turns errors while reading a file into a ValueError that names the file.

    Args:
      path: the path of the file.
      kind: the expected kind of file, such as "JSON".

    Raises:
      ValueError: if any of `READING_ERRORS` is raised, except that of a full disk.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist") from error
    except READING_ERRORS as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        # The text of an OSError would name the file a second time.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        reason = printable(reason) or type(error).__name__
        raise FormatError(f"cannot read {path}{f' as {kind}' if kind else ''}: {reason}") from error


class _LiteralPath(type(epath.Path("/"))):
    """A path that `glob` takes literally, except for its argument; epath's own treats all of it as a pattern."""

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        return (self / found for found in glob.glob(pattern, root_dir=self))


def for_orbax(path: str | pathlib.Path) -> epath.Path:
    """A path in the form that Orbax needs: absolute, and literal where Orbax globs for files to merge."""
    return epath.Path(path) if "://" in str(path) else _LiteralPath(os.path.abspath(path))


def expanded(path: str | pathlib.Path) -> pathlib.Path:
    """A path on this machine, with `~` replaced by the home folder."""
    return pathlib.Path(os.path.expanduser(path))


def matching(pattern: str | pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The deepest part of a pattern that exists as written, and the paths below it that match the rest.

    A path that exists as written is never a pattern: it is the only match.
    """
    path = expanded(pattern)
    root = next(parent for parent in (path, *path.parents) if parent.exists())
    if root == path:
        return root, [path]
    found = glob.glob(str(path.relative_to(root)), root_dir=root, recursive=True)
    return root, [root / name for name in sorted(found)]


def check_readable(folder: pathlib.Path) -> None:
    """Raises PermissionError if a folder or anything in it is unreadable, rather than damaged."""
    for path in (folder, *folder.rglob("*")):
        if path.exists() and not os.access(path, os.R_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextlib.contextmanager
def replacing_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new file to write, which replaces `path` if there was no error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _writing(_partial(path), lambda partial: partial.touch()) as (partial, file):
        yield partial
        os.fsync(file)  # Otherwise a crash of the machine may leave the name without the content.
        partial.replace(path)


@contextlib.contextmanager
def filling_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to fill, which becomes `folder` if there was no error: `folder` is whole or does not exist.

    If `folder` exists already, the new files and folders are moved into it, each of them whole.
    """
    folder = folder.resolve()  # `.` has no name.
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(folder)
    if folder.is_dir():  # Inside it, because it may be a separate disk.
        partial = _partial(folder / folder.name)
    with _writing(partial, lambda partial: partial.mkdir(exist_ok=True)) as (partial, _):
        yield partial
        _join(partial, folder)


@contextlib.contextmanager
def _writing(
    partial: pathlib.Path, make: Callable[[pathlib.Path], None]
) -> Iterator[tuple[pathlib.Path, int]]:
    """The path that `make` creates, and its descriptor; locked while it has this name, and removed at the end."""
    file = None
    try:
        while file is None:  # Before it is locked, another process may take it for a leftover and remove it.
            make(partial)
            file = _lock(partial, must=False)
        yield partial, file
    finally:
        _remove(partial)
        if file is not None:
            os.close(file)


def _join(source: pathlib.Path, target: pathlib.Path) -> None:
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _join(path, target / path.name)
    else:
        source.replace(target)


def _partial(path: pathlib.Path) -> pathlib.Path:
    """The temporary path that is written first for a path; leftovers of killed processes are removed."""
    for left in path.parent.glob(".*"):
        if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+", left.name):
            with contextlib.suppress(OSError):
                if (file := _lock(left)) is not None:  # Its writer would hold the lock.
                    _remove(left)
                    os.close(file)
    return path.with_name(f".{path.name}.{os.getpid()}")


def _lock(path: pathlib.Path, must: bool = True) -> int | None:
    """Locks a file or folder and returns its descriptor; None if it is gone or another process holds its lock.

    Raises:
      OSError: if `must` is True and the file system has no locks, as on some network file systems.
    """
    try:
        # NFS locks only files that are open for writing.
        file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), os.stat(path)):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if not must:
            return file
        os.close(file)
        raise
    os.close(file)
    return None


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_output(path: pathlib.Path, is_folder: bool) -> None:
    """Checks before hours of work that a file or folder can be written; leaves nothing behind.

    Raises:
      ValueError: if it cannot be written.
    """
    try:
        str(path.absolute()).encode()  # Orbax accepts only UTF-8 names.
        if path.exists() and path.is_dir() != is_folder:
            raise OutputError(f"{path} is a {'file; give a folder' if is_folder else 'folder; give a file'}")
        there = path if is_folder else path.parent
        while not there.exists() and not there.is_symlink():
            there = there.parent
        names = path.relative_to(there).parts
        # Named after the output, so that the output's writer removes it if this process is killed here.
        trial = _partial(there / (names[0] if names else there.resolve().name))
        with _writing(trial, lambda trial: trial.mkdir(exist_ok=True)) as (trial, _):
            # The temporary names are the longest.
            for name in names:
                _partial(trial / name).mkdir()
    except UnicodeEncodeError as error:
        raise OutputError(f"cannot write {path}: its name is not in UTF-8; give another path") from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; give another path") from error


def check_new(folder: pathlib.Path) -> None:
    """Raises ValueError if an output folder cannot be written, is not a folder, or is not empty."""
    check_output(folder, is_folder=True)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} already exists; remove it, or give another --out")


def folder_names(names: Iterable[str]) -> dict[str, str]:
    """A folder name for each name: safe, short and unique.

    No two of them differ only in case, because some disks ignore case.
    """
    made: dict[str, str] = {}
    for name in dict.fromkeys(names):
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:100].lstrip(".") or "_"
        while safe.lower() in map(str.lower, made.values()):
            safe += "_" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
        made[name] = safe
    return made


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file.

    Raises:
      ValueError: if the file does not exist or holds something else.
    """
    content = read_regular(path, _MAX_JSON)
    with reading(path, "JSON"):
        found = json.loads(content)
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds {type(found).__name__}, expected an object")
    return found


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_csv(path: pathlib.Path, records: Iterable[Mapping[str, object]]) -> None:
    """Writes a table with a column for each key that any record has."""
    records = list(records)
    columns = dict.fromkeys(key for record in records for key in record)
    with (
        replacing_file(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)


@contextlib.contextmanager
def open_archive(path: str | pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """Opens an untrusted zip archive whose list of members has a bounded length; see `open_regular`.

    A broken archive raises errors of many kinds, also while its members are read.
    """
    with open_regular(path) as file:
        end = zipfile._EndRecData(file)  # ZipFile makes an object for each listed member.
        if end and end[zipfile._ECD_SIZE] > _MAX_DIRECTORY:
            raise FormatError(f"the list of its members is too long: {end[zipfile._ECD_SIZE]:,} bytes")
        with zipfile.ZipFile(file) as archive:
            yield archive


def read_array(
    file: IO[bytes], size: int, shape: tuple[int, ...] | None = None, kinds: str = "f"
) -> np.ndarray:
    """The array in a member of an archive; its header is checked against the size of the member.

    Args:
      file: the member.
      size: the size of the member in bytes, according to the archive.
      shape: the expected shape; None for any.
      kinds: the allowed kinds of numbers, as in NumPy's `dtype.kind`.

    Raises:
      ValueError: if the member holds something else.
    """
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise FormatError(f"npy version {version} is not supported")
    found, is_fortran, dtype = read_header[version](file, max_header_size=1000)
    if dtype.kind not in kinds:
        raise FormatError(f"an array of dtype {dtype} is not supported")
    count = int(np.prod([int(n) for n in found], dtype=object))
    if min(found, default=0) < 0 or not 0 <= size - count * dtype.itemsize < 2000:
        raise FormatError(f"an array of shape {found} does not match its size of {size:,} bytes")
    if shape is not None and found != shape:
        raise FormatError(f"an array has shape {found}, expected {shape}")
    flat = np.empty(count, dtype)
    for part in parts(flat):
        content = file.read(part.nbytes)
        if len(content) != part.nbytes:
            raise FormatError(f"an array of shape {found} ends early")
        part[:] = np.frombuffer(content, dtype)
    file.read(1)  # At the end of the member, zipfile compares the checksum.
    return flat.reshape(found, order="F" if is_fortran else "C")


def read_npz(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays of an untrusted npz file with the given names and shapes; other arrays are ignored.

    Raises:
      ValueError: if the file is broken, or an array has another shape or values that are not finite numbers.
    """
    try:
        with open_archive(path) as archive:
            wanted = {
                name: info
                for info in archive.infolist()
                if (name := info.filename.removesuffix(".npy")) in shapes
            }
            if sum(info.file_size for info in wanted.values()) > _MAX_UNPACKED:
                raise FormatError(f"its arrays have more than {_MAX_UNPACKED:,} bytes")
            arrays = {}
            for name, info in wanted.items():
                with archive.open(info) as file:
                    arrays[name] = read_array(file, info.file_size, shapes[name], "fiu")
                if not np.isfinite(arrays[name]).all():
                    raise FormatError(f"{name} holds non-finite values")
    except Exception as error:  # A broken archive can raise any error.
        raise FormatError(f"{path} is not a valid npz file: {printable(error)}") from error
    return arrays
