"""Gemma Scope 2's folder: `config.json` and `params.safetensors`, of an SAE or of a transcoder."""

import dataclasses
import json
import pathlib

import safetensors
import safetensors.numpy

from gemma_scope_jax.formats import files
from gemma_scope_jax.sae import SAE

# Its names of our arrays. The skip connection is applied as x @ W_skip.
_NAMES = {
    "W_enc": "w_enc",
    "W_dec": "w_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
    "W_skip": "affine_skip_connection",
}


@dataclasses.dataclass(frozen=True)
class About:
    """What an SAE reads and predicts, by Hugging Face's names."""

    model_name: str
    hook_in: str
    hook_out: str
    l0: float


def write(folder: pathlib.Path, sae: SAE, about: About) -> None:
    """Writes a folded SAE or transcoder; other files in the folder stay.

    Raises:
      ValueError: the folder holds something else.
    """
    files.check_own(folder, "params.safetensors")
    config = {
        "hf_hook_point_in": about.hook_in,
        "hf_hook_point_out": about.hook_out,
        "width": sae.W_enc.shape[1],
        "model_name": about.model_name,
        "architecture": "jump_relu",
        "l0": about.l0,
        "affine_connection": sae.W_skip is not None,
        "type": "sae" if about.hook_in == about.hook_out else "transcoder",
    }
    tensors = {_NAMES[name]: value for name, value in files.arrays(sae).items()}
    with files.replacing_file(folder / "params.safetensors") as partial:
        safetensors.numpy.save_file(tensors, partial)
    with files.replacing_file(folder / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read(folder: pathlib.Path) -> tuple[SAE, About]:
    """Reads an SAE or a transcoder.

    Raises:
      ValueError: the folder is not whole, or holds another architecture.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = config["architecture"]
        about = About(
            config["model_name"], config["hf_hook_point_in"], config["hf_hook_point_out"], config["l0"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a Gemma Scope 2 config: {error!r}") from error
    if architecture != "jump_relu":
        raise ValueError(f"{path} has architecture {architecture!r}; only 'jump_relu' is read")
    tensors = files.read_safetensors(folder / "params.safetensors")
    ours = {theirs: name for name, theirs in _NAMES.items()}
    return files.sae_from_arrays(
        {ours.get(name, name): value for name, value in tensors.items()}, folder / "params.safetensors"
    ), about
