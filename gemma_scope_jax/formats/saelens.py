"""SAELens' folder: `cfg.json` and `sae_weights.safetensors`."""

import dataclasses
import json
import pathlib

import numpy as np
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
    hook_name_out: str | None = None  # of a transcoder
    l0: float | None = None  # as measured in training
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
    files.check_own(folder, "cfg.json")
    d, m = sae.W_enc.shape
    config = {
        "architecture": _architecture(sae, about),
        "d_in": d,
        "d_sae": m,
        **({"d_out": sae.W_dec.shape[1]} if about.hook_name_out else {}),
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
            **({"hook_name_out": about.hook_name_out} if about.hook_name_out else {}),
            "hook_head_index": None,
            "l0": about.l0,
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
    tensors = files.arrays(sae)
    if "W_skip" in tensors:  # SAELens applies it as x @ W_skip.T.
        tensors["W_skip"] = np.ascontiguousarray(tensors["W_skip"].T)
    with files.replacing_file(folder / "sae_weights.safetensors") as partial:
        safetensors.numpy.save_file(tensors, partial)


def read_site_mean(folder: pathlib.Path) -> np.ndarray | None:
    """The mean that `write` was given, or None; SAELens does not look at it."""
    path = folder / _SITE_MEAN
    return safetensors.numpy.load_file(path)["site_mean"] if path.exists() else None


def _architecture(sae: SAE, about: About) -> str:
    if not about.hook_name_out:
        return "jumprelu"
    return "jumprelu_transcoder" if sae.W_skip is None else "jumprelu_skip_transcoder"


def read(folder: pathlib.Path) -> tuple[SAE, About]:
    """Reads a JumpReLU SAE or transcoder that needs nothing done to its input.

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
            metadata.get("hook_name_out"),
            metadata.get("l0"),
            **metadata.get(_OWN_KEY, {}),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a SAELens 6 config: {error!r}") from error
    for key, values in (
        ("architecture", ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")),
        ("apply_b_dec_to_input", (False,)),
        ("normalize_activations", ("none",)),
    ):
        if config.get(key) not in values:
            raise ValueError(
                f"{path} has {key} = {config.get(key)!r}; only {', '.join(map(repr, values))} is read"
            )
    if (config["architecture"] == "jumprelu") != (about.hook_name_out is None):
        raise ValueError(
            f"{path} has architecture {config['architecture']!r} and hook_name_out {about.hook_name_out!r}"
        )
    weights = folder / "sae_weights.safetensors"
    tensors = files.read_safetensors(weights)
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    sae = files.sae_from_arrays(tensors, weights)
    if (sae.W_skip is not None) != (config["architecture"] == "jumprelu_skip_transcoder"):
        raise ValueError(f"{path} has architecture {config['architecture']!r}, which its tensors are not of")
    return sae, about


def is_folder(path: pathlib.Path) -> bool:
    """Whether a path looks like a SAELens folder."""
    return (path / "cfg.json").exists()
