"""What a format is, and what they share: the arrays by name, what is told of them, checks of what is read."""

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
    """What a file says of its SAE beside the arrays; empty where it says nothing."""

    model_name: str = ""  # as Hugging Face or TransformerLens names it
    hook_name: str = ""  # what it reads, as either of them names it
    context_length: int = 1024
    text: str = ""  # that it was trained on
    hook_name_out: str | None = None  # what a transcoder predicts
    l0: float | None = None  # as measured in training
    # What it takes to evaluate it as it was trained, which only our own files say; see `config.DataConfig` and
    # `config.Config`.
    held_out_fraction: float = 0.1
    data_seed: int = 0
    chat_template: bool = False
    rows: str = ""
    weights: str = ""
    tokenizer: str = ""
    gemma_dtype: str = "float32"
    # What it was trained for, and how far; see `config.BankConfig`.
    sparsity_coefficient: float | None = None
    objective: str = "linear"
    target_l0: float = 0.0
    seed: int = 0
    step: int | None = None
    site_mean_O: np.ndarray | None = dataclasses.field(default=None, compare=False)  # for mean ablation


class Found(NamedTuple):
    """An SAE of a file, with what the file tells of it."""

    name: str
    sae: SAE
    about: About
    format: str = ""  # its name, which `formats.read` fills in


class Kind(NamedTuple):
    """What a format must have a place for, to hold an SAE."""

    site: Site
    target_site: Site  # an autoencoder's is the site that it reads
    skip: bool
    dtype: str  # of the matrices

    @property
    def is_transcoder(self) -> bool:
        return self.target_site != self.site


@dataclasses.dataclass(frozen=True)
class Format:
    """A format that SAEs are read in and, perhaps, written in.

    Args:
      marks: files by which a folder is known to hold an SAE in it, the surest first.
      read: the SAEs of a file or folder, one after the other.
      write: writes an SAE with what is told of it to a folder, matrices in a dtype of `DTYPES`; returns the folder,
        or the file that is the SAE. None: the format is only read.
      files: all files that it reads, or patterns of them: of a repository on the hub nothing else is fetched.
      file_pattern: of the names of files that are an SAE in it by themselves.
      obstacle: why it has no place for a kind of SAE; None: it has one.
      place: where a run's SAE goes below an export's folder, by its name, what it is, and its mean L0.
      holds_many: whether one folder holds several SAEs, so that they share a place.
      hooks: whose names of sites the files have.
      transcoders_read: the kind of site that its readers feed transcoders with; empty: any.
      embedding_scale: whether its readers feed SAEs of `embed` with embeddings that are not multiplied by √D.
      is_published: whether a repository of SAEs may be in it.
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
    """The arrays by their names; in bfloat16 the matrices alone.

    A threshold that is rounded lets latents through that training stopped, so thresholds and biases stay float32.
    """
    named = {field.name: getattr(sae, field.name) for field in dataclasses.fields(sae)}
    return {
        name: np.asarray(value, ml_dtypes.bfloat16 if dtype == "bfloat16" and value.ndim == 2 else np.float32)
        for name, value in named.items()
        if value is not None
    }


def sae_from_arrays(tensors: Mapping[str, np.ndarray], source: pathlib.Path) -> SAE:
    """An SAE or transcoder from its arrays; those in float32 are not copied.

    Raises:
      ValueError: an array is missing, too many, of the wrong shape, or not finite; or a threshold is negative.
    """
    names = {field.name for field in dataclasses.fields(SAE)}
    missing, extra = sorted(names - _OPTIONAL - tensors.keys()), sorted(tensors.keys() - names)
    if missing or extra:
        raise FormatError(
            f"{source} is no JumpReLU SAE: arrays missing {missing}, not known {printable(extra)}"
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
    with np.errstate(over="ignore"):  # Of float64, what float32 has no room for becomes infinite.
        return all(np.isfinite(part.astype(np.float32, copy=False)).all() for part in files.parts(value))


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file, as views of it.

    Raises:
      ValueError: the file is not whole, or has more tensors than an SAE.
    """
    tensors = safetensors_io.map_safetensors(path)
    if len(tensors) > 16:
        raise FormatError(f"{path} has {len(tensors)} tensors; an SAE has five or six")
    return {name: tensor.read() for name, tensor in tensors.items()}


def without_pre_encoder_bias(sae: SAE) -> SAE:
    """The SAE that does to x what `sae` does where b_dec is subtracted from x first."""
    shift_M, row = np.zeros(sae.b_enc.shape), 0
    for part in files.parts(sae.W_enc):
        shift_M += sae.b_dec[row : row + len(part)].astype(np.float64) @ part.astype(np.float64)
        row += len(part)
    return sae.replace(b_enc=(sae.b_enc - shift_M).astype(np.float32))


def in_other_units(sae: SAE, factor: float) -> SAE:
    """The SAE that does to factor · x what `sae` does to x, latents and reconstructions in the same units."""
    scaled = {name: factor * getattr(sae, name) for name in ("b_enc", "threshold", "b_dec")}
    return jax.device_get(sae.replace(**scaled))


def folder_of(path: pathlib.Path) -> pathlib.Path:
    """The folder of an SAE, of which a file may be given."""
    return path.parent if path.is_file() else path


def name_of(path: pathlib.Path) -> str:
    """What an SAE is called that has a folder of its own."""
    return folder_of(path).resolve().name


def check_own(folder: pathlib.Path, name: str) -> None:
    """Raises ValueError if a folder to be written to holds things and no file `name` of an older export."""
    if folder.exists() and any(folder.iterdir()) and not (folder / name).exists():
        raise FormatError(f"{folder} exists and holds something else; give another folder")
