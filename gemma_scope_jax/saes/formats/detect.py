"""Any format, known by what lies at a path."""

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes.formats import (
    circuit_tracer,
    common,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    saelens,
)
from gemma_scope_jax.saes.jumprelu import SAE

# What an SAE's files are called, in every format: all of a repository that is ever fetched.
FILES = (
    "cfg.json",
    "sae_weights.safetensors",
    "site_mean.safetensors",
    "config.json",
    "params.safetensors",
    "params_layer_*.safetensors",
    "params.npz",
    "ae.pt",
    "config.yaml",
    "layer_*.safetensors",
)


class Found(NamedTuple):
    """An SAE of a file, with what the file tells of it."""

    name: str
    format: str
    sae: SAE
    about: common.About


def format_of(path: pathlib.Path) -> str | None:
    """The format of a file or folder; None if it looks like none."""
    for file_format, name in (
        ("saelens", "sae_weights.safetensors"),
        ("gemma_scope", "params.npz"),
        ("gemma_scope_2", "params.safetensors"),
        ("multi_layer", "params_layer_0.safetensors"),
        ("dictionary_learning", "ae.pt"),
        ("circuit_tracer", "config.yaml"),
        ("sparsify", "sae.safetensors"),
        ("saelens", "cfg.json"),
    ):
        if path.name == name or (path / name).exists():
            return file_format
    if re.fullmatch(r"layer_\d+\.safetensors", path.name):
        return "circuit_tracer"
    return "gemma_scope" if path.suffix == ".npz" else None


def read(path: pathlib.Path) -> Iterator[Found]:
    """The SAE of a file or folder in any format, or one after the other the transcoders of a set.

    Raises:
      ValueError: there is none, it is broken, or of a kind that is none of a JumpReLU SAE or transcoder.
    """
    file_format = format_of(path)
    folder = path.parent if path.is_file() else path
    match file_format:
        case "saelens":
            yield Found(folder.resolve().name, file_format, *saelens.read(folder))
        case "gemma_scope":
            file = path if path.suffix == ".npz" else path / "params.npz"
            # `average_l0_71` alone would say little.
            name = "_".join(file.resolve().parts[-4:-1]) if file.name == "params.npz" else file.stem
            yield Found(name, file_format, *gemma_scope.read(file))
        case "gemma_scope_2":
            yield Found(folder.resolve().name, file_format, *gemma_scope_2.read(folder))
        case "dictionary_learning":
            yield Found(folder.resolve().name, file_format, *dictionary_learning.read(folder))
        case "circuit_tracer":
            match = re.fullmatch(r"layer_(\d+)\.safetensors", path.name)
            for name, found, about in circuit_tracer.read(folder, int(match[1]) if match else None):
                yield Found(name, file_format, found, about)
        case "multi_layer":
            raise ValueError(
                f"{path} reads and predicts several layers at once; saes.formats.gemma_scope_2.read_layers reads it, "
                "and nothing here evaluates or converts it"
            )
        case "sparsify":
            raise ValueError(
                f"{path} is one of sparsify's TopK SAEs, which has no thresholds: it cannot be had as a JumpReLU SAE"
            )
        case _ if (path / "checkpoints").exists() and (path / "config.json").exists():
            raise ValueError(f"{path} is a run: export writes its SAEs, evaluate.py evaluates them")
        case _:
            below = (
                sorted(found.name for found in path.iterdir() if format_of(found)) if path.is_dir() else []
            )
            hint = f"; {printable(below[0], 100)} in it is one" if below else ""
            raise ValueError(
                f"{path} is neither a run directory nor an SAE: it has none of {', '.join(FILES)}{hint}"
            )
