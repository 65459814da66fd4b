"""Gemma Scope 2's folder formats: SAEs and transcoders in `params.safetensors`, and multi-layer files."""

import dataclasses
import pathlib
import re

import numpy as np

from gemma_scope_jax.runtime import files, safetensors_io
from gemma_scope_jax.runtime.errors import FormatError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.saes import naming
from gemma_scope_jax.saes.formats import common
from gemma_scope_jax.saes.jumprelu import SAE

# Gemma Scope 2's names of the arrays. The skip connection is applied as x @ W_skip.
_NAMES = {
    "W_enc": "w_enc",
    "W_dec": "w_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
    "W_skip": "affine_skip_connection",
}
# The hooks read and predicted, by the names of folders in Google's repositories.
_HOOKS = {
    "resid_post": ("model.layers.{}.output", None),
    "attn_out": ("model.layers.{}.self_attn.o_proj.input", None),
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm.output", None),
    "transcoder": (
        "model.layers.{}.pre_feedforward_layernorm.output",
        "model.layers.{}.post_feedforward_layernorm.output",
    ),
}


def write(folder: pathlib.Path, sae: SAE, about: common.About, dtype: str = "float32") -> pathlib.Path:
    """Writes a folded SAE or transcoder, with Hugging Face's names of hooks; returns the folder.

    Raises:
      ValueError: if the folder holds something else.
    """
    common.check_own(folder, "params.safetensors")
    config = {
        "hf_hook_point_in": about.hook_name,
        "hf_hook_point_out": about.hook_name_out or about.hook_name,
        "width": sae.W_enc.shape[1],
        "model_name": about.model_name,
        "architecture": "jump_relu",
        "l0": about.l0,
        "affine_connection": sae.W_skip is not None,
        "type": "transcoder" if about.hook_name_out else "sae",
    }
    tensors = {_NAMES[name]: value for name, value in common.arrays(sae, dtype).items()}
    with files.replacing_file(folder / "params.safetensors") as partial:
        safetensors_io.write_safetensors(partial, tensors)
    files.write_json(folder / "config.json", config)
    return folder


def read(folder: pathlib.Path) -> tuple[SAE, common.About]:
    """Reads an SAE or a transcoder.

    Raises:
      ValueError: if the folder is incomplete, or has another architecture.
    """
    path = folder / "config.json"
    about = _about(files.read_json(path), path) if path.exists() else about_from_path(folder)
    tensors = common.read_safetensors(folder / "params.safetensors")
    ours = {theirs: name for name, theirs in _NAMES.items()}
    return common.sae_from_arrays(
        {ours.get(name, name): value for name, value in tensors.items()}, folder / "params.safetensors"
    ), about


def _about(config: dict, path: pathlib.Path) -> common.About:
    found = [
        config.get(key) for key in ("architecture", "model_name", "hf_hook_point_in", "hf_hook_point_out")
    ]
    if not all(isinstance(value, str) for value in found):
        raise FormatError(
            f"{path} is not a Gemma Scope 2 config: architecture, model_name, hf_hook_point_in and "
            f"hf_hook_point_out must be strings, not {printable(found)}"
        )
    architecture, model_name, hook, hook_out = found
    if architecture != "jump_relu":
        raise FormatError(
            f"{path} has architecture {printable(repr(architecture))}; only 'jump_relu' is read"
        )
    l0 = config.get("l0")
    return common.About(
        _model_name(model_name),
        hook,
        hook_name_out=hook_out if hook_out != hook else None,
        l0=float(l0) if isinstance(l0, (int, float)) and 0 <= l0 < 1e9 else None,
    )


def _model_name(text: str) -> str:
    """A model's name on Hugging Face; the files write gemma-v3 for gemma-3, and 270m-pt for the base model 270m."""
    return re.sub("-270m-pt$", "-270m", text.replace("gemma-v3", "gemma-3"))


def about_from_path(folder: pathlib.Path) -> common.About:
    """The metadata in the folder names of Google's repositories, where a config.json can be missing; else empty."""
    # .../gemma-scope-2-1b-pt/.../resid_post_all/layer_12_width_16k_l0_small
    text = str(folder)
    repository = re.search(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)", text)
    place = re.search(rf"({'|'.join(_HOOKS)})(?:_all)?/layer_(\d+)_width_\w+_l0_\w+", text)
    if not repository or not place:
        return common.About()
    hook, hook_out = _HOOKS[place[1]]
    return common.About(
        "google/" + _model_name(f"gemma-3-{repository[1]}-{repository[2]}"),
        hook.format(place[2]),
        hook_name_out=hook_out and hook_out.format(place[2]),
    )


@dataclasses.dataclass(frozen=True)
class Layer:
    """The part of a crosscoder or cross-layer transcoder that reads one of its K layers.

    The latents f = JumpReLU(x_k W_enc + b_enc) of layer k add f · W_dec[:, j] to the prediction at layer j. b_dec and
    the skip connection belong to the prediction at layer k.
    """

    W_enc: np.ndarray  # [D, M]
    b_enc: np.ndarray  # [M]
    threshold: np.ndarray  # [M]
    W_dec: np.ndarray  # [M, K, D]
    b_dec: np.ndarray  # [D]
    W_skip: np.ndarray | None = None  # [D, D]


def predict(layers: list[Layer], x_KxBxD: np.ndarray) -> np.ndarray:
    """The predictions [K, B, D] of a multi-layer SAE or transcoder from the activations of its K layers."""
    out_KxBxD = np.zeros_like(x_KxBxD) + np.stack([layer.b_dec for layer in layers])[:, None]
    for k, layer in enumerate(layers):
        pre_BxM = x_KxBxD[k] @ layer.W_enc + layer.b_enc
        f_BxM = np.where(pre_BxM > layer.threshold, np.maximum(pre_BxM, 0), 0)
        out_KxBxD += np.einsum("bm,mkd->kbd", f_BxM, layer.W_dec, optimize=True)
        if layer.W_skip is not None:
            out_KxBxD[k] += x_KxBxD[k] @ layer.W_skip
    return out_KxBxD


def write_layers(folder: pathlib.Path, layers: list[Layer]) -> None:
    """Writes `params_layer_0.safetensors` and so on; other files in the folder stay.

    Raises:
      ValueError: if the folder holds something else.
    """
    common.check_own(folder, "params_layer_0.safetensors")
    for i, layer in enumerate(layers):
        tensors = {
            _NAMES[name]: np.asarray(value, np.float32)
            for name, value in vars(layer).items()
            if value is not None
        }
        with files.replacing_file(folder / f"params_layer_{i}.safetensors") as partial:
            safetensors_io.write_safetensors(partial, tensors)


def read_layers(folder: pathlib.Path) -> list[Layer]:
    """Reads a crosscoder or cross-layer transcoder; arrays are views of the files.

    Raises:
      ValueError: if a file is missing or incomplete, or the files do not fit each other.
    """
    count = len(list(folder.glob("params_layer_*.safetensors")))
    ours = {theirs: name for name, theirs in _NAMES.items()}
    layers = []
    for i in range(count):
        path = folder / f"params_layer_{i}.safetensors"
        tensors = {ours.get(name, name): value for name, value in common.read_safetensors(path).items()}
        W_dec = tensors.get("W_dec")
        if W_dec is None or W_dec.ndim != 3 or W_dec.shape[1] != count:
            shape = None if W_dec is None else W_dec.shape
            raise FormatError(f"{path}: w_dec has shape {shape}, expected [latents, {count}, width]")
        # Checked as an ordinary transcoder that predicts all layers at once.
        flat = {**tensors, "W_dec": W_dec.reshape(W_dec.shape[0], -1)}
        flat |= {
            name: np.tile(flat[name], count)
            for name in ("b_dec", "W_skip")
            if name in flat and flat[name].ndim
        }
        common.sae_from_arrays(flat, path)
        layers.append(Layer(**{name: np.asarray(value, np.float32) for name, value in tensors.items()}))
    if not layers:
        raise FormatError(f"{folder} has no params_layer_0.safetensors")
    return layers


def _place(name: str, member: naming.Member, l0: float) -> str:
    del name
    kind = "transcoder" if member.is_transcoder else member.site.kind
    end = ("_affine" if member.skip else "") + (f"_seed_{member.seed}" if member.seed else "")
    width = naming.width_name(member.width)
    return f"{kind}/{naming.layer_name(member)}_width_{width}_l0_{round(l0)}{end}"


def _obstacle(kind: common.Kind) -> str | None:
    if kind.target_site.kind == "mlp_in_gain_free":
        return "outputs activations of mlp_in_gain_free, for which Hugging Face has no name"
    return None


FORMAT = common.Format(
    marks=("params.safetensors",),
    files=("config.json", "params.safetensors"),
    read=lambda path: [common.Found(common.name_of(path), *read(common.folder_of(path)))],
    write=write,
    obstacle=_obstacle,
    place=_place,
    hooks="hugging_face",
    transcoders_read="mlp_in",
)


def _refuse(path: pathlib.Path) -> list[common.Found]:
    raise FormatError(
        f"{path} reads and predicts several layers at once, so it cannot be evaluated or converted; load it with "
        "saes.formats.gemma_scope_2.read_layers"
    )


MULTI_LAYER = common.Format(
    marks=("params_layer_0.safetensors",),
    files=("config.json", "params_layer_*.safetensors"),
    read=_refuse,
)
