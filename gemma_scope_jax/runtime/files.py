"""Files that are written whole or not at all, and files of others opened with care."""

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
_MAX_DIRECTORY = 4 * 2**20  # Of an archive: the names of some 40,000 members.
_MAX_UNPACKED = 2**30  # Of an npz file of numbers.
# A million latents of the widest Gemma take 45 GB. More is a file with a hole, which takes hours to read.
_MAX_BYTES = 2**37

# What reading a damaged or forbidden file raises. Libraries add errors of their own; PyArrow's are ValueErrors.
READING_ERRORS = (OSError, EOFError, ValueError, RecursionError, zlib.error)


def parts(value: np.ndarray) -> list[np.ndarray]:
    """An array in parts of some 16 MB, for what would make a copy of all of it: a million latents take gigabytes."""
    return np.array_split(value, max(value.nbytes // 2**24, 1))


def open_regular(path: str | pathlib.Path, max_bytes: int = _MAX_BYTES) -> BinaryIO:
    """Opens a file of others to read: what a link leads to must be a regular file of bounded size.

    A pipe would keep the reader waiting for ever, a device never ends.

    Args:
      path: of the file, or of a link to it.
      max_bytes: the most that it may have.

    Raises:
      ValueError: it is not there, not to be read, no regular file, or larger.
    """
    with reading(path):
        # Without O_NONBLOCK, to open a pipe is to wait for its writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > max_bytes:
            file.close()
            if not stat.S_ISREG(found.st_mode):
                raise FormatError("it is no regular file")
            raise FormatError(f"it has {found.st_size:,} bytes, at most {max_bytes:,} are read")
        return file


def read_regular(path: str | pathlib.Path, max_bytes: int) -> bytes:
    """The content of a file of others; see `open_regular`.

    Raises:
      ValueError: see there.
    """
    with open_regular(path, max_bytes) as file, reading(path):
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
        if len(content) > size:  # Files of /proc have no size, and some have no end.
            raise FormatError(f"it has more than the {size:,} bytes that it claims")
    return content


@contextlib.contextmanager
def reading(path: str | pathlib.Path, kind: str = "") -> Iterator[None]:
    """Makes what goes wrong within it a ValueError that names the file.

    Args:
      path: of the file that is read.
      kind: what it should be, such as "JSON".

    Raises:
      ValueError: of `READING_ERRORS` any but that of a full disk.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {path}") from error
    except READING_ERRORS as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        # An OSError names the file itself, a second time.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        reason = printable(reason) or type(error).__name__
        raise FormatError(f"cannot read {path}{f' as {kind}' if kind else ''}: {reason}") from error


class _LiteralPath(type(epath.Path("/"))):
    """A path of which `glob` takes no part for a pattern but what it is given; epath's own takes all of it."""

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        return (self / found for found in glob.glob(pattern, root_dir=self))


def for_orbax(path: str | pathlib.Path) -> epath.Path:
    """A path as Orbax is to have it: absolute, and no pattern, by which it looks for the files that it merges."""
    return epath.Path(path) if "://" in str(path) else _LiteralPath(os.path.abspath(path))


def expanded(path: str | pathlib.Path) -> pathlib.Path:
    """A path on this machine with the home folder in the place of `~`."""
    return pathlib.Path(os.path.expanduser(path))


def matching(pattern: str | pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The deepest folder of a pattern that there is under its own name, and below it what matches the rest.

    So only what is not there as it is written is a pattern. A path that is there is both.
    """
    path = expanded(pattern)
    root = next(parent for parent in (path, *path.parents) if parent.exists())
    if root == path:
        return root, [path]
    found = glob.glob(str(path.relative_to(root)), root_dir=root, recursive=True)
    return root, [root / name for name in sorted(found)]


def check_readable(folder: pathlib.Path) -> None:
    """Raises PermissionError if a folder or anything in it may not be read, which says nothing of what it holds."""
    for path in (folder, *folder.rglob("*")):
        if path.exists() and not os.access(path, os.R_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextlib.contextmanager
def replacing_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new file to write, which takes the place of `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _writing(_partial(path), lambda partial: partial.touch()) as (partial, file):
        yield partial
        os.fsync(file)  # Or a crash of the machine may leave the name without the content.
        partial.replace(path)


@contextlib.contextmanager
def filling_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to fill, which becomes `folder` when all went well: it is whole or not there.

    Where there is one already, what is new joins it then, each folder and file in it whole.
    """
    folder = folder.resolve()  # `.` has no name of its own.
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(folder)
    if folder.is_dir():  # Within it, for it may be a disk of its own.
        partial = _partial(folder / folder.name)
    with _writing(partial, lambda partial: partial.mkdir(exist_ok=True)) as (partial, _):
        yield partial
        _join(partial, folder)


@contextlib.contextmanager
def _writing(
    partial: pathlib.Path, make: Callable[[pathlib.Path], None]
) -> Iterator[tuple[pathlib.Path, int]]:
    """What `make` makes, and its descriptor: locked as long as it has this name, and gone in the end."""
    file = None
    try:
        while file is None:  # Until it is locked, another process may take it for left over and remove it.
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
    """What is written first in the place of a path; what killed processes left there is removed."""
    for left in path.parent.glob(".*"):
        if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+", left.name):
            with contextlib.suppress(OSError):
                if (file := _lock(left)) is not None:  # Who writes it holds its lock.
                    _remove(left)
                    os.close(file)
    return path.with_name(f".{path.name}.{os.getpid()}")


def _lock(path: pathlib.Path, must: bool = True) -> int | None:
    """The descriptor of a file or folder, now locked; None where it is gone or another process holds its lock.

    Raises:
      OSError: it must be locked, and the file system knows no locks, as some network ones do not.
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
    """Finds out, before an hour's work and not after it, whether a file or folder can be written; leaves nothing.

    Raises:
      ValueError: it cannot.
    """
    try:
        str(path.absolute()).encode()  # Orbax takes no other names.
        if path.exists() and path.is_dir() != is_folder:
            raise OutputError(f"{path} is a {'file; give a folder' if is_folder else 'folder; give a file'}")
        there = path if is_folder else path.parent
        while not there.exists() and not there.is_symlink():
            there = there.parent
        names = path.relative_to(there).parts
        # By the name of what is to be written, whose writer removes it if this process is killed here.
        trial = _partial(there / (names[0] if names else there.resolve().name))
        with _writing(trial, lambda trial: trial.mkdir(exist_ok=True)) as (trial, _):
            for (
                name
            ) in names:  # Of the names that are to come, the longest is that of a file while it is written.
                _partial(trial / name).mkdir()
    except UnicodeEncodeError as error:
        raise OutputError(f"cannot write {path}: its name is not in UTF-8; give another place") from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; give another place") from error


def check_new(folder: pathlib.Path) -> None:
    """Raises ValueError if a folder to be written to cannot be, is something else, or holds anything."""
    check_output(folder, is_folder=True)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is there already; remove it, or give another --out")


def folder_names(names: Iterable[str]) -> dict[str, str]:
    """What the folder of each name is called: within the folder that it lies in, short, and no two alike.

    Also not but for their case, which some disks do not keep apart.
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
      ValueError: there is no such file, or something else in it.
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
    """Opens a zip archive of others, if the list of its members is of bounded length; see `open_regular`.

    Broken archives raise errors of many kinds, also while members are read.
    """
    with open_regular(path) as file:
        end = zipfile._EndRecData(file)  # ZipFile makes an object of each member that is listed.
        if end and end[zipfile._ECD_SIZE] > _MAX_DIRECTORY:
            raise FormatError(f"the list of its members has {end[zipfile._ECD_SIZE]:,} bytes")
        with zipfile.ZipFile(file) as archive:
            yield archive


def read_array(
    file: IO[bytes], size: int, shape: tuple[int, ...] | None = None, kinds: str = "f"
) -> np.ndarray:
    """An array of a member of an archive, whose header is believed only as far as the member is long.

    Args:
      file: the member.
      size: its bytes, as the archive has it.
      shape: that it must have; None: any.
      kinds: of its numbers, as NumPy names them.

    Raises:
      ValueError: it is of something else.
    """
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise FormatError(f"npy version {version} is not read")
    found, is_fortran, dtype = read_header[version](file, max_header_size=1000)
    if dtype.kind not in kinds:
        raise FormatError(f"an array of {dtype} is not read")
    count = int(np.prod([int(n) for n in found], dtype=object))
    if min(found, default=0) < 0 or not 0 <= size - count * dtype.itemsize < 2000:
        raise FormatError(f"an array of shape {found} in {size:,} bytes")
    if shape is not None and found != shape:
        raise FormatError(f"an array of shape {found}, expected {shape}")
    flat = np.empty(count, dtype)
    for part in parts(flat):
        content = file.read(part.nbytes)
        if len(content) != part.nbytes:
            raise FormatError(f"an array of shape {found} ends early")
        part[:] = np.frombuffer(content, dtype)
    file.read(1)  # The end, where the checksum is compared.
    return flat.reshape(found, order="F" if is_fortran else "C")


def read_npz(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Of an npz file of others the arrays of numbers by these names, each of the given shape; the rest is left.

    Raises:
      ValueError: the file is broken, or an array is of another shape or not of finite numbers.
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
    except Exception as error:  # Of as many kinds as there are ways to break an archive.
        raise FormatError(f"{path} is not a whole npz file: {printable(error)}") from error
    return arrays
