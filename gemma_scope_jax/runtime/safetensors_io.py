"""Tensors in safetensors files, read and written without copies."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import FormatError

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
_MAX_HEADER = 2**20  # Gemma 27B's longest takes 100 kB.


class Tensor(NamedTuple):
    """A tensor in a file. `read` may be slow, and may return a view of the file."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def map_safetensors(path: str | pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file as views of it. safetensors itself has no bfloat16 and no parts of a tensor for NumPy.

    Raises:
      ValueError: if the file is incomplete.
    """
    with files.open_regular(path) as file, files.reading(path, "safetensors"):
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER:
            raise FormatError(f"its header has {size:,} bytes, but at most {_MAX_HEADER:,} are read")
        header = json.loads(file.read(size))
        try:
            with safetensors.safe_open(path, framework="numpy"):  # Checks that header and length agree.
                pass
        except safetensors.SafetensorError as error:
            raise FormatError(f"{error}; fetch it again") from error
    header.pop("__metadata__", None)
    is_empty = os.path.getsize(path) == 8 + size  # NumPy cannot map an empty file.
    data = np.zeros(0, np.uint8) if is_empty else np.memmap(path, np.uint8, mode="r", offset=8 + size)

    def tensor(name: str, entry: dict) -> Tensor:
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]

        def read() -> np.ndarray:
            if dtype not in DTYPES:
                raise FormatError(f"{path}: {name} has dtype {dtype}; only {', '.join(DTYPES)} are supported")
            with files.reading(path, "safetensors"):
                return data[begin:end].view(DTYPES[dtype]).reshape(shape)

        return Tensor(shape, dtype, read)

    return {name: tensor(name, entry) for name, entry in header.items()}


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a file without copying them whole; a transposed array is copied a part at a time."""
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
            for part in files.parts(value):
                file.write(np.ascontiguousarray(part).view(np.uint8).data)
