"""Google's package `gemma`, without what it imports to train: every command starts eight seconds earlier.

Its modules need TensorFlow for the type in an annotation, and its checkpoints' package imports kauldron's trainer,
pandas, Keras and scikit-learn. We read checkpoints ourselves (`weights`), and use neither.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator


class _TensorFlow(types.ModuleType):
    """Stands for TensorFlow while `gemma` is imported: it has a type that no array is of."""

    class Tensor:
        """Of no array."""


@contextlib.contextmanager
def _without_its_trainer() -> Iterator[None]:
    """Within it `gemma` finds stand-ins; after it whoever imports one of these packages gets the real one."""
    stand_ins: dict[str, types.ModuleType] = {}
    if "tensorflow" not in sys.modules:
        stand_ins["tensorflow"] = _TensorFlow("tensorflow")
    if "gemma.gm.ckpts" not in sys.modules:
        found = importlib.util.find_spec("gemma.gm")
        checkpoints = types.ModuleType("gemma.gm.ckpts")  # A package whose own code does not run.
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

    _ = gm.nn.Transformer  # `gm` imports its parts when they are asked for.
    from gemma.gm.nn import _config as transformer_config
    from gemma.gm.nn import _modules as transformer_modules

__all__ = ["CheckpointPath", "gm", "transformer_config", "transformer_modules"]
