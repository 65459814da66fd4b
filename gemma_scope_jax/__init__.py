"""Gemma Scope in JAX: trains SAEs on Gemma's activations in one compiled step, evaluates them and analyses them.

    import gemma_scope_jax as gs

`gs.load_sae`, `gs.load_model`, `gs.train`, `gs.evaluate` and `gs.session` are imported on first use.
"""

import importlib
import types
import typing
import warnings

if typing.TYPE_CHECKING:
    from gemma_scope_jax.api import (
        LanguageModel,
        LoadedSAE,
        TrainedRun,
        evaluate,
        load_model,
        load_sae,
        load_saes,
        session,
        train,
    )

__version__ = "0.1.0"

__all__ = [
    "LanguageModel",
    "LoadedSAE",
    "TrainedRun",
    "__version__",
    "evaluate",
    "load_model",
    "load_sae",
    "load_saes",
    "session",
    "train",
]

# Modules that used to be at the top of the package, by their old names, with the modules that hold their contents
# now. The old names work for one more release.
_MOVED = {
    "activations": ("models.activations", "saes.attached"),
    "bank": ("training.bank", "saes.naming"),
    "baselines": ("evaluation.baselines",),
    "checkpoint": ("training.checkpoint",),
    "chips": ("runtime.devices", "training.flops"),
    "descriptions": ("evaluation.token_descriptions",),
    "detection": ("evaluation.detection",),
    "explore": ("analysis",),
    "export": ("training.export", "saes.saving", "saes.naming"),
    "files": ("runtime.files", "runtime.safetensors_io"),
    "forecast": ("training.forecast",),
    "formats": ("saes.formats",),
    "gemma": (
        "models.forward", "models.registry", "models.placement", "models.sites", "models.masking",
        "models.predictions",
        "training.flops",
    ),
    "generation": ("models.generation", "models.interventions"),
    "hosts": ("runtime.distributed",),
    "hub": ("saes.finding", "runtime.hub", "evaluation.output"),
    "interrupt": ("runtime.signals",),
    "locks": ("runtime.locks",),
    "log": ("training.metrics_log",),
    "metrics": ("evaluation.metrics", "evaluation.measuring", "saes.evaluation_file", "saes.geometry"),
    "normalizer": ("training.normalizer",),
    "opening": ("evaluation.opening", "models.placement", "data.batching"),
    "optim": ("training.optimizer",),
    "page": ("evaluation.page", "display.html"),
    "passes": ("models.passes", "models.interventions", "saes.attached", "evaluation.measuring"),
    "planning": ("training.memory", "runtime.devices"),
    "plans": ("training.plans",),
    "plots": ("evaluation.plots",),
    "prepare": ("data.prepare",),
    "printing": ("runtime.printing",),
    "probing": ("evaluation.probing",),
    "publish": ("training.publish",),
    "ranges": ("runtime.ranges",),
    "report": ("evaluation.report", "saes.attached"),
    "ring": ("training.shuffle_buffer",),
    "rollouts": ("cli.generate",),
    "runs": ("training.runs", "saes.loading", "models.placement", "data.prepare"),
    "sae": ("saes.jumprelu", "saes.objectives"),
    "sharding": ("runtime.sharding", "training.shardings", "models.placement"),
    "step": ("training.step", "models.forward"),
    "stored": ("saes.loading",),
    "suites": ("evaluation.side_by_side",),
    "tables": ("display.tables",),
    "texts": ("data.sources",),
    "tokenizer": ("models.tokenizer",),
    "verdicts": ("saes.verdicts",),
    "weights": ("models.weights",),
}  # fmt: skip
# The contents of those modules that were renamed: by old module and old name, the new module and the new name.
_RENAMED = {
    "gemma": {"depth": ("models.sites", "blocks_needed")},
    "runs": {
        "prepare_rows": ("data.prepare", "rows_of"),
        "prepare_rows_once": ("data.prepare", "rows_of_once"),
    },
    "sae": {"jumprelu": ("saes.objectives", "jump_relu"), "step": ("saes.objectives", "heaviside")},
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("gemma_scope_jax.api"), name)
    if name not in _MOVED:
        raise AttributeError(f"module 'gemma_scope_jax' has no attribute {name!r}")
    places = _MOVED[name]
    now = " and ".join(f"gemma_scope_jax.{place}" for place in places)
    warnings.warn(f"gemma_scope_jax.{name} is now {now}", DeprecationWarning, stacklevel=2)
    modules = [importlib.import_module(f"gemma_scope_jax.{place}") for place in places]
    if len(modules) == 1:
        return modules[0]
    merged = types.ModuleType(f"gemma_scope_jax.{name}")
    for module in reversed(modules):  # The first module's definition of a name wins.
        merged.__dict__.update({key: value for key, value in vars(module).items() if not key.startswith("_")})
    for key, (place, new_name) in _RENAMED.get(name, {}).items():
        setattr(merged, key, getattr(importlib.import_module(f"gemma_scope_jax.{place}"), new_name))
    return merged
