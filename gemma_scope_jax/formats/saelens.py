"""SAELens' folder: `cfg.json` and `sae_weights.safetensors`."""

import dataclasses
import json
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from gemma_scope_jax.formats import files
from gemma_scope_jax.sae import SAE

# The version of SAELens whose layout this is. Without a version in the file, SAELens takes it for one of before
# 6.0 and subtracts b_dec from the input.
_VERSION = "6.54.12"
_OWN_KEY = "gemma_scope_jax"
_SITE_MEAN = "site_mean.safetensors"
_OWN_FIELDS = (
    "held_out_fraction",
    "data_seed",
    "chat_template",
    "rows",
    "weights",
    "tokenizer",
    "gemma_dtype",
)


@dataclasses.dataclass(frozen=True)
class About:
    """What an SAE was trained on."""

    model_name: str  # as Hugging Face names it
    hook_name: str  # as TransformerLens names it
    context_length: int
    text: str
    # What it takes to evaluate it as it was trained; see `data.DataConfig` and `config.Config`.
    held_out_fraction: float = 0.1
    data_seed: int = 0
    chat_template: bool = False
    rows: str = ""
    weights: str = ""
    tokenizer: str = ""
    gemma_dtype: str = "float32"


def write(folder: pathlib.Path, sae: SAE, about: About, site_mean_D: np.ndarray | None = None) -> None:
    """Writes a folded SAE, and beside it the site's mean for mean ablation; other files in the folder stay.

    Raises:
      ValueError: the folder is no SAELens folder and holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not is_folder(folder):
        raise ValueError(f"{folder} exists and holds something else; give another folder")
    d, m = sae.W_enc.shape
    config = {
        "architecture": "jumprelu",
        "d_in": d,
        "d_sae": m,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if about.hook_name.endswith(".hook_z") else "none",
        "metadata": {
            "sae_lens_version": _VERSION,
            "sae_lens_training_version": None,
            "model_name": about.model_name,
            "model_class_name": "HookedTransformer",
            "hook_name": about.hook_name,
            "hook_head_index": None,
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            "prepend_bos": True,
            "context_size": about.context_length,
            "dataset_path": about.text,
            "seqpos_slice": [None],
            "exclude_special_tokens": True,
            "neuronpedia_id": None,
            # SAELens leaves alone what it does not know.
            _OWN_KEY: {name: getattr(about, name) for name in _OWN_FIELDS},
        },
    }
    # The config first: a folder that holds other files and no config is none of ours.
    with files.replacing_file(folder / "cfg.json") as partial:
        partial.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if site_mean_D is not None:
        with files.replacing_file(folder / _SITE_MEAN) as partial:
            safetensors.numpy.save_file({"site_mean": np.ascontiguousarray(site_mean_D, np.float32)}, partial)
    with files.replacing_file(folder / "sae_weights.safetensors") as partial:
        safetensors.numpy.save_file(files.arrays(sae), partial)


def read_site_mean(folder: pathlib.Path) -> np.ndarray | None:
    """The mean that `write` was given, or None; SAELens does not look at it."""
    path = folder / _SITE_MEAN
    return safetensors.numpy.load_file(path)["site_mean"] if path.exists() else None


def read(folder: pathlib.Path) -> tuple[SAE, About]:
    """Reads a JumpReLU SAE that needs nothing done to its input.

    Raises:
      ValueError: the folder is not whole, or holds another architecture.
    """
    path = folder / "cfg.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        metadata = config["metadata"]
        metadata["sae_lens_version"]  # Older files mean other things by the same keys.
        about = About(
            metadata["model_name"],
            metadata["hook_name"],
            metadata["context_size"],
            metadata["dataset_path"],
            **metadata.get(_OWN_KEY, {}),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a SAELens 6 config: {error!r}") from error
    for key, value in (
        ("architecture", "jumprelu"),
        ("apply_b_dec_to_input", False),
        ("normalize_activations", "none"),
    ):
        if config.get(key) != value:
            raise ValueError(f"{path} has {key} = {config.get(key)!r}; only {value!r} is read")
    weights = folder / "sae_weights.safetensors"
    try:
        tensors = safetensors.numpy.load_file(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{weights} cannot be read: {error}") from error
    return files.sae_from_arrays(tensors, weights), about


def is_folder(path: pathlib.Path) -> bool:
    """Whether a path looks like a SAELens folder."""
    return (path / "cfg.json").exists()
