"""Gemma Scope in JAX: SAEs on Gemma's activations, trained in one compiled step, evaluated and looked into."""

import importlib
import types
import warnings

__version__ = "0.1.0"

# What lay flat in the package before it had rooms, for a release: by its old name, the modules that it is in now.
_MOVED = {
    "activations": ("models.activations",),
    "bank": ("training.bank", "saes.naming"),
    "baselines": ("evaluation.baselines",),
    "checkpoint": ("training.checkpoint",),
    "detection": ("evaluation.detection",),
    "explore": ("analysis",),
    "export": ("training.export", "saes.saving"),
    "files": ("runtime.files", "runtime.safetensors_io"),
    "forecast": ("training.forecast", "training.flops"),
    "formats": ("saes.formats",),
    "gemma": ("models.forward", "models.registry", "models.sites", "models.masking", "models.predictions"),
    "generation": ("models.generation",),
    "hub": ("saes.finding", "runtime.hub"),
    "log": ("training.metrics_log",),
    "metrics": ("evaluation.metrics", "saes.evaluation_file"),
    "normalizer": ("training.normalizer",),
    "opening": ("evaluation.opening", "models.placement"),
    "passes": ("models.interventions",),
    "probing": ("evaluation.probing",),
    "publish": ("training.publish",),
    "report": ("evaluation.report",),
    "runs": ("training.runs",),
    "sae": ("saes.jumprelu", "saes.objectives"),
    "sharding": ("runtime.sharding",),
    "step": ("training.step",),
    "stored": ("saes.loading",),
    "suites": ("evaluation.side_by_side",),
    "tokenizer": ("models.tokenizer",),
    "weights": ("models.weights",),
}


def __getattr__(name: str) -> types.ModuleType:
    if name not in _MOVED:
        raise AttributeError(f"module 'gemma_scope_jax' has no attribute {name!r}")
    places = _MOVED[name]
    now = " and ".join(f"gemma_scope_jax.{place}" for place in places)
    warnings.warn(f"gemma_scope_jax.{name} is {now} now", DeprecationWarning, stacklevel=2)
    modules = [importlib.import_module(f"gemma_scope_jax.{place}") for place in places]
    if len(modules) == 1:
        return modules[0]
    merged = types.ModuleType(f"gemma_scope_jax.{name}")
    for module in reversed(modules):
        merged.__dict__.update({key: value for key, value in vars(module).items() if not key.startswith("_")})
    return merged
