"""Gemma Scope's format: one `params.npz` with the five float32 arrays of an SAE or a transcoder.

The file has no metadata; only the names of the folders around it show its model and site.
"""

import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes.formats import common
from gemma_scope_jax.saes.jumprelu import SAE

_NO_SKIP = "has a skip connection, which params.npz cannot hold; use --format=gemma_scope_2 or saelens"
_NO_BFLOAT16 = "cannot be in bfloat16, for which NumPy's files have no type"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_HOOKS = {
    "res": "blocks.{}.hook_resid_post",
    "mlp": "blocks.{}.hook_mlp_out",
    "att": "blocks.{}.attn.hook_z",
    "transcoders": "blocks.{}.ln2.hook_normalized",
}


def write(folder: pathlib.Path, sae: SAE, about: common.About, dtype: str = "float32") -> pathlib.Path:
    """Writes a folded SAE or transcoder as `params.npz`; returns the file.

    Raises:
      ValueError: if there is a skip connection, or another dtype than float32; the format cannot hold either.
    """
    del about
    path = folder / "params.npz"
    if sae.W_skip is not None:
        raise FormatError(f"{path} {_NO_SKIP}")
    if dtype != "float32":
        raise FormatError(f"{path} {_NO_BFLOAT16}")
    with files.replacing_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **common.arrays(sae))
    return path


def read(path: pathlib.Path) -> tuple[SAE, common.About]:
    """Reads an npz file, and the metadata in its path if that is as in one of Google's repositories.

    Raises:
      ValueError: if the file is damaged, has other arrays or pickled objects, or is too large when unpacked.
    """
    try:
        with files.open_archive(path) as archive:
            # SAELens also accepts lower-case names.
            names = {re.sub("^w_", "W_", name.removesuffix(".npy")): name for name in archive.namelist()}
            missing, extra = sorted(set(_NAMES) - names.keys()), sorted(names.keys() - set(_NAMES))
            if missing or extra:
                raise FormatError(f"missing arrays {missing}, unknown arrays {extra}")
            if sum(info.file_size for info in archive.infolist()) > 100 * os.path.getsize(path):
                raise FormatError("it would grow a hundredfold when unpacked")
            tensors = {}
            for name in _NAMES:
                info = archive.getinfo(names[name])
                with archive.open(info) as file:
                    tensors[name] = files.read_array(file, info.file_size)
    except Exception as error:  # A broken archive can raise errors of any kind.
        raise FormatError(f"{path} is not a valid npz file: {printable(error)}") from error
    return common.sae_from_arrays(tensors, path), about_from_path(path)


def about_from_path(path: pathlib.Path) -> common.About:
    """The metadata in the folder names of one of Google's repositories; empty for any other path."""
    # .../gemma-scope-2b-pt-res/.../layer_20/width_16k/average_l0_71/params.npz
    text = str(path)
    repository = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)", text)
    layer = re.search(r"(?:layer_(\d+)|embedding)/width_\w+/average_l0_(\d+)", text)
    if not repository or not layer:
        return common.About()
    size, tuning, site = repository.groups()
    is_embedding = layer[1] is None
    return common.About(
        model_name=f"google/gemma-2-{size}{'-it' if tuning == 'it' else ''}",
        hook_name="hook_embed" if is_embedding else _HOOKS[site].format(layer[1]),
        hook_name_out=f"blocks.{layer[1]}.hook_mlp_out" if site == "transcoders" else None,
        l0=float(layer[2]),
    )


def _found(path: pathlib.Path) -> Iterator[common.Found]:
    file = path if path.suffix == ".npz" else path / "params.npz"
    # `average_l0_71` alone would not identify the SAE.
    name = "_".join(file.resolve().parts[-4:-1]) if file.name == "params.npz" else file.stem
    yield common.Found(name, *read(file))


def _obstacle(kind: common.Kind) -> str | None:
    if kind.skip:
        return _NO_SKIP
    return None if kind.dtype == "float32" else _NO_BFLOAT16


FORMAT = common.Format(
    marks=("params.npz",),
    files=("params.npz",),
    file_pattern=r".*\.npz",
    read=_found,
    write=write,
    obstacle=_obstacle,
    transcoders_read="mlp_in_gain_free",
    embedding_scale=True,
    is_published=True,
)
