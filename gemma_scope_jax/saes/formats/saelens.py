"""SAELens's folder format: `cfg.json` and `sae_weights.safetensors`."""

import dataclasses
import pathlib

import numpy as np

from gemma_scope_jax.runtime import files, safetensors_io
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes.formats import common
from gemma_scope_jax.saes.jumprelu import SAE

# The version of SAELens whose layout is written. SAELens assumes that a file without a version is from before 6.0,
# and subtracts b_dec from the input.
_VERSION = "6.54.12"
_ARCHITECTURES = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_OWN_KEY = "gemma_scope_jax"
_SITE_MEAN = "site_mean.safetensors"
_OWN_FIELDS = {
    "held_out_fraction": float,
    "data_seed": int,
    "chat_template": bool,
    "rows": str,
    "weights": str,
    "tokenizer": str,
    "gemma_dtype": str,
    "sparsity_coefficient": float | int | None,
    "objective": str,
    "target_l0": float | int,
    "seed": int,
    "step": int | None,
}


def write(folder: pathlib.Path, sae: SAE, about: common.About, dtype: str = "float32") -> pathlib.Path:
    """Writes a folded SAE or transcoder, with TransformerLens's names of hooks; returns the folder.

    The site's mean, for mean ablation, is written beside it. Other files in the folder stay.

    Raises:
      ValueError: if the folder is not empty and is not a SAELens folder.
    """
    common.check_own(folder, "cfg.json")
    d, m = sae.W_enc.shape
    config = {
        "architecture": _architecture(sae, about),
        "d_in": d,
        "d_sae": m,
        **({"d_out": sae.W_dec.shape[1]} if about.hook_name_out else {}),
        "dtype": "float32",  # SAELens computes in it, and casts bfloat16 matrices and θ to it.
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
            # SAELens ignores keys that it does not know.
            _OWN_KEY: {name: getattr(about, name) for name in _OWN_FIELDS},
        },
    }
    # The config is written first: it marks a folder as one that can be written to again.
    files.write_json(folder / "cfg.json", config)
    if about.site_mean_O is not None:
        with files.replacing_file(folder / _SITE_MEAN) as partial:
            safetensors_io.write_safetensors(
                partial, {"site_mean": np.asarray(about.site_mean_O, np.float32)}
            )
    tensors = common.arrays(sae, dtype)
    if "W_skip" in tensors:  # SAELens applies it as x @ W_skip.T.
        tensors["W_skip"] = tensors["W_skip"].T
    with files.replacing_file(folder / "sae_weights.safetensors") as partial:
        safetensors_io.write_safetensors(partial, tensors)
    return folder


def _architecture(sae: SAE, about: common.About) -> str:
    if not about.hook_name_out:
        return "jumprelu"
    return "jumprelu_transcoder" if sae.W_skip is None else "jumprelu_skip_transcoder"


def read(folder: pathlib.Path) -> tuple[SAE, common.About]:
    """Reads a JumpReLU SAE or transcoder, written by any program and for any version of SAELens.

    Raises:
      ValueError: if the folder is incomplete, has another architecture, or leaves the meaning of its arrays open; or
        if SAELens would change the input in a way that cannot be folded into the arrays.
    """
    path = folder / "cfg.json"
    config = files.read_json(path)
    about = _about(config, path)
    _check_meaning(config, path)
    if (config["architecture"] == "jumprelu") != (about.hook_name_out is None):
        raise FormatError(
            f"{path} has architecture {config['architecture']!r} and hook_name_out "
            f"{printable(repr(about.hook_name_out))}; a transcoder must have a hook_name_out, an SAE must not"
        )
    weights = folder / "sae_weights.safetensors"
    tensors = common.read_safetensors(weights)
    factor = tensors.pop("scaling_factor", None)
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    sae = common.sae_from_arrays(tensors, weights)
    # A leftover of a finetuning method. SAELens once wrote it into every file; it has no effect if all are 1.
    if factor is not None and (factor.shape != sae.b_enc.shape or not np.allclose(factor.astype(float), 1)):
        raise FormatError(
            f"{weights} has a scaling_factor other than 1, which is not supported; multiply each row of W_dec by the "
            "factor of its latent, and save the SAE again without scaling_factor"
        )
    if (sae.W_skip is not None) != (config["architecture"] == "jumprelu_skip_transcoder"):
        raise FormatError(
            f"{path} has architecture {config['architecture']!r}, which does not match its tensors"
        )
    if config["apply_b_dec_to_input"]:
        sae = common.without_pre_encoder_bias(sae)
    if (mean_path := folder / _SITE_MEAN).exists():
        mean_O = common.read_safetensors(mean_path).get("site_mean")
        if mean_O is None or mean_O.shape != sae.b_dec.shape or not np.isfinite(mean_O).all():
            raise FormatError(f"{mean_path} has no finite site_mean of shape {sae.b_dec.shape}")
        about = dataclasses.replace(about, site_mean_O=mean_O)
    return sae, about


def read_about(folder: pathlib.Path) -> common.About:
    """Reads the metadata in a folder's config, without the arrays.

    Raises:
      ValueError: if the config is damaged, or is not a SAELens config.
    """
    path = folder / "cfg.json"
    return _about(files.read_json(path), path)


def _check_meaning(config: dict, path: pathlib.Path) -> None:
    """Raises ValueError if a config is for another kind of SAE, or leaves the meaning of the arrays open.

    Missing keys have the meaning that they have in SAELens 6, which also reads older files.
    """
    architecture = config.get("architecture", "standard")
    if architecture not in _ARCHITECTURES:
        without = ", a ReLU SAE without thresholds" if architecture == "standard" else ""
        raise FormatError(
            f"{path} has architecture = {printable(repr(architecture))}{without}; only "
            f"{', '.join(map(repr, _ARCHITECTURES))} are read"
        )
    if config.get("apply_b_dec_to_input") not in (False, True):
        # Every version with JumpReLU writes it. SAELens assumes true, but a file without it may have meant false.
        raise FormatError(
            f"{path} has apply_b_dec_to_input = {printable(repr(config.get('apply_b_dec_to_input')))}; add "
            '"apply_b_dec_to_input": true if b_dec is subtracted from the input, false otherwise'
        )
    norm = config.get("normalize_activations")
    if norm not in (None, False, "none"):
        # Before version 2 the value was true or false.
        is_scaled = norm is True or norm == "expected_average_only_in"
        raise FormatError(
            f"{path} has normalize_activations = {printable(repr(norm))}; only 'none' is read: "
            + (
                "its factor is not in the file, so fold it in with SAELens and save again"
                if is_scaled
                else "its effect on each activation cannot be folded into the arrays"
            )
        )
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation != "relu" or config.get("finetuning_scaling_factor"):
        raise FormatError(
            f"{path} has activation_fn = {printable(repr(activation))} and finetuning_scaling_factor = "
            f"{printable(repr(config.get('finetuning_scaling_factor')))}; only 'relu' without that factor is read"
        )


def _about(config: dict, path: pathlib.Path) -> common.About:
    # Before version 6, the keys of `metadata` were at the top level.
    metadata = config.get("metadata", config)
    own = metadata.get(_OWN_KEY, {}) if isinstance(metadata, dict) else None
    if not isinstance(own, dict):
        raise FormatError(f"{path} is not a SAELens config: its metadata is not an object")
    fields = {
        "model_name": (metadata.get("model_name") or "", str),
        "hook_name": (metadata.get("hook_name") or metadata.get("hook_point") or "", str),
        "hook_name_out": (metadata.get("hook_name_out"), str | None),
        "context_length": (metadata.get("context_size") or 1024, int),
        "l0": (metadata.get("l0"), float | int | None),
        "text": (metadata.get("dataset_path") or "", str),
        **{name: (own[name], kind) for name, kind in _OWN_FIELDS.items() if name in own},
    }
    if not own:
        # Files of other programs name a dataset on Hugging Face, which is not read here.
        fields["text"] = ("", str)
    ranges = {
        "context_length": (2, 2**20),
        "l0": (0, 1e9),
        "data_seed": (0, 2**63),
        "sparsity_coefficient": (0, 1e30),
        "target_l0": (0, 1e9),
        "seed": (0, 2**63),
        "step": (0, 2**63),
        "held_out_fraction": (0, 1),
    }
    for name, (value, kind) in fields.items():
        low, high = ranges.get(name, (None, None))
        if not isinstance(value, kind) or (
            low is not None and value is not None and not low <= value <= high
        ):
            raise FormatError(f"{path} is not a SAELens config: {name} is {printable(repr(value))}")
    return common.About(**{name: value for name, (value, _) in fields.items()})


FORMAT = common.Format(
    marks=("sae_weights.safetensors", "cfg.json"),
    files=("cfg.json", "sae_weights.safetensors", _SITE_MEAN),
    read=lambda path: [common.Found(common.name_of(path), *read(common.folder_of(path)))],
    write=write,
    is_published=True,
)
