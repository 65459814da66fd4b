"""Google's package `gemma`, imported without its training dependencies: every command starts eight seconds earlier.

Its modules need TensorFlow only for a type annotation. Its checkpoint package imports kauldron's trainer, pandas,
Keras and scikit-learn, which are not needed here because `weights` reads checkpoints.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator


class _TensorFlow(types.ModuleType):
    """A stand-in for TensorFlow while `gemma` is imported."""

    class Tensor:
        """A type that no array has."""


@contextlib.contextmanager
def _without_its_trainer() -> Iterator[None]:
    """Provides stand-ins while `gemma` is imported; later imports of these packages get the real ones."""
    stand_ins: dict[str, types.ModuleType] = {}
    if "tensorflow" not in sys.modules:
        stand_ins["tensorflow"] = _TensorFlow("tensorflow")
    if "gemma.gm.ckpts" not in sys.modules:
        found = importlib.util.find_spec("gemma.gm")
        checkpoints = types.ModuleType("gemma.gm.ckpts")  # A package whose `__init__` does not run.
        checkpoints.__path__ = [f"{place}/ckpts" for place in found.submodule_search_locations]
        stand_ins["gemma.gm.ckpts"] = checkpoints
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


with _without_its_trainer():
    from gemma import gm
    from gemma.gm.ckpts._paths import CheckpointPath

    _ = gm.nn.Transformer, gm.nn.Gemma3_270M  # `gm` imports its parts on first access.
    from gemma.gm.nn import _config as transformer_config
    from gemma.gm.nn import _modules as transformer_modules

__all__ = ["CheckpointPath", "gm", "transformer_config", "transformer_modules"]
