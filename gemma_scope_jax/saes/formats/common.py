"""The parts that formats share: `Format` itself, array names, metadata, and checks of files that are read."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np

from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import files, safetensors_io
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes import naming
from gemma_scope_jax.saes.jumprelu import SAE

_OPTIONAL = {"W_skip"}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class About:
    """A file's metadata of its SAE; fields that the file does not have keep their defaults."""

    model_name: str = ""  # the name on Hugging Face or in TransformerLens
    hook_name: str = ""  # the name of the site it reads, in either of them
    context_length: int = 1024
    text: str = ""  # the text it was trained on
    hook_name_out: str | None = None  # the name of the site a transcoder predicts
    l0: float | None = None  # as measured in training
    # What is needed to evaluate it on the same data and model; only this package's files have it. See
    # `config.DataConfig` and `config.Config`.
    held_out_fraction: float = 0.1
    data_seed: int = 0
    chat_template: bool = False
    rows: str = ""
    weights: str = ""
    tokenizer: str = ""
    gemma_dtype: str = "float32"
    # How and how far it was trained; see `config.BankConfig`.
    sparsity_coefficient: float | None = None
    objective: str = "linear"
    target_l0: float = 0.0
    seed: int = 0
    step: int | None = None
    site_mean_O: np.ndarray | None = dataclasses.field(default=None, compare=False)  # for mean ablation


class Found(NamedTuple):
    """An SAE read from a file, with the file's metadata."""

    name: str
    sae: SAE
    about: About
    format: str = ""  # the format's name, set by `formats.read`


class Kind(NamedTuple):
    """The properties of an SAE that decide whether a format can hold it."""

    site: Site
    target_site: Site  # the same as `site` for an autoencoder
    skip: bool
    dtype: str  # of the matrices

    @property
    def is_transcoder(self) -> bool:
        return self.target_site != self.site


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format that SAEs can be read from and, if it has `write`, written in.

    Args:
      marks: names of files that identify a folder as an SAE in this format, the surest first.
      read: yields the SAEs of a file or folder, one at a time.
      write: writes an SAE and its metadata to a folder, with matrices in a dtype of `DTYPES`; returns the folder, or
        the file that is the SAE. None: the format can only be read.
      files: the names of all files that it reads, or patterns; only these are downloaded from a repository.
      file_pattern: a regular expression for the names of files that are a complete SAE.
      obstacle: says why the format cannot hold a kind of SAE; None if it can.
      place: an SAE's path within an export's folder, from its name, member and mean L0.
      holds_many: whether one folder can hold several SAEs, so that they can have the same `place`.
      hooks: the library whose names of sites the files use.
      transcoders_read: the kind of site that transcoders in this format read; empty: any.
      embedding_scale: whether SAEs of `embed` read embeddings that are not multiplied by √D.
      is_published: whether a repository of SAEs can be published in this format.
    """

    marks: tuple[str, ...]
    read: Callable[[pathlib.Path], Iterable[Found]]
    write: Callable[[pathlib.Path, SAE, About, str], pathlib.Path] | None = None
    files: tuple[str, ...] = ()
    file_pattern: str | None = None
    obstacle: Callable[[Kind], str | None] = lambda kind: None
    place: Callable[[str, naming.Member, float], str] = naming.place
    holds_many: bool = False
    hooks: Literal["transformer_lens", "hugging_face"] = "transformer_lens"
    transcoders_read: str = ""
    embedding_scale: bool = False
    is_published: bool = False


def arrays(sae: SAE, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The arrays by name; `dtype` applies only to matrices.

    A rounded threshold could change which latents fire, so thresholds and biases stay float32.
    """
    named = {field.name: getattr(sae, field.name) for field in dataclasses.fields(sae)}
    return {
        name: np.asarray(value, ml_dtypes.bfloat16 if dtype == "bfloat16" and value.ndim == 2 else np.float32)
        for name, value in named.items()
        if value is not None
    }


def sae_from_arrays(tensors: Mapping[str, np.ndarray], source: pathlib.Path) -> SAE:
    """An SAE or transcoder from its arrays; float32 arrays are not copied.

    Raises:
      ValueError: if an array is missing, unknown, of the wrong shape or not finite, or if a threshold is negative.
    """
    names = {field.name for field in dataclasses.fields(SAE)}
    missing, extra = sorted(names - _OPTIONAL - tensors.keys()), sorted(tensors.keys() - names)
    if missing or extra:
        raise FormatError(
            f"{source} is not a JumpReLU SAE: missing arrays {missing}, unknown arrays {printable(extra)}"
        )
    for name in ("W_enc", "W_dec"):
        if tensors[name].ndim != 2 or not tensors[name].size:
            raise FormatError(f"{source}: {name} has shape {tensors[name].shape}, expected two dimensions")
    (d, m), o = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    shapes = {"W_enc": (d, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, o), "b_dec": (o,)}
    if "W_skip" in tensors:
        shapes["W_skip"] = (d, o)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise FormatError(f"{source}: {name} has shape {tensors[name].shape}, expected {shape}")
        if not _is_finite(tensors[name]):
            raise FormatError(f"{source}: {name} holds non-finite values")
    if (tensors["threshold"] < 0).any():
        raise FormatError(f"{source}: threshold holds negative values")
    return SAE(**{name: np.asarray(value, np.float32) for name, value in tensors.items()})


def _is_finite(value: np.ndarray) -> bool:
    with np.errstate(over="ignore"):  # A float64 beyond the range of float32 becomes infinite.
        return all(np.isfinite(part.astype(np.float32, copy=False)).all() for part in files.parts(value))


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file, as views of the file.

    Raises:
      ValueError: if the file is incomplete, or has too many tensors for an SAE.
    """
    tensors = safetensors_io.map_safetensors(path)
    if len(tensors) > 16:
        raise FormatError(f"{path} has {len(tensors)} tensors; an SAE has five or six")
    return {name: tensor.read() for name, tensor in tensors.items()}


def without_pre_encoder_bias(sae: SAE) -> SAE:
    """The SAE whose output on x is that of `sae` on x − b_dec, with the subtraction folded into b_enc."""
    shift_M, row = np.zeros(sae.b_enc.shape), 0
    for part in files.parts(sae.W_enc):
        shift_M += sae.b_dec[row : row + len(part)].astype(np.float64) @ part.astype(np.float64)
        row += len(part)
    return sae.replace(b_enc=(sae.b_enc - shift_M).astype(np.float32))


def in_other_units(sae: SAE, factor: float) -> SAE:
    """The SAE for activations scaled by `factor`: latents and reconstructions are scaled by it too."""
    scaled = {name: factor * getattr(sae, name) for name in ("b_enc", "threshold", "b_dec")}
    return jax.device_get(sae.replace(**scaled))


def folder_of(path: pathlib.Path) -> pathlib.Path:
    """The folder of an SAE, from the folder or a file in it."""
    return path.parent if path.is_file() else path


def name_of(path: pathlib.Path) -> str:
    """The name of an SAE that has its own folder: the name of that folder."""
    return folder_of(path).resolve().name


def check_own(folder: pathlib.Path, name: str) -> None:
    """Raises ValueError if a folder is not empty and has no file `name` from an earlier export."""
    if folder.exists() and any(folder.iterdir()) and not (folder / name).exists():
        raise FormatError(f"{folder} exists and holds something else; give another folder")
