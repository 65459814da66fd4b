"""dictionary_learning's folder format: `ae.pt`, tensors saved by torch, and `config.json`.

The files are written and read without torch, and nothing but tensors is unpickled.
"""

import io
import os
import pathlib
import pickle
import re
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np

from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes.formats import common
from gemma_scope_jax.saes.jumprelu import SAE

_NO_TRANSCODER = "is a transcoder, which dictionary_learning cannot hold"
_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
}
_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_post")


def write(folder: pathlib.Path, sae: SAE, about: common.About, dtype: str = "float32") -> pathlib.Path:
    """Writes a folded SAE, with TransformerLens's name of its hook; returns the folder.

    Raises:
      ValueError: if the folder holds something else, or the SAE is a transcoder.
    """
    if about.hook_name_out:
        raise FormatError(f"{folder} {_NO_TRANSCODER}")
    common.check_own(folder, "ae.pt")
    d, m = sae.W_enc.shape
    residual = _RESIDUAL.fullmatch(about.hook_name)
    trainer = {
        "trainer_class": "JumpReluTrainer",
        "dict_class": "JumpReluAutoEncoder",
        "activation_dim": d,
        "dict_size": m,
        # Other readers assume the residual stream of this layer, whatever the site.
        "layer": int(found[1]) if (found := re.match(r"blocks\.(\d+)\.", about.hook_name)) else 0,
        "lm_name": about.model_name,
        "submodule_name": f"resid_post_layer_{residual[1]}" if residual else about.hook_name,
        "device": "cpu",
    }
    buffer = {"d_submodule": d, "io": "out", "ctx_len": about.context_length}
    files.write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer})
    with files.replacing_file(folder / "ae.pt") as partial:
        _write_torch(partial, common.arrays(sae, dtype))
    return folder


def read(folder: pathlib.Path) -> tuple[SAE, common.About]:
    """Reads a JumpReLU SAE.

    Raises:
      ValueError: if the folder is incomplete, holds another kind of SAE, or its pickle has more than tensors.
    """
    path = folder / "config.json"
    config = files.read_json(path)
    trainer, buffer = config.get("trainer"), config.get("buffer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") != "JumpReluAutoEncoder":
        kind = trainer.get("dict_class") if isinstance(trainer, dict) else trainer
        raise FormatError(f"{path} describes {printable(repr(kind))}; only 'JumpReluAutoEncoder' is read")
    length = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    # dictionary_learning's own names begin with the kind of site; only the residual stream's is known here.
    is_residual = type(layer) is int and (not isinstance(name, str) or name.startswith("resid_post"))
    about = common.About(
        model_name=str(trainer.get("lm_name") or ""),
        hook_name=f"blocks.{layer}.hook_resid_post" if is_residual else str(name),
        context_length=length if type(length) is int else 1024,
    )
    return common.sae_from_arrays(read_torch(folder / "ae.pt"), folder / "ae.pt"), about


# The opcodes with which torch writes a dict of tensors. Others do more than is needed: they allocate sizes that a
# file states, or set attributes of known objects.
_OPCODES = (
    pickle.PROTO, pickle.MARK, pickle.STOP, pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID, pickle.NONE,
    pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2,
    pickle.LONG1, pickle.BINUNICODE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET,
)  # fmt: skip


class _TensorUnpickler(pickle._Unpickler):
    """Unpickles torch's tensors as NumPy arrays, and nothing else."""

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}  # noqa: RUF012
    # Drops a state dict's metadata, which would be set as an attribute.
    dispatch[pickle.BUILD[0]] = lambda self: self.stack.pop()

    def __init__(self, file: io.BytesIO, storages: dict[str, np.ndarray]):
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> object:
        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return _rebuild
            case "torch", _ if name in _STORAGES:
                return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, but only tensors are allowed")

    def persistent_load(self, pid: object) -> np.ndarray:
        kind, storage, key, _, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it has a {kind!r} where a storage was expected")
        found = self._storages[key].view(_STORAGES[storage])
        if found.size != count:
            raise pickle.UnpicklingError(f"storage {key} has {found.size} values, expected {count}")
        return found


def _rebuild(
    storage: np.ndarray, offset: int, shape: tuple, strides: tuple, requires_grad: bool, hooks: object
) -> np.ndarray:
    """A tensor from its storage, in row-major or column-major order."""
    del requires_grad, hooks
    if len(shape) > 2 or len(strides) != len(shape) or any(not 0 <= n <= storage.size for n in shape):
        raise pickle.UnpicklingError(
            f"cannot read a tensor of {len(shape)} dimensions in a storage of {storage.size} values"
        )
    count = int(np.prod([int(n) for n in shape], dtype=object))
    if min(shape, default=0) < 0 or offset < 0 or offset + count > storage.size:
        raise pickle.UnpicklingError(
            f"a tensor of shape {shape} does not fit a storage of {storage.size} values"
        )
    flat = storage[offset : offset + count]
    rows = tuple(int(np.prod(shape[i + 1 :], dtype=object)) for i in range(len(shape)))
    if tuple(strides) == rows:
        return flat.reshape(shape)
    if len(shape) == 2 and tuple(strides) == (1, shape[0]):
        return flat.reshape(shape[::-1]).T
    raise pickle.UnpicklingError(f"cannot read a tensor of shape {shape} and strides {strides}")


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict written by `torch.save`; does not need torch or run code in the file.

    Raises:
      ValueError: if the file is damaged, or holds something else.
    """
    try:
        with files.open_archive(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > 2 * os.path.getsize(path):
                raise FormatError(
                    "it would more than double in size when unpacked, which torch's files do not"
                )
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            root = pickled.removesuffix("data.pkl")
            if archive.getinfo(pickled).file_size > 2**20:
                raise FormatError("its pickle is too large for a few tensors")
            storages = {
                name.removeprefix(f"{root}data/"): np.frombuffer(archive.read(name), np.uint8)
                for name in archive.namelist()
                if name.startswith(f"{root}data/")
            }
            found = _TensorUnpickler(io.BytesIO(archive.read(pickled)), storages).load()
    except Exception as error:  # A broken pickle can raise errors of any kind.
        raise FormatError(
            f"{path} is not a valid file of tensors saved by torch: {printable(repr(error))}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, np.ndarray) for value in found.values()):
        raise FormatError(f"{path} holds something other than tensors by name")
    return found


def _write_torch(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a state dict in the layout of `torch.save`: a pickle that refers to storages, and their raw bytes."""
    storages = {np.dtype(dtype): name for name, dtype in _STORAGES.items()}
    out = io.BytesIO()
    # The opcodes of protocol 2 are written directly: pickling torch's own functions needs torch.
    out.write(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for key, (name, value) in enumerate(tensors.items()):
        rows = [int(np.prod(value.shape[i + 1 :])) for i in range(value.ndim)]
        out.write(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((")
        out.write(_text("storage") + f"ctorch\n{storages[value.dtype]}\n".encode())
        out.write(_text(str(key)) + _text("cpu") + _int(value.size) + b"tQ" + _int(0))
        for numbers in (value.shape, rows):
            out.write(b"(" + b"".join(map(_int, numbers)) + b"t")
        out.write(b"\x89ccollections\nOrderedDict\n)RtR")  # requires_grad is False, and there are no hooks.
    out.write(b"u.")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", out.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, value in enumerate(tensors.values()):
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as file:
                for part in files.parts(value):
                    file.write(np.ascontiguousarray(part).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _int(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


FORMAT = common.Format(
    marks=("ae.pt",),
    files=("config.json", "ae.pt"),
    read=lambda path: [common.Found(common.name_of(path), *read(common.folder_of(path)))],
    write=write,
    obstacle=lambda kind: _NO_TRANSCODER if kind.is_transcoder else None,
)
