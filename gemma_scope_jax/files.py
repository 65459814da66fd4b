"""Files that are written whole or not at all, and tensors in safetensors files without copies of them."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
_MAX_HEADER = 16 * 2**20  # Gemma 27B's longest takes 100 kB.


class Tensor(NamedTuple):
    """A tensor of a file. `read` may be slow, and what it returns may be a view of the file."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def parts(value: np.ndarray) -> list[np.ndarray]:
    """An array in parts of some 16 MB, for what would make a copy of all of it: a million latents take gigabytes."""
    return np.array_split(value, max(value.nbytes // 2**24, 1))


@contextlib.contextmanager
def replacing_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new file to write, which takes the place of `path` when all went well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_new(folder: pathlib.Path) -> None:
    """Raises ValueError if a folder to be written to is something else, or holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; remove it, or give another --out")


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file.

    Raises:
      ValueError: there is no such file, or something else in it.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}")
    try:
        if path.stat().st_size > _MAX_HEADER:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error!r}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected an object")
    return found


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a value as indented JSON."""
    with replacing_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def map_safetensors(path: str | pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file as views of it; safetensors itself gives NumPy no bfloat16, nor parts of a tensor.

    Raises:
      ValueError: the file is not whole.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}")
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER:
                raise ValueError(f"its header has {size:,} bytes")
            header = json.loads(file.read(size))
        with safetensors.safe_open(path, framework="numpy"):  # Checks that header and length agree.
            pass
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    is_empty = os.path.getsize(path) == 8 + size  # NumPy maps no file of no bytes.
    data = np.zeros(0, np.uint8) if is_empty else np.memmap(path, np.uint8, mode="r", offset=8 + size)

    def tensor(name: str, entry: dict) -> Tensor:
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]

        def read() -> np.ndarray:
            if dtype not in DTYPES:
                raise ValueError(f"{path}: {name} is in {dtype}; only {', '.join(DTYPES)} are read")
            return data[begin:end].view(DTYPES[dtype]).reshape(shape)

        return Tensor(shape, dtype, read)

    return {name: tensor(name, entry) for name, entry in header.items()}


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file from arrays that are not copied whole; transposed ones are, a part at a time."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, value in tensors.items():
        entry = {"dtype": names[value.dtype], "shape": list(value.shape)}
        begin, end = end, end + value.nbytes
        header[name] = entry | {"data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # Tensors begin at multiples of eight.
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for value in tensors.values():
            for part in parts(value):
                file.write(np.ascontiguousarray(part).view(np.uint8).data)
