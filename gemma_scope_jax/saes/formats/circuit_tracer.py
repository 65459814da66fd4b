"""circuit-tracer's folder format: `config.yaml`, and one transcoder per layer in `layer_N.safetensors`."""

import pathlib
import re
from collections.abc import Iterator

import numpy as np
import yaml

from gemma_scope_jax.models.sites import site_from_hook
from gemma_scope_jax.runtime import files, safetensors_io
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes.formats import common
from gemma_scope_jax.saes.jumprelu import SAE

# circuit-tracer's names of the arrays. Its W_enc is [M, D], and it applies the skip connection as x @ W_skip.T.
_NAMES = {
    "W_enc": "W_enc",
    "W_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "activation_function.threshold",
    "W_skip": "W_skip",
}
_TURNED = ("W_enc", "W_skip")
_MAX_CONFIG = 2**14  # In bytes: a megabyte of YAML takes 20 seconds to read.


def _write_config(folder: pathlib.Path, about: common.About) -> None:
    """Writes the config that all layers share; its hooks are TransformerLens names without the layer."""
    hooks = {
        "feature_input_hook": re.sub(r"^blocks\.\d+\.", "", about.hook_name),
        "feature_output_hook": re.sub(r"^blocks\.\d+\.", "", about.hook_name_out or about.hook_name),
    }
    config = {"model_kind": "transcoder_set", "model_name": about.model_name, **hooks}
    with files.replacing_file(folder / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def write(folder: pathlib.Path, sae: SAE, about: common.About, dtype: str = "float32") -> pathlib.Path:
    """Writes one layer's folded transcoder; returns the file. circuit-tracer needs all layers, in one width."""
    _write_config(folder, about)
    layer = site_from_hook(about.hook_name).layer
    tensors = {
        _NAMES[name]: value.T if name in _TURNED else value
        for name, value in common.arrays(sae, dtype).items()
    }
    path = folder / f"layer_{layer}.safetensors"
    with files.replacing_file(path) as partial:
        safetensors_io.write_safetensors(partial, tensors)
    return path


def read(folder: pathlib.Path, only: int | None = None) -> Iterator[common.Found]:
    """Yields the transcoder of each layer, or of the layer `only`, one at a time.

    Raises:
      ValueError: if a file is incomplete, or the folder is not a set of per-layer transcoders.
    """
    path = folder / "config.yaml"
    content = files.read_regular(path, _MAX_CONFIG)
    try:
        if content.count(b"[") + content.count(b"{") > 100:  # Nested brackets are slow to parse.
            raise FormatError("it has more than 100 brackets")
        # Only strings are needed, and parsing other types can fail in more ways.
        config = yaml.load(content.decode(), Loader=yaml.BaseLoader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise FormatError(f"{path} is not readable YAML: {printable(error)}") from error
    keys = ("model_kind", "model_name", "feature_input_hook", "feature_output_hook")
    if not isinstance(config, dict) or not all(isinstance(config.get(key), str) for key in keys):
        raise FormatError(f"{path} is not a circuit-tracer config: it must have {', '.join(keys)}")
    if config["model_kind"] != "transcoder_set":
        raise FormatError(
            f"{path} has model_kind {printable(repr(config['model_kind']))}; only 'transcoder_set' is read"
        )
    if "transcoders" in config:
        raise FormatError(f"{path} refers to transcoders in other places; read each of them separately")
    by_layer = {
        int(match[1]): found
        for found in folder.glob("layer_*.safetensors")
        if (match := re.fullmatch(r"layer_(\d+)\.safetensors", found.name)) and only in (None, int(match[1]))
    }
    if not by_layer:
        raise FormatError(f"{folder} has a config.yaml but no layer_{only or 0}.safetensors")
    ours = {theirs: name for name, theirs in _NAMES.items()}
    for layer, found in sorted(by_layer.items()):
        tensors = {ours.get(name, name): value for name, value in common.read_safetensors(found).items()}
        tensors |= {name: tensors[name].T for name in _TURNED if name in tensors}
        if "W_enc" in tensors and "threshold" not in tensors:  # A plain ReLU transcoder.
            tensors["threshold"] = np.zeros(tensors["W_enc"].shape[-1], np.float32)
        about = common.About(
            config["model_name"],
            f"blocks.{layer}.{config['feature_input_hook']}",
            hook_name_out=f"blocks.{layer}.{config['feature_output_hook']}",
        )
        yield common.Found(f"layer_{layer}", common.sae_from_arrays(tensors, found), about)


def _found(path: pathlib.Path) -> Iterator[common.Found]:
    match = re.fullmatch(r"layer_(\d+)\.safetensors", path.name)
    return read(common.folder_of(path), int(match[1]) if match else None)


def _obstacle(kind: common.Kind) -> str | None:
    if not kind.is_transcoder:
        return "is not a transcoder, and circuit-tracer reads only transcoders"
    if kind.site.layer != kind.target_site.layer:
        return (
            f"reads layer {kind.site.layer} and predicts layer {kind.target_site.layer}; circuit-tracer needs one "
            "layer"
        )
    return None


FORMAT = common.Format(
    marks=("config.yaml",),
    files=("config.yaml", "layer_*.safetensors"),
    file_pattern=r"layer_\d+\.safetensors",
    read=_found,
    write=write,
    obstacle=_obstacle,
    # One folder for transcoders that differ only in the layer.
    place=lambda name, member, l0: re.sub(r"layer_\d+_", "", name, count=1),
    holds_many=True,
)
